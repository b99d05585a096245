// Draws thumbnails, nearest neighbors, the map, the augmented views and the confusions.

function className(run, label) {
  return run.classes[label] ?? String(label);
}

function imageName(run, image) {
  const { labels, predicted, names } = run.images;
  const parts = [`image ${names[image]}`];
  if (labels.at(image) >= 0) parts.push(className(run, labels.at(image)));
  if (predicted.at(image) >= 0) parts.push(`probe predicts ${className(run, predicted.at(image))}`);
  return parts.join(", ");
}

function placeTile(element, sheet, index, side) {
  const scale = side / sheet.tile;
  const [x, y] = [index % sheet.columns, Math.floor(index / sheet.columns)];
  element.classList.add(sheet.sprite);
  if (scale > 1.4 && sheet.tile <= 40) element.classList.add("sharp");
  Object.assign(element.style, {
    width: `${side}px`, height: `${side}px`,
    backgroundSize: `${sheet.columns * sheet.pitch * scale}px ${sheet.rows * sheet.pitch * scale}px`,
    backgroundPosition: `${-x * sheet.pitch * scale}px ${-y * sheet.pitch * scale}px`,
  });
  return element;
}

// Makes a thumbnail: a button if there is a click handler, else a picture.
function thumb(run, image, side, { more = "", onClick } = {}) {
  const name = imageName(run, image) + more;
  const element = make(onClick ? "button" : "div", { className: "thumb", title: name });
  element.setAttribute("aria-label", name);
  if (onClick) {
    element.type = "button";
    element.addEventListener("click", onClick);
  } else {
    element.setAttribute("role", "img");
  }
  return placeTile(element, run.images, image, side);
}

const NEIGHBOR_ROWS = 8;

function drawNeighbors(run, panel) {
  const list = $("[data-neighbors]", panel);
  const state = { start: 0 };
  run.neighborList = list;
  const order = spread(run);
  function show() {
    const some = Array.from({ length: Math.min(NEIGHBOR_ROWS, order.length) }, (_, i) => order[(state.start + i) % order.length]);
    list.replaceChildren(...some.map((image) => neighborRow(run, image)));
  }
  $("[data-neighbors-more]", panel).addEventListener("click", () => {
    state.start = (state.start + NEIGHBOR_ROWS) % order.length;
    show();
  });
  show();
}

// Orders the images so that consecutive ones have different classes.
function spread(run) {
  const classes = new Map();
  for (let i = 0; i < run.images.count; i++) {
    const label = run.images.labels.at(i);
    if (!classes.has(label)) classes.set(label, []);
    classes.get(label).push(i);
  }
  const queues = [...classes.entries()].sort((a, b) => a[0] - b[0]).map((entry) => entry[1]);
  const order = [];
  for (let k = 0; order.length < run.images.count; k++) {
    for (const queue of queues) if (k < queue.length) order.push(queue[k]);
  }
  return order;
}

function neighborRow(run, image, chosen = false) {
  const { rows: near, similarity } = run.neighbors;
  const label = run.images.labels.at(image);
  const of = make("div", { className: "of" }, thumb(run, image, 72));
  of.append(make("div", { text: label >= 0 ? className(run, label) : run.images.names[image] }));
  const list = make("div", { className: "near" });
  for (let k = 0; k < near.shape[1]; k++) {
    const other = near.at(image, k);
    const its = run.images.labels.at(other);
    const caption = make("figcaption");
    if (label >= 0 && its >= 0) {
      const same = its === label;
      caption.append(make("span", { className: same ? "same" : "other", text: same ? "✓ " : "✗ " }));
      if (!same) caption.append(className(run, its), make("br"));
    }
    caption.append((similarity.at(image, k) / 1000).toFixed(3));
    list.append(make("figure", {}, thumb(run, other, 56, { onClick: () => showNeighbors(run, other) }), caption));
  }
  return make("div", { className: chosen ? "row chosen" : "row" }, of, list);
}

