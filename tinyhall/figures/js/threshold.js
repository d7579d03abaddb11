// A threshold on a score, moved by hand: what it removes, what it keeps, and what goes.
// data: { scores, bad, label, start, thumbs, sprite, columns, cell } as `tinyhall.explore.threshold` writes it.

const percent = (k, n) => (n ? `${((100 * k) / n).toFixed(1)}%` : "-");

function histogram(box, data, bins, low, high) {
  const width = 440, height = 150, base = height - 24;
  const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "th-plot" }, box);
  make("svg:title", {}, svg, `Distribution of the ${data.label}, hallucinated and in support; a line marks the threshold.`);
  const place = (value) => ((value - low) / (high - low)) * width;
  const shapes = [false, true].map((bad) => {
    const counts = new Array(bins).fill(0);
    data.scores.forEach((s, i) => {
      if (data.bad[i] === bad) counts[Math.min(bins - 1, Math.floor(((s - low) / (high - low)) * bins))] += 1;
    });
    const total = counts.reduce((a, b) => a + b, 0) || 1;
    return counts.map((k) => k / total);
  });
  const top = Math.max(...shapes.flat());
  shapes.forEach((shape, which) => {
    const corners = shape.flatMap((v, i) => [`${(i / bins) * width},${base - (v / top) * (base - 6)}`, `${((i + 1) / bins) * width},${base - (v / top) * (base - 6)}`]);
    make("svg:polygon", { points: `0,${base} ${corners.join(" ")} ${width},${base}`, class: which ? "th-bad" : "th-good" }, svg);
  });
  make("svg:line", { x1: 0, x2: width, y1: base, y2: base, class: "th-axis" }, svg);
  make("svg:text", { x: 0, y: height - 6, class: "th-text" }, svg, low.toFixed(1));
  make("svg:text", { x: width, y: height - 6, "text-anchor": "end", class: "th-text" }, svg, high.toFixed(1));
  make("svg:text", { x: width / 2, y: height - 6, "text-anchor": "middle", class: "th-text" }, svg, `log10 of the ${data.label}`);
  const line = make("svg:line", { y1: 0, y2: base, class: "th-line" }, svg);
  return (threshold) => ["x1", "x2"].forEach((end) => line.setAttribute(end, place(threshold)));
}

function roc(box, data, order) {
  const size = 150, pad = 14;
  const svg = make("svg:svg", { viewBox: `0 0 ${size + 20} ${size + 20}`, role: "img", class: "th-plot th-roc" }, box);
  make("svg:title", {}, svg, "Share of hallucinated samples removed against share of in-support samples lost; a dot marks the threshold.");
  const at = (lost, removed) => [pad + lost * size, 4 + (1 - removed) * size];
  const total = [data.bad.filter((b) => !b).length, data.bad.filter((b) => b).length];
  const gone = [0, 0];
  const points = [at(0, 0)];
  for (let i = order.length - 1; i >= 0; i -= 1) {
    gone[+data.bad[order[i]]] += 1;
    points.push(at(gone[0] / total[0], gone[1] / total[1]));
  }
  make("svg:polyline", { points: points.map((p) => p.join(",")).join(" "), class: "th-curve" }, svg);
  make("svg:rect", { x: pad, y: 4, width: size, height: size, class: "th-frame" }, svg);
  make("svg:text", { x: pad + size / 2, y: size + 17, "text-anchor": "middle", class: "th-text" }, svg, "in support, lost");
  make("svg:text", { x: 9, y: 4 + size / 2, transform: `rotate(-90 9 ${4 + size / 2})`, "text-anchor": "middle", class: "th-text" }, svg, "removed");
  const dot = make("svg:circle", { r: 4, class: "th-dot" }, svg);
  return (lost, removed) => {
    const [x, y] = at(lost, removed);
    dot.setAttribute("cx", x);
    dot.setAttribute("cy", y);
  };
}

function gallery(box, data) {
  if (!data.thumbs.length) return () => {};
  make("p", { class: "th-key" }, box, "Lowest score first. Solid frame: in support. Dashed: hallucinated. Faded: removed.");
  const grid = make("div", { class: "th-gallery", role: "img" }, box);
  const tiles = data.thumbs.map((row, i) => [tile(grid, data, i, data.bad[row]), row]);
  return (threshold) => {
    let removed = 0;
    for (const [node, row] of tiles) {
      const out = data.scores[row] >= threshold;
      removed += out;
      node.classList.toggle("th-removed", out);
    }
    grid.setAttribute("aria-label", `${tiles.length} samples, lowest score first; the last ${removed} are removed.`);
  };
}

function render({ model, el }) {
  const data = model.get("data");
  const order = data.scores.map((_, i) => i).sort((a, b) => data.scores[a] - data.scores[b]);
  const low = data.scores[order[0]], high = data.scores[order[order.length - 1]];
  const total = [data.bad.filter((b) => !b).length, data.bad.filter((b) => b).length];
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);
  const plots = make("div", { class: "th-row" }, box);
  const mark = histogram(plots, data, 60, low, high);
  const point = roc(plots, data, order);
  make("p", { class: "th-key" }, box, `Green: ${total[0]} in support. Orange: ${total[1]} hallucinated. Either has the same area, however many they are.`);
  // One stop for every sample, so that each move of the slider changes something.
  const at = slider(box, `threshold on the ${data.label}`, { min: 0, max: order.length, step: 1, value: data.start });
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  const show = gallery(box, data);
  const update = () => {
    const rank = Number(at.value);
    const threshold = rank < order.length ? data.scores[order[rank]] : Infinity;
    const gone = [0, 0];
    data.scores.forEach((s, i) => { if (s >= threshold) gone[+data.bad[i]] += 1; });
    mark(Math.min(threshold, high));
    point(gone[0] / (total[0] || 1), gone[1] / (total[1] || 1));
    show(threshold);
    told.textContent = `removed: ${gone[1]} of ${total[1]} hallucinated (${percent(gone[1], total[1])}); ` +
      `kept: ${total[0] - gone[0]} of ${total[0]} in support (${percent(total[0] - gone[0], total[0])})`;
    at.setAttribute("aria-valuetext", told.textContent);
  };
  at.addEventListener("input", update);
  update();
}

export default { render };
