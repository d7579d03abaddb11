// The story of the book in points of the plane: data, noise, the way back, and what is wrong at the end of it.
// data: { frames, n, scenes, captions, bad, removed, modes, low, high } as `tinyhall.explore.story` writes it.

function render({ model, el }) {
  const data = model.get("data");
  const x = levels(data.frames), n = data.n, total = data.scenes.length, range = [data.low, data.high];
  el.replaceChildren();
  const box = make("div", { class: "th-explorer th-story" }, el);
  // As tall as the longest sentence, so that the page does not jump.
  const said = make("p", { class: "th-caption" }, box);
  const plane = panel(box, { title: data.captions.join(" "), width: 460, height: 400, x: range, y: range, xlabel: "", ylabel: "" });
  const dots = Array.from({ length: n }, () => make("svg:circle", { r: 3.2 }, plane.svg));
  const bar = make("div", { class: "th-slider" }, box);
  const at = slider(bar, "story", { min: 0, max: total - 1, step: 1, value: 0 });
  const told = make("output", { class: "th-told", "aria-live": "off" }, box);
  const update = () => {
    const frame = Number(at.value), scene = data.scenes[frame];
    dots.forEach((dot, i) => {
      dot.setAttribute("cx", plane.across(x[2 * (frame * n + i)]).toFixed(1));
      dot.setAttribute("cy", plane.up(x[2 * (frame * n + i) + 1]).toFixed(1));
      dot.setAttribute("class", scene < 3 ? "th-neutral" : `${data.bad[i] ? "th-bad" : "th-good"} th-solid${scene > 3 && data.removed[i] ? " th-gone" : ""}`);
    });
    said.textContent = data.captions[scene];
    told.textContent = `${scene + 1} of ${data.captions.length}, picture ${frame + 1} of ${total}`;
    at.setAttribute("aria-valuetext", data.captions[scene]);
  };
  const { start, stop } = player(bar, at, update, 110, el);
  update();
  // It moves by itself once it is seen, unless the reader has asked for stillness; it ends, and the button stops it.
  let seen = null;
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
    seen = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) {
        seen.disconnect();
        start();
      }
    }, { threshold: 0.5 });
    seen.observe(box);
  }
  return () => {
    stop();
    if (seen) seen.disconnect();
  };
}

export default { render };
