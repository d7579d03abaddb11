// One generation after another, in all arms at once.
// data: { arms, figures, bad, total, each, sprite, columns, cell } as `tinyhall.explore.generations` writes it.

function render({ model, el }) {
  const data = model.get("data");
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);
  const bar = make("div", { class: "th-slider" }, box);
  const at = slider(bar, "generation", { min: 1, max: data.total, step: 1, value: 1 });
  make("p", { class: "th-key" }, box, "Solid frame: in support. Dashed: hallucinated.");
  const rows = data.arms.map((arm) => {
    const told = make("p", { class: "th-key th-told" }, box);
    // Two lines, so that an image has its fellows in the other arms above and below it.
    const grid = make("div", { class: "th-gallery", role: "img" }, box);
    grid.style.maxWidth = `${Math.ceil(data.each / 2) * (data.cell + 7)}px`;
    return [arm, told, grid];
  });
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  const update = () => {
    const g = Number(at.value) - 1;
    const wrong = rows.map(([arm, line, grid], a) => {
      const row = a * data.total + g, first = row * data.each;
      line.textContent = `${arm}: ${data.figures[row]}`;
      grid.replaceChildren();
      for (let i = first; i < first + data.each; i += 1) tile(grid, data, i, data.bad[i]);
      const count = data.bad.slice(first, first + data.each).filter(Boolean).length;
      grid.setAttribute("aria-label", `${data.each} images, ${count} of them hallucinated`);
      return `${arm}, ${count} of ${data.each} hallucinated`;
    });
    told.textContent = `generation ${g + 1} of ${data.total}: ${wrong.join("; ")}`;
  };
  const { stop } = player(bar, at, update, 1200, el);
  update();
  return stop;
}

export default { render };
