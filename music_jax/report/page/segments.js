// Draws the joint probability of the segments, the usage of their units, and the units' images.

function drawSegments(run, panel) {
  const found = run.segments;
  const { joint, count, units } = found;
  const state = { a: joint.shown[0], b: joint.shown[1] };
  const selects = [$("[data-joint-a]", panel), $("[data-joint-b]", panel)];
  selects.forEach((select, i) => fill(select, joint.shown.map((s) => [String(s), String(s)]), String(i ? state.b : state.a)));
  const figures = ["whole", "block", "information"].map((name) => $(`[data-joint-${name}]`, panel));
  if (joint.shown.length < count) {
    $("[data-joint-note]", panel).textContent = `(${joint.shown.length} of ${count}, the most informative)`;
  }
  const side = joint.shown.length * units;
  const whole = rows(joint.levels.values, side, side);

  function choose(a, b) {
    if (!joint.shown.includes(a) || !joint.shown.includes(b)) return;
    Object.assign(state, { a, b });
    selects[0].value = String(a);
    selects[1].value = String(b);
    describe();
    figures.forEach(redraw);
  }
  function describe() {
    const information = found.information.at(state.a, state.b);
    $("[data-joint-title]", panel).textContent = state.a === state.b ? `Segment ${state.a} with itself` : `Segments ${state.a} and ${state.b}`;
    $("[data-joint-text]", panel).textContent =
      state.a === state.b
        ? `Segment ${state.a} with itself: both views select the same unit for ${percent(agreement(state.a))} of the pairs.`
        : `Segments ${state.a} and ${state.b} share ${shown(information)} of at most ${shown(Math.min(found.entropy[state.a], found.entropy[state.b]))} nats.`;
  }
  function ratio(level) {
    return 10 ** (joint.low + (level / 255) * (joint.high - joint.low));
  }
  function agreement(segment) {
    const start = joint.shown.indexOf(segment) * units;
    let sum = 0;
    for (let k = 0; k < units; k++) sum += ratio(joint.levels.at(start + k, start + k)) / units ** 2;
    return Math.min(sum, 1);
  }
  function hovered(rowsOf, columnsOf) {
    return ({ points: [point] }) => {
      const [i, j] = [point.y, point.x].map(Math.round);
      const [s, k] = rowsOf(i);
      const [t, l] = columnsOf(j);
      const times = ratio(joint.levels.at(joint.shown.indexOf(s) * units + k, joint.shown.indexOf(t) * units + l));
      const least = times <= 10 ** joint.low * 1.001 ? "at most " : "";
      $("[data-joint-hover]", panel).textContent =
        `segment ${s}, unit ${k} with segment ${t}, unit ${l}: ${least}${shown(times)} × independence, P = ${least}${shown(times / units ** 2)}`;
    };
  }
  const bar = (colors) => ({
    ...beneath(colors), ...scaleTicks(joint),
  });
  const scale = { colorscale: "Viridis", zmin: 0, zmax: 255, hoverinfo: "none", type: "heatmap" };
  const square = { scaleanchor: "x", autorange: "reversed", constrain: "domain", showgrid: false, zeroline: false };
  const inWhole = (i) => [joint.shown[Math.floor(i / units)], i % units];

  chart(figures[0], (colors) => {
    const [x, y] = [joint.shown.indexOf(state.b) * units - 0.5, joint.shown.indexOf(state.a) * units - 0.5];
    const every = Math.ceil(joint.shown.length / 8);
    const ticks = joint.shown.map((s, i) => [i * units + (units - 1) / 2, String(s)]).filter((_, i) => i % every === 0);
    const axis = { showgrid: false, zeroline: false, tickvals: ticks.map((t) => t[0]), ticktext: ticks.map((t) => t[1]), constrain: "domain" };
    return {
      data: [{ ...scale, z: whole, colorbar: bar(colors) }],
      layout: {
        margin: { l: 50, r: 8, t: 8, b: 86 },
        xaxis: { ...axis, title: { text: "segment of view 2" } },
        yaxis: { ...square, ...axis, title: { text: "segment of view 1" } },
        shapes: [{ type: "rect", x0: x, x1: x + units, y0: y, y1: y + units, line: { color: "#ff3b30", width: 2 } }],
      },
      alt: `Heat map of the joint probability of ${side} units in ${joint.shown.length} segments, relative to independence, over ${joint.pairs} pairs of views.`,
    };
  }, {
    plotly_click: ({ points: [point] }) => choose(inWhole(Math.round(point.y))[0], inWhole(Math.round(point.x))[0]),
    plotly_hover: hovered(inWhole, inWhole),
  });
  chart(figures[1], (colors) => {
    const [i, j] = [joint.shown.indexOf(state.a) * units, joint.shown.indexOf(state.b) * units];
    const z = Array.from({ length: units }, (_, k) => whole[i + k].subarray(j, j + units));
    const axis = { showgrid: false, zeroline: false, constrain: "domain", dtick: Math.max(1, Math.ceil(units / 8)) };
    return {
      data: [{ ...scale, z, colorbar: bar(colors), xgap: units <= 32 ? 1 : 0, ygap: units <= 32 ? 1 : 0 }],
      layout: {
        margin: { l: 50, r: 8, t: 8, b: 86 },
        xaxis: { ...axis, title: { text: `unit of segment ${state.b}, view 2` } },
        yaxis: { ...square, ...axis, title: { text: `unit of segment ${state.a}, view 1` } },
      },
      alt: `Heat map of the ${units} by ${units} units of segments ${state.a} and ${state.b}.`,
    };
  }, { plotly_hover: hovered((k) => [state.a, k], (l) => [state.b, l]) });
  chart(figures[2], (colors) => {
    const z = rows(found.information.values, count, count).map((row, s) => Array.from(row, (v, t) => (s === t ? null : v)));
    const axis = { showgrid: false, zeroline: false, constrain: "domain", dtick: Math.max(1, Math.ceil(count / 8)) };
    return {
      data: [{
        type: "heatmap", z, colorscale: "Cividis", hovertemplate: "segments %{y} and %{x}: %{z:.3f} nats<extra></extra>",
        colorbar: beneath(colors),
      }],
      layout: {
        margin: { l: 50, r: 8, t: 8, b: 86 },
        xaxis: { ...axis, title: { text: "segment" } },
        yaxis: { ...square, ...axis, title: { text: "segment" } },
      },
      alt: `Heat map of the mutual information between ${count} segments, in nats.`,
    };
  }, { plotly_click: ({ points: [point] }) => choose(point.y, point.x) });
  selects.forEach((select) => select.addEventListener("change", () => choose(Number(selects[0].value), Number(selects[1].value))));
  describe();
}

