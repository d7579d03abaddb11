// Points of the plane under a brush: where they went, and how long the prediction of them kept moving.
// data: { x, paths, t, bad, scores, label, modes, support, low, high, start } as `tinyhall.explore.brush` writes it; t falls.

const DRAWN = 60; // trajectories shown at a time

function render({ model, el }) {
  const data = model.get("data");
  const n = data.bad.length, k = data.t.length, range = [data.low, data.high];
  const x = levels(data.x), paths = levels(data.paths);
  const at = (i, m) => [paths[2 * (i * k + m)], paths[2 * (i * k + m) + 1]];
  const moved = (i) => data.t.map((_, m) => Math.hypot(at(i, m)[0] - at(i, k - 1)[0], at(i, m)[1] - at(i, k - 1)[1]));
  const far = Math.max(...data.bad.map((_, i) => Math.max(...moved(i))));
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);
  const row = make("div", { class: "th-row" }, box);
  const plane = panel(row, { title: "Samples in the plane, hallucinated ones marked, and a square brush.", width: 340, height: 340, x: range, y: range, xlabel: "x", ylabel: "y" });
  const time = panel(row, { title: "Distance of the predicted x0 from the finished sample, for the samples under the brush.", width: 340, height: 340, x: [data.t[0], data.t[k - 1]], y: [0, Math.ceil(far * 10) / 10], xlabel: "t", ylabel: "x0 predicted, from its end" });
  for (const [a, b] of data.modes) make("svg:circle", { cx: plane.across(a), cy: plane.up(b), r: plane.across(data.support) - plane.across(0), class: "th-mode", fill: "none" }, plane.svg);
  const dots = data.bad.map((bad, i) => make("svg:circle", { cx: plane.across(x[2 * i]), cy: plane.up(x[2 * i + 1]), r: 3, class: bad ? "th-bad" : "th-good" }, plane.svg));
  const frame = make("svg:rect", { class: "th-line th-brush" }, plane.svg);
  const either = (where) => Array.from({ length: DRAWN }, () => [where.line("th-trail th-trail-good"), where.line("th-trail th-trail-bad")]);
  const trails = either(plane), curves = either(time);
  make("p", { class: "th-key" }, box, "Drag on the left, or move the sliders. Lines: the predicted x0 of the samples under the brush, on its way to where they ended; green in support, orange and dashed hallucinated.");
  const [low, high] = range, places = { min: low, max: high, step: 0.05 };
  const across = slider(box, "brush, across", { ...places, value: data.start[0] });
  const up = slider(box, "brush, up", { ...places, value: data.start[1] });
  const size = slider(box, "brush, size", { min: 0.05, max: 1, step: 0.05, value: 0.2 });
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  const middle = (values) => (values.length ? `10^${[...values].sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)].toFixed(1)}` : "-");

  const update = () => {
    const [a, b, r] = [across, up, size].map((input) => Number(input.value));
    const under = [...Array(n).keys()].filter((i) => Math.abs(x[2 * i] - a) <= r && Math.abs(x[2 * i + 1] - b) <= r);
    const left = plane.across(a - r), top = plane.up(b + r);
    for (const [name, value] of Object.entries({ x: left, y: top, width: plane.across(a + r) - left, height: plane.up(b - r) - top })) frame.setAttribute(name, value);
    dots.forEach((dot) => dot.classList.remove("th-picked"));
    under.forEach((i) => dots[i].classList.add("th-picked"));
    // Hallucinated ones first, where there are more than fit.
    const shown = [...under].sort((i, j) => Number(data.bad[j]) - Number(data.bad[i])).slice(0, DRAWN);
    for (let s = 0; s < DRAWN; s += 1) {
      const i = shown[s], there = i !== undefined;
      const trail = there ? data.t.map((_, m) => at(i, m)) : [], line = there ? moved(i).map((d, m) => [data.t[m], d]) : [];
      [false, true].forEach((bad, which) => {
        trails[s][which](there && data.bad[i] === bad ? trail : []);
        curves[s][which](there && data.bad[i] === bad ? line : []);
      });
    }
    told.textContent = `brush at (${a.toFixed(2)}, ${b.toFixed(2)}) and ${r.toFixed(2)} around: ${under.length} of ${n} samples, ` +
      `${under.filter((i) => data.bad[i]).length} hallucinated; median ${data.label}: ${middle(under.map((i) => data.scores[i]))}, of all: ${middle(data.scores)}`;
  };
  const drag = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const corner = plane.svg.getBoundingClientRect(), scale = plane.svg.viewBox.baseVal.width / corner.width;
    const [px, py] = [(event.clientX - corner.left) * scale, (event.clientY - corner.top) * scale];
    // The panel's own scale, turned round.
    const [x0, x1, y0, y1] = [plane.across(low), plane.across(high), plane.up(low), plane.up(high)];
    across.value = low + ((px - x0) / (x1 - x0)) * (high - low);
    up.value = low + ((py - y0) / (y1 - y0)) * (high - low);
    update();
  };
  for (const kind of ["pointerdown", "pointermove"]) plane.svg.addEventListener(kind, drag);
  for (const input of [across, up, size]) input.addEventListener("input", update);
  update();
}

export default { render };
