// Applies the networks to an image that the reader drops, chooses or draws.

const CLASSES_SHOWN = 5;
const DRAWING_SIDE = 280; // pixels, about

function drawTryIt({ runs }) {
  const tried = runs.flatMap((run, index) => ($(`#network-${index}`) ? [{ run, index, panel: $(`#try-it [data-run="${index}"] [data-tried]`) }] : []));
  if (!tried.length) return;
  const status = $("#try-it-status");
  const file = $("#try-it-file");
  let latest = 0;

  // Applies the networks to an image that `read` returns; of several calls, the last one counts.
  async function attempt(name, read) {
    const call = ++latest;
    status.textContent = `Computing ${name} …`;
    try {
      const image = await read();
      const results = [];
      for (const each of tried) {
        each.network ??= unpackedAll(JSON.parse(await inflated(`network-${each.index}`)));
        results.push(appliedTo(each.network, image, each.run.segments));
      }
      if (call !== latest) return;
      tried.forEach((each, i) => showTried(each, results[i], name));
      const several = runs.length > 1;
      status.textContent = tried.map(({ run, network }, i) => `${several ? `${run.name}: ` : ""}${summary(run, network, results[i], name)}`).join(" ");
      if (!isOpaque(image)) {
        status.textContent += " Its transparent pixels may be read differently than by music_jax.";
      }
    } catch (error) {
      if (call !== latest) return;
      tried.forEach(({ panel }) => panel.replaceChildren());
      status.textContent = `${name} cannot be read as an image; choose a PNG, JPEG, WebP, GIF or BMP file.`;
      if (error.name !== "InvalidStateError") console.error(error);
    }
  }

  const readFile = (chosen) => attempt(chosen.name, () => readImage(chosen));
  file.addEventListener("change", () => file.files.length && readFile(file.files[0]));
  const section = $("#try-it");
  section.addEventListener("dragover", (event) => {
    event.preventDefault();
    section.classList.add("over");
  });
  section.addEventListener("dragleave", () => section.classList.remove("over"));
  section.addEventListener("drop", (event) => {
    event.preventDefault();
    section.classList.remove("over");
    const [dropped] = event.dataTransfer.files;
    if (dropped) readFile(dropped);
    else status.textContent = "No file was dropped; drop an image file from your disk.";
  });
  drawing((context) => attempt("the drawing", () => imageOf(context)));
}

// Lets the reader draw on the canvas; calls `done` after each line.
function drawing(done) {
  const canvas = $("#try-it-canvas");
  canvas.width = canvas.height = DRAWING_SIDE;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const [pen, background] = [$("#try-it-pen"), $("#try-it-background")];
  const clear = () => {
    context.fillStyle = background.value;
    context.fillRect(0, 0, DRAWING_SIDE, DRAWING_SIDE);
  };
  Object.assign(context, { lineWidth: DRAWING_SIDE / 12, lineCap: "round", lineJoin: "round" });
  clear();
  const place = (event) => [event.offsetX, event.offsetY].map((at) => (at * DRAWING_SIDE) / canvas.clientWidth);
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    context.strokeStyle = pen.value;
    context.beginPath();
    context.moveTo(...place(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    context.lineTo(...place(event));
    context.stroke();
  });
  canvas.addEventListener("pointerup", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return; // the line began elsewhere
    context.lineTo(...place(event)); // a dot, if the pointer has not moved
    context.stroke();
    done(context);
  });
  for (const [element, kind] of [[$("#try-it-clear"), "click"], [background, "input"]]) element.addEventListener(kind, clear);
}

function ranked(values, count) {
  return Array.from(values, (value, i) => [i, value]).sort((a, b) => b[1] - a[1]).slice(0, count);
}

function summary(run, network, { classes, similarities }, name) {
  const [[near, similarity]] = ranked(similarities, 1);
  const image = network.gallery.images.at(near);
  const label = run.images.labels.at(image);
  const its = label < 0 ? "" : ` of class ${className(run, label)}`;
  const nearest = `the nearest image is ${run.images.names[image]}${its} (similarity ${similarity.toFixed(3)})`;
  if (!classes) return `${name}: ${nearest}.`;
  const [[first, share]] = ranked(classes, 1);
  return `${name}: class ${className(run, first)} (${percent(share)}); ${nearest}.`;
}

function showTried({ run, network, panel }, { view, codes, classes, similarities }, name) {
  const level = $(":scope > h3", panel.parentElement) ? "h4" : "h3"; // below the name of the run, if it is shown
  const block = (title, ...children) => make("div", {}, make(level, { text: title }), ...children);
  const parts = [block("Image", viewCanvas(view, name))];
  if (classes) {
    const shares = ranked(classes, CLASSES_SHOWN).map(([label, share]) => {
      const meter = make("span", { className: "meter" }, make("span"));
      meter.setAttribute("aria-hidden", "true");
      meter.firstChild.style.width = `${100 * share}%`;
      return make("li", {}, meter, `${className(run, label)}: ${percent(share)}`);
    });
    parts.push(block("Class by the linear probe", make("ol", {}, ...shares)));
  } else {
    const reason = run.classes.length
      ? "Not shown: the linear probe of this checkpoint is not saved; python -m music_jax.linear_eval saves it."
      : "Not shown: the images have no labels, or several each.";
    parts.push(block("Class by the linear probe", make("p", { className: "missing", text: reason })));
  }
  const near = ranked(similarities, run.neighbors.rows.shape[1] || 1).map(([i, similarity]) => {
    const image = network.gallery.images.at(i);
    const label = run.images.labels.at(image);
    const caption = make("figcaption", { text: similarity.toFixed(3) });
    if (label >= 0) caption.prepend(className(run, label), make("br"));
    return make("figure", {}, thumb(run, image, 56, { onClick: () => showNeighbors(run, image) }), caption);
  });
  parts.push(block("Nearest images", make("div", { className: "near" }, ...near)));
  if (codes) {
    const units = run.segments.order.map((segment) => {
      const [[unit, share]] = ranked(codes[segment], 1);
      const image = run.segments.top.at(segment, unit, 0);
      const item = make("li", {}, make("span", { text: `segment ${segment}: unit ${unit}, ${percent(share)}` }));
      if (image !== 65535) item.prepend(thumb(run, image, 32));
      return item;
    });
    const note = "The most probable unit of each segment, with the image that is most certain of it.";
    parts.push(block("Units", make("p", { className: "muted", text: note }), make("ol", { className: "codes" }, ...units)));
    parts.at(-1).className = "all";
  }
  panel.replaceChildren(...parts);
}

// Shows the pixels that the network gets.
function viewCanvas({ height, width, values }, name) {
  const canvas = make("canvas", { className: "view", width, height });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${name} as the network gets it, ${width} by ${height} pixels`);
  const picture = new ImageData(width, height);
  const channels = values.length / (height * width);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 4; c++) picture.data[4 * i + c] = c === 3 ? 255 : values[channels * i + (channels === 1 ? 0 : c)];
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}