function showNeighbors(run, image) {
  $(".row.chosen", run.neighborList)?.remove();
  const row = neighborRow(run, image, true);
  run.neighborList.prepend(row);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  row.scrollIntoView({ block: "center", behavior: still ? "auto" : "smooth" });
}

const MAP_NAMES = { embedding: "embedding (projection head)", features: "features (backbone)" };

function drawMap(run, panel) {
  const element = $("[data-map]", panel);
  const [of, by] = [$("[data-map-of]", panel), $("[data-map-by]", panel)];
  const maps = Object.keys(run.maps);
  fill(of, maps.map((name) => [name, MAP_NAMES[name]]), maps[0]);
  const ways = [];
  if (run.images.labels.values.some((label) => label >= 0)) ways.push(["class", "class"]);
  if (run.images.predicted.values.some((label) => label >= 0)) ways.push(["probe", "correct or incorrect prediction"]);
  if (run.segments) ways.push(...run.segments.order.map((s) => [`segment ${s}`, `unit of segment ${s}`]));
  if (!ways.length) ways.push(["none", "none"]);
  fill(by, ways, ways[0][0]);
  chart(element, (colors) => mapFigure(run, of.value, by.value, colors), {
    plotly_hover: ({ points: [point], event }) => preview(run, point.customdata, event),
    plotly_unhover: hidePreview,
    plotly_click: ({ points: [point] }) => {
      hidePreview();
      showNeighbors(run, point.customdata);
    },
  });
  for (const select of [of, by]) select.addEventListener("change", () => redraw(element));
}

// Groups the images to color them: name and images of each group, the largest first.
function groupsBy(run, by) {
  const { count, labels, predicted } = run.images;
  const groups = new Map();
  const add = (name, image) => (groups.has(name) ? groups.get(name).push(image) : groups.set(name, [image]));
  for (let i = 0; i < count; i++) {
    if (by === "class") add(labels.at(i) < 0 ? "no label" : className(run, labels.at(i)), i);
    else if (by === "probe") add(predicted.at(i) < 0 ? "no prediction" : predicted.at(i) === labels.at(i) ? "correct" : "incorrect", i);
    else if (by === "none") add("images", i);
    else add(`unit ${run.segments.codes.at(i, Number(by.split(" ")[1]))}`, i);
  }
  const largest = [...groups].sort((a, b) => b[1].length - a[1].length);
  if (largest.length > SYMBOLS.length) {
    const others = largest.splice(SYMBOLS.length - 1).flatMap((group) => group[1]);
    largest.push(["others", others]);
  }
  return largest.sort((a, b) => (a[0] === "others") - (b[0] === "others") || a[0].localeCompare(b[0], "en", { numeric: true }));
}

function mapFigure(run, of, by, colors) {
  const place = run.maps[of];
  const groups = groupsBy(run, by);
  const [x, y] = [0, 1].map((axis) => (i) => place.at(i, axis));
  const data = groups.map(([name, images], g) => ({
    type: "scatter", mode: "markers", name: plain(name), customdata: images, hoverinfo: "none",
    x: images.map(x), y: images.map(y),
    marker: {
      color: name === "others" ? colors.muted : groupColor(g), symbol: SYMBOLS[g % SYMBOLS.length], size: 7, opacity: 0.85,
      line: { width: 0.5, color: colors.back },
    },
  }));
  const middle = (values) => values.slice().sort((a, b) => a - b)[values.length >> 1];
  const named = groups.length > 1 && by !== "probe" ? groups.filter(([name, images]) => images.length > 2 && name !== "others") : [];
  const bare = { showticklabels: false, ticks: "", showgrid: false, zeroline: false, showline: false };
  return {
    data,
    layout: {
      margin: { l: 8, r: 8, t: 8, b: 8 },
      hovermode: "closest",
      showlegend: groups.length > 1,
      legend: { orientation: "h", y: -0.02, yanchor: "top", font: { size: 12 }, itemsizing: "constant" },
      xaxis: { ...bare, constrain: "domain" },
      yaxis: { ...bare, scaleanchor: "x", constrain: "domain" },
      annotations: named.map(([name, images]) => ({
        x: middle(images.map(x)), y: middle(images.map(y)), text: `<b>${plain(name)}</b>`, showarrow: false,
        font: { size: 13, color: colors.text }, bgcolor: colors.back, opacity: 0.8, borderpad: 2,
      })),
    },
    alt: `Scatter plot of ${run.images.count} images by ${of}, colored by ${by} in ${groups.length} groups.`,
  };
}

