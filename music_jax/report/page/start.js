"use strict";
// Shared by the scripts: the page's data and theme, text, and elements.

const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

// Decompresses a text of the page.
async function inflated(id) {
  const bytes = Uint8Array.from(atob($(`#${id}`).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const KINDS = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array, i4: Int32Array, f4: Float32Array,
};

// Unpacks an array from Python; `at(i, j, ...)` reads an element.
function unpacked({ type, shape, base64 }) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const values = new KINDS[type](bytes.buffer);
  const strides = shape.map((_, d) => shape.slice(d + 1).reduce((a, b) => a * b, 1));
  return { values, shape, at: (...index) => values[index.reduce((sum, i, d) => sum + i * strides[d], 0)] };
}

function isPacked(value) {
  return value !== null && typeof value === "object" && "base64" in value && "shape" in value;
}

function unpackedAll(value) {
  if (isPacked(value)) return unpacked(value);
  if (Array.isArray(value)) return value.map(unpackedAll);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, unpackedAll(inner)]));
}

// Escapes text for Plotly, which interprets some tags.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function make(tag, { text, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

function fill(select, options, chosen) {
  select.replaceChildren(
    ...options.map(([value, text]) => make("option", { value, text, selected: value === chosen })),
  );
}

function shown(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
  return text.replaceAll("-", "−");
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function isDark() {
  return document.documentElement.dataset.theme === "dark";
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  const button = $("#theme");
  button.textContent = dark ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to the ${dark ? "light" : "dark"} theme`);
  button.setAttribute("aria-pressed", String(dark));
  colorRuns();
  redrawAll();
}

// Prints in the light theme, with the charts as wide as the paper.
function followPrinting() {
  let dark = false;
  addEventListener("beforeprint", () => {
    dark = isDark();
    document.body.classList.add("printing");
    charts.forEach((entry, element) => entry.drawn || draw(element, entry));
    setTheme(false);
  });
  addEventListener("afterprint", () => {
    document.body.classList.remove("printing");
    setTheme(dark);
    for (const element of charts.keys()) Plotly.Plots.resize(element);
  });
}

// Sorts the rows of a table by a column when the button in its head is pressed.
function makeSortable(table) {
  const heads = $$("thead th", table);
  heads.forEach((head, column) => {
    $("button", head).addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const value = (row) => row.children[column].dataset.value;
      const sorted = $$("tbody tr", table).sort((a, b) => {
        const [x, y] = descending ? [value(b), value(a)] : [value(a), value(b)];
        if (!value(a) || !value(b)) return !value(a) - !value(b); // missing values last
        return column ? x - y : x.localeCompare(y, "en", { numeric: true });
      });
      $("tbody", table).append(...sorted);
    });
  });
}

function followTheme() {
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  setTheme(preferred.matches);
  preferred.addEventListener("change", (event) => setTheme(event.matches));
  $("#theme").addEventListener("click", () => setTheme(!isDark()));
}
