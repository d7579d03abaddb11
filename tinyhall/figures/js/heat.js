// A table whose fields are coloured by how good they are: one figure at a time, sorted by any column.
// data: { rows, columns, sheets } as `tinyhall.figures.heat` writes it; each sheet has { name, note, texts, goods }.

function render({ model, el }) {
  const data = model.get("data");
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);
  const bar = make("div", { class: "th-row" }, box);
  const shown = choice(bar, "shown", data.sheets.map((sheet) => sheet.name));
  const by = choice(bar, "sorted by", ["nothing", ...data.columns]);
  // On a phone it scrolls by itself, also by key.
  const frame = make("div", { class: "th-heat", tabindex: 0, role: "region", "aria-label": "heat map" }, box);
  const table = make("table", {}, frame);
  const head = make("tr", {}, make("thead", {}, table));
  make("td", {}, head);
  const tops = data.columns.map((name) => make("th", { scope: "col" }, head, name));
  const body = make("tbody", {}, table);
  const lines = data.rows.map((name) => {
    const line = make("tr", {}, body);
    make("th", { scope: "row" }, line, name);
    return { line, fields: data.columns.map(() => make("td", {}, line)) };
  });
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  const update = () => {
    const sheet = data.sheets[Number(shown.value)], column = Number(by.value) - 1;
    lines.forEach(({ fields }, r) => fields.forEach((field, c) => {
      const good = sheet.goods[r][c];
      field.textContent = sheet.texts[r][c] || "-";
      // Through the colour one reads the text, on a light page and on a dark one.
      field.style.backgroundColor = good === null ? "" : `rgb(0 114 178 / ${(0.5 * Math.min(Math.max(good, 0), 1)).toFixed(3)})`;
    }));
    tops.forEach((top, c) => top.setAttribute("aria-sort", c === column ? "descending" : "none"));
    const order = [...data.rows.keys()];
    const good = (r) => sheet.goods[r][column] ?? -Infinity;
    if (column >= 0) order.sort((a, b) => (good(a) === good(b) ? 0 : good(b) - good(a)));
    body.replaceChildren(...order.map((r) => lines[r].line));
    const ranked = order.filter((r) => column >= 0 && sheet.texts[r][column]);
    told.textContent = column < 0 ? sheet.note :
      `${sheet.name}, ${data.columns[column]}: ${ranked.map((r) => `${data.rows[r]} ${sheet.texts[r][column]}`).join(", ")}`;
  };
  for (const input of [shown, by]) input.addEventListener("input", update);
  update();
}

export default { render };
