// Stands before every figure's module.

const SVG = "http://www.w3.org/2000/svg";

// One node of HTML or, with "svg:" before its tag, of SVG.
function make(tag, attributes = {}, parent = null, text = "") {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// A panel with axes: `across` and `up` give the place of a value, which is kept inside, and `line` a curve that takes points.
function panel(box, { title, width, height, x, y, xlabel, ylabel }) {
  const left = ylabel ? 34 : 8, bottom = 30, top = 8;
  const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "th-plot" }, box);
  make("svg:title", {}, svg, title);
  const inside = (v, [a, b]) => Math.min(Math.max(v, Math.min(a, b)), Math.max(a, b));
  const across = (v) => left + ((inside(v, x) - x[0]) / (x[1] - x[0])) * (width - left - 8);
  const up = (v) => height - bottom - ((inside(v, y) - y[0]) / (y[1] - y[0])) * (height - bottom - top);
  make("svg:rect", { x: left, y: top, width: width - left - 8, height: height - top - bottom, class: "th-frame" }, svg);
  for (const v of x) make("svg:text", { x: across(v), y: height - bottom + 13, "text-anchor": "middle", class: "th-text" }, svg, String(v));
  make("svg:text", { x: (width + left) / 2, y: height - 4, "text-anchor": "middle", class: "th-text" }, svg, xlabel);
  if (ylabel) {
    for (const v of y) make("svg:text", { x: left - 4, y: up(v) + 4, "text-anchor": "end", class: "th-text" }, svg, String(v));
    make("svg:text", { x: 10, y: height / 2, transform: `rotate(-90 10 ${height / 2})`, "text-anchor": "middle", class: "th-text" }, svg, ylabel);
  }
  const line = (name) => {
    const node = make("svg:polyline", { class: name }, svg);
    return (points) => node.setAttribute("points", points.map(([a, b]) => `${across(a).toFixed(1)},${up(b).toFixed(1)}`).join(" "));
  };
  return { svg, across, up, line };
}

// Numbers that came as base64: 16 bits each, evenly spaced over [low, high].
function bytes(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
}

function levels({ packed, low, high }) {
  return Float32Array.from(new Uint16Array(bytes(packed)), (v) => low + (v / 65535) * (high - low));
}

// Image i of a sheet.
function tile(parent, data, i, bad = false) {
  const node = make("span", { class: bad ? "th-tile th-is-bad" : "th-tile" }, parent);
  const x = (i % data.columns) * data.cell, y = Math.floor(i / data.columns) * data.cell;
  node.style.cssText = `width:${data.cell}px;height:${data.cell}px;background:url(${data.sprite}) -${x}px -${y}px;`;
  return node;
}

function choice(parent, name, options) {
  const label = make("label", { class: "th-choice" }, parent, `${name} `);
  const select = make("select", { "aria-label": name }, label);
  options.forEach((option, i) => make("option", { value: i }, select, option));
  return select;
}

function slider(parent, name, { min, max, step, value }) {
  const label = make("label", { class: "th-slider" }, parent);
  make("span", {}, label, name);
  const input = make("input", { type: "range", min, max, step }, label);
  input.value = value;
  return input;
}

// A button that moves a slider on by itself, and stops at its end.
function player(parent, input, update, rest, el) {
  const button = make("button", { type: "button", class: "th-button" }, parent, "Play");
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  };
  const start = () => {
    if (input.value === input.max) input.value = input.min;
    button.textContent = "Pause";
    clearInterval(timer);  // whoever starts it again: one timer, which Pause stops
    timer = setInterval(() => {
      input.value = Number(input.value) + 1;
      update();
      if (input.value === input.max || !el.isConnected) stop();
    }, rest);
  };
  button.addEventListener("click", () => (timer ? stop() : start()));
  input.addEventListener("input", () => { stop(); update(); });
  return { start, stop };
}
