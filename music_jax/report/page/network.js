// Applies the network of a run to the pixels of an image, as `music_jax.load` does.
//
// Images and feature maps are objects of `height`, `width`, and `values` of all channels of each
// pixel. Products are summed in double precision.

function outputOf(layers, input) {
  const outputs = [input];
  for (const layer of layers) outputs.push(LAYERS[layer.kind](layer, ...layer.inputs.map((i) => outputs[i])));
  return outputs.at(-1);
}

const LAYERS = { conv: convolved, max_pool: maxPooled, add: added, grid_mean: gridMean };

function convolved({ kernel, bias, stride, relu }, { height, width, values }) {
  const [size, , channels, count] = kernel.shape;
  const pad = size >> 1;
  const out = { height: Math.ceil(height / stride), width: Math.ceil(width / stride) };
  out.values = new Float32Array(out.height * out.width * count);
  const sums = new Float64Array(count);
  for (let place = 0; place < out.height * out.width; place++) {
    const top = Math.floor(place / out.width) * stride - pad;
    const left = (place % out.width) * stride - pad;
    sums.set(bias.values);
    for (let i = Math.max(0, -top); i < size && top + i < height; i++) {
      for (let j = Math.max(0, -left); j < size && left + j < width; j++) {
        const from = ((top + i) * width + left + j) * channels;
        for (let c = 0; c < channels; c++) {
          const value = values[from + c];
          if (value === 0) continue; // as often after ReLU
          const at = ((i * size + j) * channels + c) * count;
          for (let k = 0; k < count; k++) sums[k] += value * kernel.values[at + k];
        }
      }
    }
    for (let k = 0; k < count; k++) out.values[place * count + k] = relu ? Math.max(0, sums[k]) : sums[k];
  }
  return out;
}

// The maximum of 3 x 3 pixels around every second one.
function maxPooled(_, { height, width, values }) {
  const channels = values.length / (height * width);
  const out = { height: Math.ceil(height / 2), width: Math.ceil(width / 2) };
  out.values = new Float32Array(out.height * out.width * channels).fill(-Infinity);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let i = y >> 1; i <= Math.min((y + 1) >> 1, out.height - 1); i++) {
        for (let j = x >> 1; j <= Math.min((x + 1) >> 1, out.width - 1); j++) {
          for (let c = 0; c < channels; c++) {
            const at = (i * out.width + j) * channels + c;
            out.values[at] = Math.max(out.values[at], values[(y * width + x) * channels + c]);
          }
        }
      }
    }
  }
  return out;
}

function added({ relu }, a, b) {
  const sum = (value, i) => value + b.values[i];
  return { ...a, values: a.values.map(relu ? (value, i) => Math.max(0, sum(value, i)) : sum) };
}

// The mean over each cell of a grid, whose cells overlap if it does not divide the sides: one pixel of all of them.
function gridMean({ grid }, { height, width, values }) {
  const channels = values.length / (height * width);
  const ends = (i, length) => [Math.floor((i * length) / grid), Math.ceil(((i + 1) * length) / grid)];
  const out = new Float32Array(grid * grid * channels);
  for (let cell = 0; cell < grid * grid; cell++) {
    const [top, bottom] = ends(Math.floor(cell / grid), height);
    const [left, right] = ends(cell % grid, width);
    for (let c = 0; c < channels; c++) {
      let sum = 0;
      for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) sum += values[(y * width + x) * channels + c];
      out[cell * channels + c] = sum / ((bottom - top) * (right - left));
    }
  }
  return { height: 1, width: 1, values: out };
}

// Applies a network to an image: the picture that it gets, features, probabilities of the units and of the classes,
// and similarities to the images of the report. Probabilities are null without segments or a probe.
function appliedTo(network, image, segments) {
  const view = centralView(inChannels(image, network.mean.length), network.size, network.resize);
  const channels = network.mean.length;
  const normalized = Float32Array.from(view.values, (v, i) => (v / 255 - network.mean[i % channels]) / network.std[i % channels]);
  const map = outputOf(network.layers, { ...view, values: normalized });
  const logits = (layers) => outputOf(layers, map).values;
  return {
    view,
    features: map.values,
    codes: segments && softmax(logits(network.head), segments.units, segments.temperature),
    classes: network.classifier && softmax(logits(network.classifier), network.classifier[0].bias.values.length, 1)[0],
    similarities: similarities(network.gallery.vectors, map.values),
  };
}

// Divides scores into groups of a size; returns the probabilities in each.
function softmax(scores, size, temperature) {
  return Array.from({ length: scores.length / size }, (_, s) => {
    const own = scores.subarray(s * size, (s + 1) * size);
    const most = own.reduce((a, b) => Math.max(a, b));
    const weights = Array.from(own, (score) => Math.exp((score - most) / temperature));
    const total = weights.reduce((a, b) => a + b);
    return weights.map((weight) => weight / total);
  });
}

// Cosine similarities to vectors of unit length in steps of 1/32767.
function similarities({ values, shape: [count, size] }, features) {
  const length = Math.hypot(...features) || 1;
  return Array.from({ length: count }, (_, i) => {
    let sum = 0;
    for (let k = 0; k < size; k++) sum += values[i * size + k] * features[k];
    return sum / (32767 * length);
  });
}