function scaleTicks({ low, high }) {
  const ratios = [0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300].filter((r) => Math.log10(r) <= high + 1e-9 && Math.log10(r) >= low - 1e-9);
  return {
    tickvals: ratios.map((r) => (255 * (Math.log10(r) - low)) / (high - low)),
    ticktext: ratios.map((r, i) => (i === 0 ? `≤${r}` : String(r))),
  };
}

function drawUnits(run, panel) {
  const found = run.segments;
  const { count, units } = found;
  const select = $("[data-segment]", panel);
  const state = { segment: found.order[0] };
  fill(select, found.order.map((s) => [String(s), segmentName(found, s)]), String(state.segment));
  const [all, one] = [$("[data-usage]", panel), $("[data-usage-one]", panel)];

  function choose(segment) {
    if (!(segment >= 0 && segment < count)) return;
    state.segment = segment;
    select.value = String(segment);
    show();
    [all, one].forEach(redraw);
  }
  function show() {
    const s = state.segment;
    const dead = Array.from({ length: units }, (_, k) => found.counts.at(s, k)).filter((n) => n === 0).length;
    const nmi = found.labelNmi ? `; normalized mutual information with the labels ${shown(found.labelNmi[s])}` : "";
    $("[data-segment-text]", panel).textContent =
      `Segment ${s}: usage entropy ${shown(found.entropy[s])} of ${shown(Math.log(units))} nats, ` +
      `mean certainty ${percent(found.confidence[s])}, ${shown(found.told[s])} nats told about the image, ${dead} of ${units} units without images${nmi}.`;
    $("[data-usage-title]", panel).textContent = `Usage in segment ${s}`;
    $("[data-gallery]", panel).replaceChildren(...unitCards(run, s));
  }
  chart(all, (colors) => ({
    data: [{
      type: "heatmap", z: rows(found.usage.values, count, units).map((row) => Array.from(row, (v) => v * units)),
      colorscale: "Viridis", zmin: 0, hovertemplate: "segment %{y}, unit %{x}: %{z:.2f} × equal use<extra></extra>",
      colorbar: beside("× equal use", colors),
    }],
    layout: {
      xaxis: { title: { text: "unit" }, showgrid: false, zeroline: false, dtick: Math.max(1, Math.ceil(units / 8)) },
      yaxis: { title: { text: "segment" }, autorange: "reversed", showgrid: false, zeroline: false, dtick: Math.max(1, Math.ceil(count / 8)) },
      shapes: [{ type: "rect", x0: -0.5, x1: units - 0.5, y0: state.segment - 0.5, y1: state.segment + 0.5, line: { color: "#ff3b30", width: 2 } }],
    },
    alt: `Heat map of how often each of ${count} segments uses each of its ${units} units; 1 is equal use.`,
  }), { plotly_click: ({ points: [point] }) => choose(point.y) });
  chart(one, (colors) => ({
    data: [{
      type: "bar", x: Array.from({ length: units }, (_, k) => k),
      y: Array.from({ length: units }, (_, k) => 100 * found.usage.at(state.segment, k)),
      marker: { color: colors.accent }, hovertemplate: "unit %{x}: %{y:.2f} %<extra></extra>",
    }],
    layout: {
      bargap: 0.25,
      xaxis: { title: { text: "unit" }, dtick: Math.max(1, Math.ceil(units / 16)), showgrid: false },
      yaxis: { title: { text: "%" }, rangemode: "tozero" },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 100 / units, y1: 100 / units, line: { color: colors.bad, width: 1.5, dash: "dash" } }],
      annotations: [{ xref: "paper", x: 1, y: 100 / units, xanchor: "right", yanchor: "bottom", showarrow: false, text: "equal", bgcolor: colors.back, font: { color: colors.bad, size: 12 } }],
    },
    alt: `Bar chart of the usage of the ${units} units of segment ${state.segment}, in percent; equal use is ${shown(100 / units)} %.`,
  }));
  select.addEventListener("change", () => choose(Number(select.value)));
  for (const button of $$("[data-segment-step]", panel)) {
    button.addEventListener("click", () => {
      const place = found.order.indexOf(state.segment) + Number(button.dataset.segmentStep);
      choose(found.order[(place + count) % count]);
    });
  }
  show();
}

