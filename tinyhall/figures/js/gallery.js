// Images in the order of a score, and of one kind or of all.
// data: { scores, kind, kinds, sprite, columns, cell } as `tinyhall.explore.gallery` writes it; kind 0 is in support.

const FIRST = 12;

function render({ model, el }) {
  const data = model.get("data");
  const names = data.scores.map(([name]) => name), n = data.kind.length;
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);
  const bar = make("div", { class: "th-row" }, box);
  const by = choice(bar, "sorted by", names);
  const only = choice(bar, "shown", ["all", ...data.kinds]);
  make("p", { class: "th-key" }, box, "Highest score first. Solid frame: in support. Dashed: hallucinated.");
  const grid = make("div", { class: "th-gallery", role: "img" }, box);
  const tiles = data.kind.map((kind, i) => tile(grid, data, i, kind > 0));
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  const update = () => {
    const [name, score] = data.scores[Number(by.value)], which = Number(only.value) - 1;
    const order = [...Array(n).keys()].filter((i) => which < 0 || data.kind[i] === which).sort((i, j) => score[j] - score[i]);
    grid.replaceChildren(...order.map((i) => tiles[i]));
    const wrong = (rows) => rows.filter((i) => data.kind[i] > 0).length;
    told.textContent = `${order.length} of ${n} images by ${name}: ${wrong(order.slice(0, FIRST))} of the first ` +
      `${Math.min(FIRST, order.length)} are hallucinated, ${wrong(order)} of all shown`;
    grid.setAttribute("aria-label", told.textContent);
  };
  for (const input of [by, only]) input.addEventListener("input", update);
  update();
}

export default { render };
