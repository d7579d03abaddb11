// Images in the order of a score, and of one kind or of all.
// data: { scores, kind, kinds, notes, sprite, columns, cell } as `tinyhall.explore.gallery` writes it; kind 0 is in support, and
// a note, where there are any, is printed on each image.

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
  data.notes.forEach((note, i) => make("b", { class: "th-note" }, tiles[i], note));
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  const update = () => {
    const [name, score] = data.scores[Number(by.value)], which = Number(only.value) - 1;
    const order = [...Array(n).keys()].filter((i) => which < 0 || data.kind[i] === which).sort((i, j) => score[j] - score[i]);
    grid.replaceChildren(...order.map((i) => tiles[i]));
    const wrong = (rows) => rows.filter((i) => data.kind[i] > 0).length, few = Math.min(FIRST, order.length);
    const kinds = (rows) => data.kinds.map((kind, k) => [rows.filter((i) => data.kind[i] === k).length, kind])
      .filter(([count]) => count).map(([count, kind]) => `${count} ${kind}`).join(", ") || "none";
    told.textContent = `${order.length} of ${n} images by ${name}, ${wrong(order)} of them hallucinated. ` +
      `The first ${few}: ${kinds(order.slice(0, FIRST))}. The last ${few}: ${kinds(order.slice(-FIRST))}.`;
    grid.setAttribute("aria-label", told.textContent);
  };
  for (const input of [by, only]) input.addEventListener("input", update);
  update();
}

export default { render };
