// One generation after another, in all arms of a recursion at once, for the data of the reader's choice.
// data: { sets: [{ name, arms, each, depth, bad, figures, and either points, modes, support or sprite, columns, cell }] } as
// `tinyhall.explore.generations` writes it.

const GOOD = "#009E73", FALSE = "#D55E00";

// Points of the plane as dots of two paths, over rings that bound what is in support.
function scatter(box, set, first) {
  const { low, high } = set.points, wide = high - low;
  const svg = make("svg:svg", { viewBox: `${low} ${low} ${wide} ${wide}`, "aria-hidden": "true", width: 300 }, box);
  svg.style.maxWidth = "100%";
  for (const [x, y] of set.modes) {
    const ring = { cx: x, cy: -y, r: set.support, fill: "none", stroke: "currentColor", "stroke-opacity": 0.5, "stroke-width": wide / 300 };
    make("svg:circle", ring, svg);
  }
  const dots = ["", ""];
  for (let i = first; i < first + set.each; i += 1)
    dots[set.bad[i]] += `M${set.at[2 * i].toFixed(3)} ${(-set.at[2 * i + 1]).toFixed(3)}h0`;
  dots.forEach((d, bad) => {
    make("svg:path", { d, stroke: bad ? FALSE : GOOD, "stroke-width": wide / (bad ? 85 : 120), "stroke-linecap": "round" }, svg);
  });
}

// Images of the sheet at twice their size, five to a line.
function tiles(box, set, first) {
  const side = 2 * set.cell;
  const grid = make("div", { class: "th-gallery" }, box);
  grid.style.maxWidth = `${5 * (side + 7)}px`;
  for (let i = first; i < first + set.each; i += 1) {
    const node = tile(grid, set, i, set.bad[i] === "1");
    node.style.width = node.style.height = `${side}px`;
    node.style.backgroundSize = `${set.columns * side}px auto`;
    node.style.backgroundPosition = `-${(i % set.columns) * side}px -${Math.floor(i / set.columns) * side}px`;
  }
}

function render({ model, el }) {
  const { sets } = model.get("data");
  for (const set of sets) if (set.points) set.at = levels(set.points);
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);
  const bar = make("div", { class: "th-slider" }, box);
  const which = choice(bar, "data", sets.map((set) => set.name));
  const at = slider(bar, "generation", { min: 1, max: sets[0].depth[0], step: 1, value: 1 });
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  const arms = make("div", { class: "th-row" }, box);
  const update = () => {
    const set = sets[which.value], total = Math.max(...set.depth);
    at.max = total;
    const g = Math.min(Number(at.value), total) - 1;
    arms.replaceChildren();
    let row = 0;
    const wrong = set.arms.map((arm, a) => {
      const cell = make("div", { role: "img" }, arms);
      cell.style.cssText = "flex: 1 1 18em; max-width: 23em;";
      const now = row + g, first = now * set.each;
      row += set.depth[a];
      if (g >= set.depth[a]) {
        make("p", { class: "th-key" }, cell, `${arm}: ends with generation ${set.depth[a]}`);
        return "";
      }
      make("p", { class: "th-key th-told" }, cell, `${arm}: ${set.figures[now]}`);
      (set.points ? scatter : tiles)(cell, set, first);
      const count = [...set.bad.slice(first, first + set.each)].filter((b) => b === "1").length;
      cell.setAttribute("aria-label", `${arm}: ${count} of ${set.each} hallucinated`);
      return `${arm}, ${count} of ${set.each} hallucinated`;
    });
    told.textContent = `generation ${g + 1} of ${total}: ${wrong.filter(Boolean).join("; ")}`;
  };
  const { stop } = player(bar, at, update, 1200, el);
  which.addEventListener("change", () => { stop(); at.value = 1; update(); });
  update();
  return stop;
}

export default { render };
