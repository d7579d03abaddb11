// Ride the reverse process of points on a line: a slider and a button for time, a trace of the sample that is picked.
// data: { t, x, x0, bad, grid, exact, learned, modes, low, high } as `tinyhall.explore.ride` writes it; t falls.

function render({ model, el }) {
  const data = model.get("data");
  const n = data.x.length;
  const range = [data.low, data.high];
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);

  const states = panel(box, { title: "Samples on the line at time t, hallucinated ones marked.", width: 620, height: 150, x: range, y: [0, 1], xlabel: "x at time t" });
  data.modes.forEach((m) => make("svg:line", { x1: states.across(m), x2: states.across(m), y1: 8, y2: 120, class: "th-mode" }, states.svg));
  // A place of its own for each sample, up and down, so that they do not hide one another.
  const dots = data.x.map((_, i) => make("svg:circle", { r: 4, cy: states.up(((i * 0.618) % 1) * 0.9 + 0.05), class: data.bad[i] ? "th-bad th-pick" : "th-good th-pick" }, states.svg));
  const row = make("div", { class: "th-row" }, box);
  const guess = panel(row, { title: "Predicted x0 against x at time t: exact and learned.", width: 300, height: 220, x: range, y: range, xlabel: "x at time t", ylabel: "predicted x0" });
  const exact = guess.line("th-exact"), learned = guess.line("th-learned");
  const here = make("svg:circle", { r: 5, class: "th-dot" }, guess.svg);
  const trace = panel(row, { title: "Predicted x0 of the picked sample along the way.", width: 300, height: 220, x: [data.t[0], 0], y: range, xlabel: "t", ylabel: "predicted x0" });
  data.modes.forEach((m) => make("svg:line", { x1: trace.across(data.t[0]), x2: trace.across(0), y1: trace.up(m), y2: trace.up(m), class: "th-mode" }, trace.svg));
  const path = trace.line("th-curve");
  const now = make("svg:line", { y1: 8, y2: 190, class: "th-line" }, trace.svg);

  make("p", { class: "th-key" }, box, "Orange dots end as hallucinations. Curves: exact denoiser blue, learned dashed. Click on a dot to follow it.");
  const bar = make("div", { class: "th-slider" }, box);
  // It opens where something happens.
  const first = data.t.findIndex((t) => t <= 8);
  const time = slider(bar, "time, from noise to data", { min: 0, max: data.t.length - 1, step: 1, value: first });
  const told = make("output", { class: "th-told", "aria-live": "off" }, box);

  let picked = Math.max(data.bad.indexOf(true), 0);
  const update = () => {
    const k = Number(time.value);
    dots.forEach((dot, i) => {
      dot.setAttribute("cx", states.across(data.x[i][k]));
      dot.classList.toggle("th-picked", i === picked);
    });
    exact(data.grid.map((g, i) => [g, data.exact[k][i]]));
    learned(data.grid.map((g, i) => [g, data.learned[k][i]]));
    here.setAttribute("cx", guess.across(data.x[picked][k]));
    here.setAttribute("cy", guess.up(data.x0[picked][k]));
    path(data.t.map((t, i) => [t, data.x0[picked][i]]));
    ["x1", "x2"].forEach((end) => now.setAttribute(end, trace.across(data.t[k])));
    told.textContent = `t = ${data.t[k]}; sample ${picked + 1} of ${n}, which ends ${data.bad[picked] ? "as a hallucination" : "in support"}: ` +
      `x = ${data.x[picked][k].toFixed(2)}, predicted x0 = ${data.x0[picked][k].toFixed(2)}`;
    time.setAttribute("aria-valuetext", told.textContent);
  };
  const { stop } = player(bar, time, update, 120, el);
  const next = make("button", { type: "button", class: "th-button" }, bar, "Pick another");
  next.addEventListener("click", () => { picked = (picked + 1) % n; update(); });
  dots.forEach((dot, i) => dot.addEventListener("click", () => { picked = i; update(); }));
  update();
  return stop;
}

export default { render };