function preview(run, image, event) {
  const box = $("#preview");
  box.replaceChildren(thumb(run, image, 112), make("div", { text: imageName(run, image) }));
  box.hidden = false;
  const [width, height] = [box.offsetWidth, box.offsetHeight];
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16;
  const top = Math.min(event.clientY + 12, innerHeight - height - 8);
  Object.assign(box.style, { left: `${Math.max(4, left)}px`, top: `${Math.max(4, top)}px` });
}

function hidePreview() {
  $("#preview").hidden = true;
}

function drawViews(run, panel) {
  const grid = $("[data-views]", panel);
  const { count, columns, pairs, tile } = run.views;
  const side = Math.max(96, Math.min(tile, 128));
  grid.style.gridTemplateColumns = `repeat(${columns}, ${side}px)`;
  const heads = ["crop", ...Array.from({ length: pairs }, () => ["view 1", "view 2"]).flat()];
  grid.append(...heads.map((text) => make("div", { className: "head", text })));
  for (let i = 0; i < count * columns; i++) {
    const picture = make("div", { className: "thumb" });
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", `image ${Math.floor(i / columns) + 1}, ${heads[i % columns]}`);
    grid.append(placeTile(picture, run.views, i, side));
  }
}

function drawMistakes(run, panel) {
  for (const picture of $$("[data-mistake]", panel)) placeTile(picture, run.mistakes, Number(picture.dataset.mistake), 88);
}

function drawConfusion(run, panel) {
  const { names, counts } = run.confusion;
  const size = names.length;
  const totals = Array.from({ length: size }, (_, i) => counts.values.subarray(i * size, (i + 1) * size).reduce((a, b) => a + b, 0));
  const z = rows(counts.values, size, size).map((row, i) => Array.from(row, (n) => (totals[i] ? (100 * n) / totals[i] : null)));
  const text = rows(counts.values, size, size).map((row) => Array.from(row, (n) => (n ? String(n) : "")));
  const labels = names.map((name, i) => plain(name.length > 22 ? `${name.slice(0, 21)}…` : name) || String(i));
  const axis = { tickvals: names.map((_, i) => i), ticktext: labels, showgrid: false, zeroline: false, constrain: "domain" };
  const step = Math.ceil(size / 25);
  if (step > 1) Object.assign(axis, { tickvals: axis.tickvals.filter((i) => i % step === 0), ticktext: labels.filter((_, i) => i % step === 0) });
  chart($("[data-confusion]", panel), (colors) => ({
    data: [{
      type: "heatmap", z, zmin: 0, zmax: 100, colorscale: "Cividis", text,
      texttemplate: size <= 20 ? "%{text}" : undefined, xgap: 1, ygap: 1,
      customdata: names.map((row) => names.map((column) => [plain(row), plain(column)])),
      hovertemplate: "%{customdata[0]} predicted as %{customdata[1]}: %{text} images, %{z:.1f} %<extra></extra>",
      colorbar: beside("% of the class", colors),
    }],
    layout: {
      xaxis: { ...axis, title: { text: "predicted class" } },
      yaxis: { ...axis, title: { text: "class" }, autorange: "reversed", scaleanchor: "x" },
    },
  }));
}
