// Images labelled by hand, with keys or buttons: one at a time in a grid, with undo.
// data: { choices, answers, n, zoom, sprite, columns, cell } as `tinyhall.figures.labels.Labeller` writes it. Answers go back as
// "answers", a list with the choice of each image or null.

function render({ model, el }) {
  const data = model.get("data");
  const answers = [...(model.get("answers"))];
  const done = []; // images in the order in which they were labelled, for undo
  let at = 0;
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  const bar = make("progress", { max: data.n, "aria-label": "images labelled" }, box);
  const one = make("div", { class: "th-tile th-large", role: "img" }, box);
  const row = make("div", { class: "th-row", role: "group", "aria-label": "what is in the image" }, box);
  const grid = make("div", { class: "th-gallery", role: "group", "aria-label": "all images" }, box);
  const look = (tile, i, zoom) => {
    const rows = Math.ceil(data.n / data.columns), cell = data.cell * zoom;
    const x = (i % data.columns) * cell, y = Math.floor(i / data.columns) * cell;
    tile.style.cssText = `width:${cell}px;height:${cell}px;background:url(${data.sprite}) -${x}px -${y}px / ${data.columns * cell}px ${rows * cell}px;`;
  };
  const tiles = answers.map((_, i) => {
    const tile = make("button", { type: "button", class: "th-tile th-labelled" }, grid);
    look(tile, i, 1);
    tile.addEventListener("click", () => { at = i; update(); });
    return tile;
  });
  const next = () => {
    const open = answers.findIndex((a, i) => a === null && i > at);
    const first = answers.indexOf(null);
    at = open >= 0 ? open : first >= 0 ? first : at;
  };
  const save = () => { model.set("answers", [...answers]); model.save_changes(); };
  const choose = (choice) => {
    done.push([at, answers[at]]);
    answers[at] = choice;
    next();
    save();
    update();
  };
  const undo = () => {
    if (!done.length) return;
    const [i, before] = done.pop();
    answers[i] = before;
    at = i;
    save();
    update();
  };
  data.choices.forEach(([name, key]) => {
    make("button", { type: "button", class: "th-button", "aria-keyshortcuts": key }, row, `${name} [${key}]`)
      .addEventListener("click", () => choose(name));
  });
  make("button", { type: "button", class: "th-button", "aria-keyshortcuts": "z" }, row, "undo [z]").addEventListener("click", undo);
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const found = data.choices.find(([, key]) => key === event.key);
    if (found) choose(found[0]);
    else if (event.key === "z") undo();
    else return;
    event.preventDefault();
    event.stopPropagation(); // in a notebook, letters are commands
  });
  const update = () => {
    const ready = answers.filter((a) => a !== null).length;
    bar.value = ready;
    look(one, at, data.zoom);
    one.setAttribute("aria-label", `image ${at}`);
    tiles.forEach((tile, i) => {
      tile.classList.toggle("th-now", i === at);
      tile.textContent = answers[i] ?? "";
      tile.setAttribute("aria-label", `image ${i}: ${answers[i] ?? "no label yet"}`);
    });
    told.textContent = `${ready} of ${data.n} labelled; now image ${at}` + (answers[at] === null ? "" : `, labelled ${answers[at]}`);
  };
  at = -1;
  next();
  at = Math.max(at, 0);
  update();
}

export default { render };
