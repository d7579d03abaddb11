// Draw from a denoiser on a line, here in the page: the network's, which came as a table, or the exact one, from the same noise.
// data: { table, points, logs, samplers, modes, std, within, low, high, bins, most } as `tinyhall.explore.draw` writes it.

const SLICE = 12; // milliseconds of work before the page gets its turn

// eps(k)(x) at the k-th of the times: the network's curve, between two places of the table by a straight line, and beyond its ends on.
function network({ table, points, low, high }) {
  const all = levels(table), per = (points - 1) / (high - low);
  return (k) => (x) => {
    const place = (x - low) * per, left = Math.min(Math.max(Math.floor(place), 0), points - 2), i = k * points + left;
    return all[i] + (place - left) * (all[i + 1] - all[i]);
  };
}

// The same of the exact denoiser, `GaussianMixture.denoiser`.
function exact({ logs, modes, std }) {
  return (k) => {
    const bar = Math.exp(logs[k]), noise = -Math.expm1(logs[k]), total = bar * std ** 2 + noise, root = Math.sqrt(bar);
    return (x) => {
      let least = Infinity, sum = 0, centre = 0;
      for (const m of modes) least = Math.min(least, (x - root * m) ** 2);
      for (const m of modes) {
        const share = Math.exp((least - (x - root * m) ** 2) / (2 * total));
        sum += share;
        centre += share * m;
      }
      return (Math.sqrt(noise) / total) * (x - (root * centre) / sum);
    };
  };
}

// Normal numbers from a seed: mulberry32, then Box and Muller.
function normals(seed) {
  let state = seed | 0, spare = null;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  return () => {
    if (spare !== null) {
      const kept = spare;
      spare = null;
      return kept;
    }
    const radius = Math.sqrt(-2 * Math.log(1 - uniform())), angle = 2 * Math.PI * uniform();
    spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  };
}

// A group of samples after all of the moves; `rest` is awaited now and then.
async function walk(eps, moves, n, normal, rest) {
  const x = Float64Array.from({ length: n }, normal);
  for (const [k, keep, push, noise] of moves) {
    const at = eps(k);
    for (let i = 0; i < n; i += 1) x[i] = keep * x[i] + push * at(x[i]);
    if (noise > 0) for (let i = 0; i < n; i += 1) x[i] += noise * normal();
    if (rest.due()) await rest.turn();
    if (rest.stopped) return null;
  }
  return x;
}

function bars(box, data) {
  const width = 500, height = 190, left = 52, base = height - 30, top = 8;
  const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "th-plot" }, box);
  make("svg:title", {}, svg, "Histogram of the samples drawn, counts on a log axis; those outside the support are marked.");
  const first = Math.min(...data.modes), last = Math.max(...data.modes), low = first - (last - first) / 4, high = last + (last - first) / 4;
  const across = (v) => left + ((v - low) / (high - low)) * (width - left - 8);
  for (const v of data.modes) make("svg:text", { x: across(v), y: base + 13, "text-anchor": "middle", class: "th-text" }, svg, String(v));
  make("svg:text", { x: (width + left) / 2, y: height - 4, "text-anchor": "middle", class: "th-text" }, svg, "x");
  make("svg:text", { x: 10, y: base / 2, transform: `rotate(-90 10 ${base / 2})`, "text-anchor": "middle", class: "th-text" }, svg, "samples");
  const ticks = [0, 1, 2, 3, 4, 5].map((v) => [10 ** v, make("svg:text", { x: left - 4, "text-anchor": "end", class: "th-text" }, svg, (10 ** v).toLocaleString("en"))]);
  make("svg:line", { x1: left, x2: width - 8, y1: base, y2: base, class: "th-axis" }, svg);
  const step = (high - low) / data.bins;
  const outside = (v) => Math.min(...data.modes.map((m) => Math.abs(v - m))) > data.within * data.std;
  const rects = Array.from({ length: data.bins }, (_, i) => {
    const at = low + i * step;
    return make("svg:rect", { x: across(at), width: across(at + step) - across(at), class: outside(at + step / 2) ? "th-bad th-solid" : "th-good th-solid" }, svg);
  });
  return {
    // Adds samples to the counts; what lies farther out than the axis is in its first and last bin.
    count(counts, x) {
      for (const v of x) counts[Math.min(Math.max(Math.floor((v - low) / step), 0), data.bins - 1)] += 1;
      return x.filter(outside).length;
    },
    show(counts) {
      const most = Math.max(10, ...counts);
      const up = (k) => base - ((Math.log10(k) + 0.3) / (Math.log10(most) + 0.3)) * (base - top);
      ticks.forEach(([v, node]) => { node.setAttribute("y", up(v) + 4); node.setAttribute("visibility", v <= most ? "visible" : "hidden"); });
      rects.forEach((rect, i) => {
        rect.setAttribute("y", counts[i] ? up(counts[i]) : base);
        rect.setAttribute("height", counts[i] ? base - up(counts[i]) : 0);
      });
    },
  };
}

function render({ model, el }) {
  const data = model.get("data");
  const names = ["network", "exact denoiser"], denoisers = [network(data), exact(data)];
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);
  const chart = bars(box, data);
  const bar = make("div", { class: "th-row" }, box);
  const denoiser = choice(bar, "denoiser", names);
  const sampler = choice(bar, "sampler", data.samplers.map(([name]) => name));
  const run = make("button", { type: "button", class: "th-button" }, bar, "Stop");
  const group = data.most / 20;
  const n = slider(box, "samples", { min: group, max: data.most, step: group, value: data.most / 2 });
  const seed = slider(box, "seed", { min: 0, max: 99, step: 1, value: 0 });
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches; // then it shows what has come out, and not how
  let rest = null;

  const draw = async () => {
    if (rest) rest.stopped = true;
    let since = performance.now();
    const turn = async () => {
      await new Promise((done) => setTimeout(done));
      since = performance.now();
    };
    const mine = { stopped: false, due: () => performance.now() - since > SLICE, turn };
    rest = mine;
    run.textContent = "Stop";
    const wanted = Number(n.value), normal = normals(Number(seed.value)), eps = denoisers[Number(denoiser.value)];
    const who = `${names[Number(denoiser.value)]}, seed ${seed.value}`, moves = data.samplers[Number(sampler.value)][1];
    const counts = new Array(data.bins).fill(0);
    let drawn = 0, wrong = 0;
    const tell = () => {
      chart.show(counts);
      told.textContent = `${who}: ${drawn.toLocaleString("en")} of ${wanted.toLocaleString("en")} samples drawn, ${wrong} beyond ${data.within} std ` +
        `of every mode (${drawn ? ((1e5 * wrong) / drawn).toFixed(0) : 0} in 100,000)`;
    };
    tell();
    while (drawn < wanted && !mine.stopped && el.isConnected) {
      const more = await walk(eps, moves, group, normal, mine);
      if (!more) break;
      drawn += group;
      wrong += chart.count(counts, more);
      if (!still || drawn === wanted) tell();
    }
    if (rest !== mine) return; // another has begun
    tell();
    rest = null;
    run.textContent = "Draw";
  };
  run.addEventListener("click", () => {
    if (rest) rest.stopped = true;
    else draw();
  });
  for (const input of [denoiser, sampler, n, seed]) input.addEventListener("input", draw);
  draw();
  return () => { if (rest) rest.stopped = true; };
}

export default { render };
