// Draw from a network on a line, here in the page: its weights come along, and every step is computed.
// data: { net, samplers, modes, std, within, low, high, bins } as `tinyhall.explore.draw` writes it.

const GROUP = 100; // samples drawn together, so that the histogram grows while more are on their way
const SLICE = 12; // milliseconds of work before the page gets its turn

// A number in half precision.
function half(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
}

// tinyhall's MLP: eps(x, t) for one x; what depends on t alone is worked out once for each t.
function network({ width, blocks, shared, shapes, packed }) {
  const all = Float32Array.from(new Uint16Array(bytes(packed)), half);
  const weight = {};
  let start = 0;
  for (const [name, size] of shapes) {
    weight[name] = all.subarray(start, start + size);
    start += size;
  }
  const linear = (name, v, out) => {
    const w = weight[`${name}.weight`], b = weight[`${name}.bias`], n = v.length;
    let o = 0;
    for (; o + 3 < out.length; o += 4) { // four sums at a time: one alone would wait for itself
      let p = 0, q = 0, r = 0, s = 0;
      for (let i = 0, k = o * n; i < n; i += 1, k += 1) {
        p += w[k] * v[i];
        q += w[k + n] * v[i];
        r += w[k + 2 * n] * v[i];
        s += w[k + 3 * n] * v[i];
      }
      out[o] = p;
      out[o + 1] = q;
      out[o + 2] = r;
      out[o + 3] = s;
    }
    for (; o < out.length; o += 1) {
      out[o] = 0;
      for (let i = 0; i < n; i += 1) out[o] += w[o * n + i] * v[i];
    }
    if (b) for (o = 0; o < out.length; o += 1) out[o] += b[o];
    return out;
  };
  const norm = (name, v, out) => {
    let mean = 0, square = 0;
    for (const a of v) mean += a / v.length;
    for (const a of v) square += (a - mean) ** 2 / v.length;
    const scale = 1 / Math.sqrt(square + 1e-5), w = weight[`${name}.weight`], b = weight[`${name}.bias`];
    for (let i = 0; i < v.length; i += 1) out[i] = (v[i] - mean) * scale * w[i] + b[i];
    return out;
  };
  const leaky = (v) => {
    for (let i = 0; i < v.length; i += 1) if (v[i] < 0) v[i] *= 0.02;
    return v;
  };
  const fresh = () => new Float32Array(width);
  const times = new Map();
  const time = (t) => {
    if (!times.has(t)) {
      const n = width / 2, angle = fresh();
      for (let i = 0; i < n; i += 1) {
        const phase = t * Math.exp((-Math.log(10000) / (n - 1)) * i);
        angle[i] = Math.sin(phase);
        angle[n + i] = Math.cos(phase);
      }
      const hidden = leaky(linear("time", angle, fresh()));
      times.set(t, Array.from({ length: shared ? 1 : blocks }, (_, j) => linear(`body.${j}.time`, hidden, fresh())));
    }
    return times.get(t);
  };
  const h = fresh(), a = fresh(), b = fresh(), one = [0], eps = [0];
  return (x, t) => {
    const added = time(t);
    one[0] = Math.min(Math.max(x, -1e15), 1e15);
    linear("project_in", one, h);
    for (let i = 0; i < blocks; i += 1) {
      const j = shared ? 0 : i;
      linear(`body.${j}.linear1`, leaky(norm(`body.${j}.norm1`, h, a)), b);
      for (let k = 0; k < width; k += 1) b[k] += added[j][k];
      linear(`body.${j}.linear2`, leaky(norm(`body.${j}.norm2`, b, a)), b);
      for (let k = 0; k < width; k += 1) h[k] += b[k];
    }
    return linear("project_out", norm("norm", h, a), eps)[0];
  };
}

// Normal numbers from a seed: mulberry32, then Box and Muller.
function normals(seed) {
  let state = seed | 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  return () => {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    return radius * Math.cos(2 * Math.PI * uniform());
  };
}

// A group of samples after each of its moves; `rest` is awaited now and then.
async function walk(eps, moves, n, normal, rest) {
  const x = Float64Array.from({ length: n }, normal);
  for (let m = 0; m < moves.length; m += 4) {
    const [t, keep, push, noise] = moves.subarray(m, m + 4);
    for (let i = 0; i < n; i += 1) {
      x[i] = keep * x[i] + push * eps(x[i], t);
      if (rest.due()) await rest.turn();
      if (rest.stopped) return null;
    }
    if (noise > 0) for (let i = 0; i < n; i += 1) x[i] += noise * normal();
  }
  return x;
}

