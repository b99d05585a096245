// Reads images, and cuts the central view for evaluation with the same arithmetic as OpenCV.

const MAX_SIDE = 4096; // of an image that is not shrunk by the browser first

// Decodes a file without conversions of its colors. PNG files have their own formula for gray.
async function readImage(file) {
  let bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const shrink = MAX_SIDE / Math.max(bitmap.width, bitmap.height);
  if (shrink < 1) {
    const [resizeWidth, resizeHeight] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * shrink)));
    bitmap = await createImageBitmap(bitmap, { resizeWidth, resizeHeight, resizeQuality: "high" });
  }
  const { width, height } = bitmap;
  const context = make("canvas", { width, height }).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { ...imageOf(context), isPng: file.type === "image/png" };
}

// Returns the pixels of a canvas.
function imageOf(context) {
  const { width, height } = context.canvas;
  return { width, height, isPng: true, rgba: context.getImageData(0, 0, width, height).data };
}

function isOpaque({ rgba }) {
  for (let i = 3; i < rgba.length; i += 4) if (rgba[i] < 255) return false;
  return true;
}

// Returns an image of one or three channels without transparency.
function inChannels({ width, height, rgba, isPng }, channels) {
  const values = new Uint8Array(width * height * channels);
  const [red, green, blue, half] = isPng ? [9797, 19234, 3737, 0] : [9798, 19235, 3735, 16384];
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = [rgba[4 * i], rgba[4 * i + 1], rgba[4 * i + 2]];
    if (channels === 1) values[i] = (r * red + g * green + b * blue + half) >> 15;
    else values.set([r, g, b], 3 * i);
  }
  return { width, height, values };
}

// Resizes the shorter side, then cuts the central square.
function centralView(image, size, resize) {
  for (const [along, across, start] of [["height", "width", "top"], ["width", "height", "left"]]) {
    if (image[along] <= 16 * image[across]) continue;
    const cut = (image[along] - 4 * image[across]) >> 1;
    const { height, width } = image;
    image = part(image, { top: 0, left: 0, height, width, [start]: cut, [along]: image[along] - 2 * cut });
  }
  const ratio = resize / Math.min(image.height, image.width);
  const [height, width] = [image.height, image.width].map((side) => Math.max(roundedToEven(side * ratio), size));
  return part(resized(image, height, width), { top: (height - size) >> 1, left: (width - size) >> 1, height: size, width: size });
}

function part({ width: from, height: rows, values }, { top, left, height, width }) {
  const channels = values.length / (from * rows);
  const out = new Uint8Array(height * width * channels);
  for (let y = 0; y < height; y++) {
    const start = ((top + y) * from + left) * channels;
    out.set(values.subarray(start, start + width * channels), y * width * channels);
  }
  return { height, width, values: out };
}

function roundedToEven(value) {
  const floor = Math.floor(value);
  return value - floor === 0.5 ? floor + (floor % 2) : Math.round(value);
}

function resized(image, height, width) {
  if (image.height === height && image.width === width) return image;
  return image.height * image.width > height * width ? averaged(image, height, width) : interpolated(image, height, width);
}

// Averages over the area of each new pixel, in single precision: OpenCV's INTER_AREA.
function averaged(image, height, width) {
  const [tall, wide] = [image.height / height, image.width / width];
  const channels = image.values.length / (image.height * image.width);
  const out = new Uint8Array(height * width * channels);
  const whole = Number.isInteger(tall) && Number.isInteger(wide);
  const [weightsY, weightsX] = [areaWeights(image.height, height, whole), areaWeights(image.width, width, whole)];
  const share = Math.fround(1 / (tall * wide));
  const { values } = image;
  const f = Math.fround;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < channels; c++) {
        const [down, along] = [weightsY[y], weightsX[x]];
        let sum = 0;
        for (let i = 0; i < down.weights.length; i++) {
          const from = ((down.first + i) * image.width + along.first) * channels + c;
          let ofRow = 0;
          for (let j = 0; j < along.weights.length; j++) ofRow = f(ofRow + f(along.weights[j] * values[from + j * channels]));
          sum = f(sum + f(down.weights[i] * ofRow));
        }
        const mean = !whole ? sum : tall === 2 && wide === 2 ? Math.floor((sum + 2) / 4) : f(sum * share);
        out[(y * width + x) * channels + c] = Math.min(roundedToEven(mean), 255);
      }
    }
  }
  return { height, width, values: out };
}

// Returns the first old pixel of each new one, and the shares of its length from there on; 1 for whole numbers of them.
function areaWeights(from, to, whole) {
  const scale = from / to;
  return Array.from({ length: to }, (_, i) => {
    const start = i * scale;
    if (whole) return { first: start, weights: new Float32Array(scale).fill(1) };
    const cell = Math.min(scale, from - start);
    const last = Math.min(Math.floor(start + scale), from - 1);
    const first = Math.min(Math.ceil(start), last);
    const [before, after] = [first - start, start + scale - last];
    const weights = Array(last - first).fill(1 / cell);
    if (before > 1e-3) weights.unshift(before / cell);
    if (after > 1e-3) weights.push(Math.min(after, 1, cell) / cell);
    return { first: before > 1e-3 ? first - 1 : first, weights: Float32Array.from(weights) };
  });
}

// Interpolates bilinearly between the centers of the pixels, in integers: OpenCV's INTER_LINEAR.
function interpolated(image, height, width) {
  const channels = image.values.length / (image.height * image.width);
  const out = new Uint8Array(height * width * channels);
  const [along, down] = [pairs(image.width, width, true), pairs(image.height, height, false)];
  const at = (y, x, c) => image.values[(y * image.width + x) * channels + c];
  for (let y = 0; y < height; y++) {
    const [above, below, upper, lower] = down[y];
    for (let x = 0; x < width; x++) {
      const [left, right, before, after] = along[x];
      for (let c = 0; c < channels; c++) {
        const [top, bottom] = [above, below].map((row) => (at(row, left, c) * before + at(row, right, c) * after) >> 4);
        out[(y * width + x) * channels + c] = (((top * upper) >> 16) + ((bottom * lower) >> 16) + 2) >> 2;
      }
    }
  }
  return { height, width, values: out };
}

// Returns two old pixels of each new one, and their weights times 2048. Beyond the ends, the pixel at the end counts
// with both weights, or with a single one.
function pairs(from, to, single) {
  const f = Math.fround;
  return Array.from({ length: to }, (_, i) => {
    const place = f((i + 0.5) * (from / to) - 0.5);
    const first = Math.floor(place);
    const rest = single && (first < 0 || first >= from - 1) ? 0 : f(place - first);
    const [a, b] = [first, first + 1].map((k) => Math.min(Math.max(k, 0), from - 1));
    return [a, b, roundedToEven(f(f(1 - rest) * 2048)), roundedToEven(f(rest * 2048))];
  });
}