// Shows the three most informative segments: of each some units, the most used ones first.
function drawStrips(run, panel) {
  const { order, units, counts, top } = run.segments;
  const strips = order.slice(0, 3).map((segment) => {
    const used = Array.from({ length: units }, (_, k) => k)
      .filter((k) => counts.at(segment, k))
      .sort((a, b) => counts.at(segment, b) - counts.at(segment, a));
    const columns = used.slice(0, 7).map((unit) => {
      const column = make("div");
      for (let rank = 0; rank < Math.min(3, top.shape[2]) && top.at(segment, unit, rank) !== 65535; rank++) {
        column.append(thumb(run, top.at(segment, unit, rank), 44));
      }
      column.prepend(make("div", { text: unit }));
      return column;
    });
    const title = make("p", { className: "title" }, make("strong", { text: `Segment ${segmentName(run.segments, segment)}` }));
    title.append(` ${units} units`);
    return make("div", { className: "strip" }, title, make("div", { className: "unit-columns" }, ...columns));
  });
  $("[data-strips]", panel).replaceChildren(...strips);
}

function segmentName(found, segment) {
  return found.labelNmi ? `${segment} (labels: NMI ${shown(found.labelNmi[segment], 2)})` : String(segment);
}

function unitCards(run, segment) {
  const { units, counts, top, certainty, codes } = run.segments;
  const { labels, count } = run.images;
  const kinds = Array.from({ length: units }, () => new Map());
  for (let i = 0; i < count; i++) {
    const label = labels.at(i);
    if (label < 0) continue;
    const kind = kinds[codes.at(i, segment)];
    kind.set(label, (kind.get(label) ?? 0) + 1);
  }
  return Array.from({ length: units }, (_, k) => {
    const members = counts.at(segment, k);
    const title = make("div", { className: "title", text: `unit ${k} ` });
    const [label, most] = [...kinds[k]].sort((a, b) => b[1] - a[1])[0] ?? [];
    const mostly = label === undefined ? "" : `, mostly ${className(run, label)} (${Math.round((100 * most) / members)} %)`;
    title.append(make("span", { text: members ? `${percent(members / count)}${mostly}` : "no image" }));
    const thumbs = make("div", { className: "thumbs" });
    for (let rank = 0; rank < top.shape[2]; rank++) {
      const image = top.at(segment, k, rank);
      if (image === 65535) break;
      const sure = `, certainty ${percent(certainty.at(segment, k, rank) / 255)}`;
      thumbs.append(thumb(run, image, 52, { more: sure, onClick: () => showNeighbors(run, image) }));
    }
    return make("div", { className: "unit" }, title, thumbs);
  });
}
