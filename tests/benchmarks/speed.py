"""How fast, against the paper's public code and against the bare arithmetic: `python tests/benchmarks/speed.py --paper PATH`.

PATH is the folder `gaussian_experiments` of a clone of github.com/locuslab/diffusion-model-hallucination; without it only the
distance from the arithmetic is measured. What is compared runs in turn, A B C A B C, every second round backwards, and a ratio
is taken within each round: a machine that is slow for a minute is slow for all of them. Each has a process of its own, because
what one leaves in the allocator changes another's time by up to a factor of two. One thread is timed by the processor's clock,
to which other programs do not count, more threads by the wall's. The results go to book/artifacts/speed.json, and `--page`
writes them into book/speed.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402
from memory import peak  # noqa: E402

from tinyhall import device as _device  # noqa: E402
from tinyhall.metrics import TrajectoryVariance  # noqa: E402
from tinyhall.nets import MLP, Tabulated  # noqa: E402
from tinyhall.sampling import ddpm, reverse  # noqa: E402
from tinyhall.schedule import Schedule  # noqa: E402
from tinyhall.training import train  # noqa: E402

JSON, PAGE = ROOT / "book/artifacts/speed.json", ROOT / "book/speed.md"
WIDTH, BLOCKS, BATCH, STEPS = 128, 3, 10_000, 1000
WINDOW = (0, 10)
Work = Callable[[], object]
Spec = tuple[Any, ...]  # names a work: its maker and the arguments


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _serve(pipe: Connection, spec: Spec, paper: Path | None, threads: int) -> None:
    torch.set_num_threads(threads)
    kind, *rest = spec
    if kind.startswith("paper"):
        assert paper is not None
        work = getattr(Paper(paper), kind.removeprefix("paper."))(*rest)
    else:
        work = {"train": our_train_step, "reverse": our_reverse_step, "floor": lambda *a: floor(*a)[0]}[kind](*rest)
    for _ in range(3):
        work()
    clock = time.process_time if threads == 1 else time.perf_counter
    pipe.send(0.0)
    while pipe.recv():
        began = clock()
        work()
        pipe.send(clock() - began)


def rounds(specs: dict[str, Spec], count: int, paper: Path | None, threads: int) -> dict[str, list[float]]:
    """Seconds of each work in each round."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name, spec in specs.items():
        pipes[name], far = context.Pipe()
        processes.append(context.Process(target=_serve, args=(far, spec, paper, threads), daemon=True))
        processes[-1].start()
        far.close()
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in specs}
    for i in range(count):
        for name in list(specs)[:: 1 if i % 2 == 0 else -1]:
            pipes[name].send(True)
            seconds[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return seconds


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within rounds."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "low": low, "high": high, "pairs": len(ratios)}


# --- the paper's code


class Paper:
    """The parts of the paper's code that are timed. It imports wandb and torchvision, which nothing here calls."""

    def __init__(self, path: Path) -> None:
        for name in ("wandb", "torchvision", "torchvision.utils"):
            stub: Any = types.ModuleType(name)
            stub.save_image = stub.make_grid = print  # wrapped when imported, so a callable
            sys.modules.setdefault(name, stub)
        sys.path.insert(0, str(path))
        betas = importlib.import_module("ddpm_torch.diffusion").get_beta_schedule("linear", 1e-3, 0.2, STEPS)
        diffusion = importlib.import_module("ddpm_torch.toy.diffusion").GaussianDiffusion
        self.diffusion = diffusion(betas, "eps", "fixed-large", "mse")
        self._decoder = importlib.import_module("ddpm_torch.toy.toy_model").Decoder
        self._trainer = importlib.import_module("ddpm_torch.toy.toy_utils").Trainer

    def net(self, dim: int) -> torch.nn.Module:
        return self._decoder(dim, WIDTH, BLOCKS)

    def train_step(self, dim: int) -> Work:
        net = self.net(dim)
        x = torch.randn(BATCH, dim, generator=generator())
        trainer = self._trainer(
            net, torch.optim.Adam(net.parameters(), 1e-3), self.diffusion, 1, None, shape=(dim,),
            args=types.SimpleNamespace(log_results=False),
        )  # fmt: skip
        return lambda: trainer.step(x)

    def reverse_step(self, n: int, dim: int) -> Work:
        """What `p_sample_save_all` does at every step, and it is what the paper scores with."""
        net, t = self.net(dim), torch.empty(n, dtype=torch.int64)
        x = torch.randn(n, dim, generator=generator())
        kept: list[torch.Tensor] = []

        @torch.inference_mode()
        def step() -> None:
            t.fill_(WINDOW[0] + 1)
            state, x0_hat = self.diffusion.p_sample_step(net, x, t, return_pred=True)
            if len(kept) == 20:  # the real one keeps all 1000 pairs
                kept.clear()
            kept.extend((x0_hat.clone().detach().cpu(), state.clone().detach().cpu()))

        return step


def agreement(paper: Paper, dim: int) -> dict[str, float]:
    """Largest differences with equal weights and noise: prediction, gradient (relative to its norm), and a reverse step."""
    theirs, ours, schedule = paper.net(dim), MLP(dim), Schedule.linear(steps=STEPS)
    block: Any = theirs.temp_fc[0]
    mine: Any = ours.body[0]
    pairs = [
        (ours.project_in, theirs.in_fc), (ours.time, theirs.t_proj[0]), (mine.norm1, block.norm1), (mine.linear1, block.fc1),
        (mine.time, block.enc), (mine.norm2, block.norm2), (mine.linear2, block.fc2), (ours.norm, theirs.out_norm),
        (ours.project_out, theirs.out_fc),
    ]  # fmt: skip
    for a, b in pairs:
        a.load_state_dict(b.state_dict())
    g = generator()
    x, eps = torch.randn(BATCH, dim, generator=g), torch.randn(BATCH, dim, generator=g)
    t = torch.randint(STEPS, (BATCH,), generator=g).sort().values
    paper.diffusion.train_losses(theirs, x_0=x, t=t, noise=eps).mean().backward()
    state = schedule.q_sample(x, t, eps)
    out = ours(state, t)
    (out - eps).square().mean().backward()
    grads = [(p.grad, q.grad) for a, b in pairs for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    at = torch.full((BATCH,), 5)
    with torch.no_grad():
        difference = (out - theirs(state, t)).abs().max()
        x_next, x0_hat = paper.diffusion.p_sample_step(theirs, x, at, return_pred=True, generator=generator())
        predicted = ours(x, at)
        move = next(m for m in ddpm()(schedule) if m.t == 5)
        z = torch.empty_like(x).normal_(generator=generator())
        reached = move.keep * x + move.push * predicted + move.noise * z
    return {
        "dim": dim,
        "eps": float(difference),
        "gradient": max(float((p - q).norm() / q.norm()) for p, q in grads),
        "x0_hat": float((schedule.predict_x0(x, at[:1], predicted) - x0_hat).abs().max()),
        "next": float((reached - x_next).abs().max()),
    }


# --- ours


def our_train_step(dim: int, compiled: bool) -> Work:
    net, g = MLP(dim), generator()
    if compiled:
        net.compile()
    data = torch.randn(10 * BATCH, dim, generator=g)
    bf16 = _device.gains_bf16(torch.device("cpu"))
    steps = train(net, data, Schedule.linear(steps=STEPS), steps=10**9, batch_size=BATCH, lr=1e-3, generator=g, bf16=bf16)
    return lambda: next(steps).loss.item()


def our_reverse_step(n: int, dim: int, metric: bool, table: int = 0) -> Work:
    net: Any = MLP(dim)
    if table:
        net = Tabulated(net, STEPS, points=table)
    schedule, watch = Schedule.linear(steps=STEPS), TrajectoryVariance((0, STEPS))

    def forever() -> Iterator[None]:
        g = generator()
        while True:
            watch.reset()
            for step in reverse(net, schedule, (n, dim), generator=g):
                if metric:
                    watch.update(step)
                yield

    walk = forever()
    return lambda: next(walk)


# --- the arithmetic that no rewrite avoids: the trunk's products, two per block; backward twice as many


def floor(n: int, backward: bool) -> tuple[Work, float, float]:
    """Bare products in slices that fit the caches; their floating-point operations; the bytes of their operands."""
    rows = min(n, _device.ROWS_IN_CACHE)
    x, out, gradient = torch.randn(rows, WIDTH), torch.empty(rows, WIDTH), torch.randn(rows, WIDTH)
    w, dw = torch.randn(WIDTH, WIDTH), torch.empty(WIDTH, WIDTH)
    products = 2 * BLOCKS

    def work() -> None:
        for _ in range(n // rows):
            for _ in range(products):
                torch.mm(x, w, out=out)
                if backward:
                    torch.mm(gradient, w, out=out)
                    torch.mm(x.t(), gradient, out=dw)

    total = products * (3 if backward else 1)
    return work, total * 2.0 * n * WIDTH * WIDTH, total * 4.0 * (2 * n * WIDTH + WIDTH * WIDTH)


def measure(paper: Path | None, count: int, threads: int, quick: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def compare(what: str, dim: int, n: int, ours: dict[str, Spec], base: Spec, times: int) -> None:
        bare: Spec = ("floor", n, what == "training step")
        seconds = rounds({**({"paper": base} if paper else {}), **ours, "floor": bare}, times, paper, threads)
        _, flops, size = floor(*bare[1:])
        for name in ours:
            rows.append({
                "what": what, "how": name, "dim": dim, "n": n, "threads": threads, "load": os.getloadavg()[0],
                "paper_over_ours": ratio(seconds["paper"], seconds[name]) if paper else None,
                "ours_over_floor": ratio(seconds[name], seconds["floor"]),
                "paper_over_floor": ratio(seconds["paper"], seconds["floor"]) if paper else None,
                "gflop": flops / 1e9, "floor_mb": size / 1e6,
                "floor_gflops": flops / 1e9 / statistics.median(seconds["floor"]),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)

    for dim in (1, 2):
        ours: dict[str, Spec] = {"eager": ("train", dim, False)}
        if not quick:
            ours["compiled"] = ("train", dim, True)
        compare("training step", dim, BATCH, ours, ("paper.train_step", dim), count)
    for n in (10_000,) if quick else (10_000, 100_000):
        ours = {"metric on": ("reverse", n, 2, True), "metric off": ("reverse", n, 2, False)}
        times = count if n == 10_000 else max(count // 3, 5)
        compare("reverse step", 2, n, ours, ("paper.reverse_step", n, 2), times)
    n = 10_000 if quick else 100_000
    ours = {"metric on": ("reverse", n, 1, True), "metric on, tabulated": ("reverse", n, 1, True, 2048 if quick else 16_384)}
    compare("reverse step", 1, n, ours, ("paper.reverse_step", n, 1), max(count // 3, 5))
    return rows


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model)
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "gains_bf16": _device.gains_bf16(torch.device("cpu")),
    }


# --- the page


def _spread(r: dict[str, float] | None) -> tuple[str, str]:
    return ("", "") if r is None else (f"{r['median']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}")


def _table(result: dict[str, Any]) -> str:
    m = result["machine"]
    bf16 = "has" if m["gains_bf16"] else "has no"
    lines = [
        f"Measured on {m['processor']}, {m['cores']} cores, vectors {m['vectors']}, torch {m['torch']}. "
        f"It {bf16} matrix tiles for bfloat16, so tinyhall trained in {'bfloat16' if m['gains_bf16'] else 'float32'}.",
        "",
        "| | points | threads | paper / ours | quartiles | pairs | ours / floor | paper / floor |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in result["rows"]:
        median, quartiles = _spread(r["paper_over_ours"])
        lines.append(
            f"| {r['what']}, {r['dim']}D, {r['how']} | {r['n']:,} | {r['threads']} | **{median}** | {quartiles} "
            f"| {r['ours_over_floor']['pairs']} | {r['ours_over_floor']['median']:.2f} | {_spread(r['paper_over_floor'])[0]} |"
        )
    lines += ["", "| goal | measured | met |", "|---|---|---|"]
    for what, label in (
        ("training step", "a training step 3 times as fast"),
        ("reverse step", "a reverse step, metric on, 3 times as fast"),
    ):
        found = [
            (r["paper_over_ours"]["median"], r)
            for r in result["rows"]
            if r["what"] == what and r["paper_over_ours"] and r["how"] in ("eager", "compiled", "metric on")
        ]
        if found:
            low, high = min(v for v, _ in found), max(v for v, _ in found)
            met = "yes" if low >= 3 else "no" if high < 3 else "in part"
            lines.append(f"| {label} | {low:.2f} to {high:.2f} | {met} |")
    big = [r["peak_mb"] for r in result["memory"] if r["samples"] == 1_000_000]
    if big:
        met = "yes" if max(big) < 1000 else "no"
        lines.append(f"| 1,000,000 samples scored in under 1 GB above the imports | {max(big):.0f} MB | {met} |")
    lines += ["", "| samples scored | steps | network | peak above imports, MB |", "|--:|--:|---|--:|"]
    for r in result["memory"]:
        net = "the MLP" if r["network"] else "a stand-in"
        lines.append(f"| {r['samples']:,} | {r['steps']:,} | {net} | {r['peak_mb']:.0f} |")
    if result["agreement"]:
        lines += [
            "",
            "| largest difference from the paper's code | eps | gradient, relative | x0_hat | next state |",
            "|---|--:|--:|--:|--:|",
        ]
        for a in result["agreement"]:
            lines.append(f"| {a['dim']}D | {a['eps']:.0e} | {a['gradient']:.0e} | {a['x0_hat']:.0e} | {a['next']:.0e} |")
    return "\n".join(lines)


def write_page() -> None:
    before, _, rest = PAGE.read_text().partition("<!-- speed.py writes from here -->")
    _, _, after = rest.partition("<!-- to here -->")
    table = _table(json.loads(JSON.read_text()))
    PAGE.write_text(f"{before}<!-- speed.py writes from here -->\n\n{table}\n\n<!-- to here -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", type=Path, help="the paper's folder gaussian_experiments")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing compiled, no large runs; changes no file")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--only", choices=("rows", "memory"), help="renew one part of the JSON, keep the others")
    parser.add_argument("--page", action="store_true", help="only write the JSON's numbers into the page")
    args = parser.parse_args()
    if args.page:
        write_page()
        return
    result: dict[str, Any] = json.loads(JSON.read_text()) if args.only and JSON.exists() else {"memory": [], "agreement": []}
    result["machine"] = machine()
    if args.only != "memory":
        result["agreement"] = [agreement(Paper(args.paper), dim) for dim in (1, 2)] if args.paper else []
        fresh = [row for k in args.threads for row in measure(args.paper, 5 if args.quick else args.rounds, k, args.quick)]
        result["rows"] = [r for r in result.get("rows", []) if r["threads"] not in args.threads] + fresh
    if args.only != "rows" and sys.platform.startswith("linux"):
        runs = [(10_000, 1000, False), (100_000, 20, False), (100_000, 1000, False)]
        if not args.quick:
            runs += [(1_000_000, 20, False), (1_000_000, 1000, False), (1_000_000, 3, True)]
        result["memory"] = [peak(*run) for run in runs]
        print(json.dumps(result["memory"]))
    if not args.quick:
        JSON.parent.mkdir(parents=True, exist_ok=True)
        JSON.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