function bars(box, data) {
  const width = 480, height = 210, left = 40, base = height - 30, top = 8;
  const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "th-plot" }, box);
  make("svg:title", {}, svg, "Histogram of the samples drawn, counts on a log axis; those outside the support are marked.");
  const across = (v) => left + ((v - data.low) / (data.high - data.low)) * (width - left - 8);
  for (const v of data.modes) make("svg:text", { x: across(v), y: base + 13, "text-anchor": "middle", class: "th-text" }, svg, String(v));
  make("svg:text", { x: (width + left) / 2, y: height - 4, "text-anchor": "middle", class: "th-text" }, svg, "x");
  make("svg:text", { x: 10, y: base / 2, transform: `rotate(-90 10 ${base / 2})`, "text-anchor": "middle", class: "th-text" }, svg, "samples");
  const ticks = [1, 10, 100].map((v) => [v, make("svg:text", { x: left - 4, "text-anchor": "end", class: "th-text" }, svg, String(v))]);
  make("svg:line", { x1: left, x2: width - 8, y1: base, y2: base, class: "th-axis" }, svg);
  const step = (data.high - data.low) / data.bins;
  const outside = (v) => Math.min(...data.modes.map((m) => Math.abs(v - m))) > data.within * data.std;
  const rects = Array.from({ length: data.bins }, (_, i) => {
    const at = data.low + i * step;
    return make("svg:rect", { x: across(at), width: across(at + step) - across(at), class: outside(at + step / 2) ? "th-bad th-solid" : "th-good th-solid" }, svg);
  });
  return {
    outside,
    show(x) {
      const counts = new Array(data.bins).fill(0);
      for (const v of x) counts[Math.min(Math.max(Math.floor((v - data.low) / step), 0), data.bins - 1)] += 1;
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
  const eps = network(data.net);
  const names = data.samplers.map(([name]) => name);
  const moves = data.samplers.map(([, packed]) => new Float32Array(bytes(packed)));
  el.replaceChildren();
  const box = make("div", { class: "th-explorer" }, el);
  const chart = bars(box, data);
  const bar = make("div", { class: "th-row" }, box);
  const sampler = choice(bar, "sampler", names);
  const run = make("button", { type: "button", class: "th-button" }, bar, "Draw");
  const n = slider(box, "samples", { min: GROUP, max: 10 * GROUP, step: GROUP, value: 3 * GROUP });
  const seed = slider(box, "seed", { min: 0, max: 99, step: 1, value: 0 });
  const told = make("output", { class: "th-told", "aria-live": "polite" }, box);
  let rest = null;

  const count = (x) => {
    const wrong = x.filter(chart.outside).length;
    return `beyond ${data.within} std of every mode: ${wrong} (${((100 * wrong) / x.length).toFixed(1)}%)`;
  };
  const ready = () => {
    told.textContent = `${n.value} samples from seed ${seed.value}, ${names[Number(sampler.value)]}: press Draw.`;
  };
  const draw = async () => {
    let since = performance.now();
    const turn = async () => {
      await new Promise((done) => setTimeout(done));
      since = performance.now();
    };
    const mine = { stopped: false, due: () => performance.now() - since > SLICE, turn };
    rest = mine;
    run.textContent = "Stop";
    const wanted = Number(n.value), normal = normals(Number(seed.value)), x = [];
    while (x.length < wanted && !mine.stopped && el.isConnected) {
      told.textContent = x.length ? `drawn ${x.length} of ${wanted}; ${count(x)}` : "drawing ...";
      const more = await walk(eps, moves[Number(sampler.value)], GROUP, normal, mine);
      if (more) x.push(...more);
      chart.show(x);
    }
    rest = null;
    run.textContent = "Draw";
    if (x.length) told.textContent = `drawn ${x.length} of ${wanted}; ${count(x)}`;
    else ready();
  };
  run.addEventListener("click", () => {
    if (rest) rest.stopped = true;
    else draw();
  });
  for (const input of [sampler, n, seed]) input.addEventListener("input", () => { if (!rest) ready(); else rest.stopped = true; });
  chart.show([]);
  ready();
  return () => { if (rest) rest.stopped = true; };
}

export default { render };
