// Draws charts with Plotly: colors by theme, each chart when it becomes visible.

const RUN_COLORS = {
  light: ["#0b5cad", "#c2410c", "#00796b", "#8e24aa", "#8a6d00", "#455a64", "#ad1457", "#5d4037"],
  dark: ["#7db8f5", "#ff9e64", "#4fd1b5", "#d59bf6", "#f2cf63", "#b0bec5", "#ff8fb1", "#c8ab9b"],
};
const DASHES = ["solid", "dot", "dashdot", "longdash", "longdashdot"]; // a bound is dashed
// Groups differ in their symbols besides their colors.
const GROUP_COLORS = {
  light: ["#1f5fa8", "#c2410c", "#117733", "#aa3377", "#8a6d00", "#4a35a8", "#00838f", "#7d1f4f", "#616161", "#b71c1c"],
  dark: ["#7db8f5", "#ff9e64", "#6fd08c", "#f49ac2", "#e6c84f", "#b3a5ff", "#5ed3dd", "#d98cb3", "#bdbdbd", "#ff7b72"],
};
const SYMBOLS = [
  "circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star", "hexagon", "pentagon",
];

const charts = new Map();
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const entry = charts.get(target);
      if (isIntersecting && !entry.drawn) draw(target, entry);
    }
  },
  { rootMargin: "300px" },
);

function runColor(index) {
  const colors = RUN_COLORS[isDark() ? "dark" : "light"];
  return colors[index % colors.length];
}

function runDash(index) {
  return DASHES[index % DASHES.length];
}

function groupColor(index) {
  const colors = GROUP_COLORS[isDark() ? "dark" : "light"];
  return colors[index % colors.length];
}

function colorRuns() {
  for (const swatch of $$("[data-run-color]")) swatch.style.background = runColor(Number(swatch.dataset.runColor));
  for (const line of $$("[data-run-line]")) {
    const index = Number(line.dataset.runLine);
    const style = { solid: "solid", dot: "dotted" }[runDash(index)] ?? "dashed";
    line.style.borderTop = `3px ${style} ${runColor(index)}`;
  }
}

function themed() {
  const styles = getComputedStyle(document.documentElement);
  const color = (name) => styles.getPropertyValue(`--${name}`).trim();
  return {
    text: color("text"), muted: color("muted"), border: color("border"), back: color("back"),
    surface: color("surface"), accent: color("accent"), bad: color("bad"), good: color("good"),
  };
}

// Registers a chart: `build(colors)` returns traces and layout; `on` holds handlers of Plotly's events.
function chart(element, build, on = {}) {
  charts.set(element, { build, on, drawn: false });
  watcher.observe(element);
}

function draw(element, entry) {
  const colors = themed();
  const touch = matchMedia("(pointer: coarse)").matches;
  const { data, layout = {}, alt } = entry.build(colors);
  const axis = {
    gridcolor: colors.border, zerolinecolor: colors.border, linecolor: colors.muted,
    tickcolor: colors.muted, ticks: "outside", ticklen: 4, automargin: true,
  };
  const merged = {
    margin: { l: 50, r: 14, t: 14, b: 42 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", size: 13, color: colors.text },
    hoverlabel: { bgcolor: colors.surface, bordercolor: colors.muted, font: { color: colors.text } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colors.muted, activecolor: colors.accent },
    showlegend: false,
    // On a touch screen, dragging over a chart scrolls the page.
    dragmode: touch ? false : "zoom",
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
  // On paper there is no event of a new size that a chart could follow.
  if (document.body.classList.contains("printing")) Object.assign(merged, { width: element.clientWidth, height: element.clientHeight });
  const options = {
    displaylogo: false, responsive: true, plotlyServerURL: "",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };
  if (touch) merged.margin = { ...merged.margin, t: merged.margin.t + 26 }; // for the buttons, which are always visible there
  if (alt) element.setAttribute("aria-label", alt);
  Plotly.react(element, data, merged, options);
  element.setAttribute("role", "group"); // it has buttons; its label describes the drawing
  for (const drawing of $$(".main-svg", element)) drawing.setAttribute("aria-hidden", "true");
  if (!entry.drawn) {
    entry.drawn = true;
    for (const [name, handler] of Object.entries(entry.on)) element.on(name, handler);
  }
}

function redraw(element) {
  const entry = charts.get(element);
  if (entry?.drawn) draw(element, entry);
}

function redrawAll() {
  for (const element of charts.keys()) redraw(element);
}

// Color bars below and beside a chart.
function beneath(colors) {
  return {
    orientation: "h", y: 0, yref: "container", yanchor: "bottom", x: 0.5, len: 0.9, thickness: 10, outlinewidth: 0,
    tickfont: { color: colors.text, size: 11 },
  };
}

function beside(text, colors) {
  return {
    title: { text, side: "right", font: { size: 12 } }, thickness: 12, outlinewidth: 0, tickfont: { color: colors.text },
  };
}

// Splits a flat array into rows for Plotly.
function rows(values, height, width) {
  return Array.from({ length: height }, (_, i) => values.subarray(i * width, (i + 1) * width));
}
