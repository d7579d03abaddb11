// Denoisers side by side that are shown the same noisy image; the t, the image and the patch of the near-sighted one by hand.
// data: { cases, t, bars, names, patches, light, what, start, sprite, columns, cell } as `tinyhall.explore.answers` writes it.

function render({ model, el }) {
  const data = model.get("data");
  const each = 1 + data.names.length + data.patches.length;  // tiles of a moment: the noisy image, then the answers
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);
  const bar = make("div", { class: "th-row" }, box);
  const which = choice(bar, "shown", data.cases);
  const sliders = make("div", { class: "th-slider" }, box);
  const at = slider(sliders, "time", { min: 0, max: data.t.length - 1, step: 1, value: data.start[0] });
  const patch = slider(sliders, "P", { min: 0, max: data.patches.length - 1, step: 1, value: data.start[1] });
  const row = make("div", { class: "th-gallery" }, box);
  const panels = ["what they see", ...data.names, ""].map((name) => {
    const place = make("div", { class: "th-answer" }, row);
    return { place: make("div", {}, place), name: make("p", { class: "th-key" }, place, name), told: make("p", { class: "th-key th-told" }, place) };
  });
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  const large = Math.max(1, Math.round(128 / data.cell));
  const update = () => {
    const c = Number(which.value), k = Number(at.value), p = Number(patch.value);
    const moment = c * data.t.length + k;
    const shown = [0, ...data.names.map((_, i) => 1 + i), 1 + data.names.length + p];
    panels[panels.length - 1].name.textContent = `near-sighted, P = ${data.patches[p]}`;
    const said = panels.map(({ place, name, told }, i) => {
      place.replaceChildren();
      const picture = tile(place, data, moment * each + shown[i]);
      const x = (shown[i] % data.columns) * data.cell * large, y = moment * data.cell * large;
      picture.style.cssText = `display:block;width:${data.cell * large}px;height:${data.cell * large}px;` +
        `background:url(${data.sprite}) -${x}px -${y}px / ${data.columns * data.cell * large}px auto;`;
      picture.classList.add("th-large");
      picture.setAttribute("role", "img");
      picture.setAttribute("aria-label", `${name.textContent}, t = ${data.t[k]}`);
      told.textContent = i ? `${data.what} ${data.light[moment][shown[i] - 1].toFixed(2)}` : `t = ${data.t[k]}`;
      return i ? `${name.textContent} ${data.light[moment][shown[i] - 1].toFixed(2)}` : "";
    });
    told.textContent = `${data.cases[c]}, t = ${data.t[k]}, ${data.bars[k]} of the signal left; ${data.what}: ${said.slice(1).join("; ")}`;
  };
  const { stop } = player(sliders, at, update, 700, el);
  for (const input of [which, patch]) input.addEventListener("input", update);
  update();
  return stop;
}

export default { render };
