"""How fast, against plain PyTorch with diffusers, the bare arithmetic, and the paper's public code:

    python tests/benchmarks/speed.py --only own      one table; needs nothing but the test environment
    python tests/benchmarks/speed.py --paper PATH    that, the memory of scoring, and the paper's code
    python tests/benchmarks/speed.py --only gpu      steps on a GPU; with --paper PATH, those of the paper's code, too

PATH is the folder `gaussian_experiments` of a clone of github.com/locuslab/diffusion-model-hallucination. What is compared runs
in turn, A B C A B C, every second round backwards, and a ratio is taken within each round: a machine that is slow for a minute
is slow for all of them. Each has a process of its own, because what one leaves in the allocator changes another's time by up to
a factor of two. One thread is timed by the processor's clock, to which other programs do not count, more threads by the wall's.
A loop by hand multiplies in the precision of ours, or the ratio would be one of precisions. The paper's code has float32 alone.
On a GPU many steps are timed together, from the first launch to the end of the last.
The results go to book/artifacts/speed.json, and `--page` writes them into book/speed.md.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from memory import peak  # noqa: E402

from tinyhall.core import device as _device  # noqa: E402
from tinyhall.core.metrics import TrajectoryVariance, spelled  # noqa: E402
from tinyhall.core.mlp import sinusoidal  # noqa: E402
from tinyhall.core.sampling import ddpm, reverse, sample  # noqa: E402
from tinyhall.core.schedule import Schedule  # noqa: E402
from tinyhall.core.training import train  # noqa: E402
from tinyhall.lab import experiments  # noqa: E402
from tinyhall.lab.provenance import describe_device  # noqa: E402
from tinyhall.lab.reproduce import reproduce  # noqa: E402
from tinyhall.measure import stats  # noqa: E402
from tinyhall.nets import MLP, Tabulated, UNet  # noqa: E402
from tinyhall.store.checkpoint import gains_bf16  # noqa: E402

JSON, PAGE = ROOT / "book/artifacts/speed.json", ROOT / "book/speed.md"
WIDTH, BLOCKS, BATCH, STEPS = 128, 3, 10_000, 1000
SMALL, IMAGES, SEEDS = 1000, 16, 8  # a small batch of points, one of images, and networks trained side by side
IN_A_ROW = 50  # steps on a GPU between two readings of the clock, which would stall it
WINDOW = (0, 10)
HALF = (  # what chapters 1 and 2 are made from at the paper's scale, when that goal was set
    "line123", "line123-n20000", "line123-n5000", "line123-n1000", "line1245", "line123-T250", "line123-separate", "grid",
    "diamond", "diamond-spaced",
)  # fmt: skip
DEVICE = torch.device("cpu")  # of this process's works
Work = Callable[[], object]
Spec = tuple[Any, ...]  # names a work: its maker and the arguments


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def randn(*shape: int, g: torch.Generator | None = None) -> torch.Tensor:
    return torch.randn(shape, generator=g or generator(), device=DEVICE)


def network(kind: int | str) -> tuple[Any, tuple[int, ...]]:
    """The MLP over so many dimensions, or else the U-Net of the laptop's shapes; with the shape of one sample."""
    if isinstance(kind, int):
        return MLP(kind).to(DEVICE), (kind,)
    net = UNet(size=32, widths=(32, 64, 64), blocks=1).to(DEVICE)
    return net, net.shape


def _serve(pipe: Connection, spec: Spec, paper: Path | None, threads: int, device: torch.device) -> None:
    global DEVICE
    DEVICE = device
    torch.set_num_threads(threads)
    kind, *rest = spec
    if kind.startswith("paper"):
        assert paper is not None
        work = getattr(Paper(paper), kind.removeprefix("paper."))(*rest)
    else:
        work = WORKS[kind](*rest)
    on_gpu = device.type == "cuda"
    clock = time.process_time if threads == 1 and not on_gpu else time.perf_counter
    times = IN_A_ROW if on_gpu else 1

    def seconds() -> float:
        began = clock()
        for _ in range(times):
            work()
        if on_gpu:
            torch.cuda.synchronize()
        return (clock() - began) / times

    began = clock()
    for _ in range(3):
        seconds()
        if clock() - began > 1:
            break  # warm
    pipe.send(0.0)
    while pipe.recv():
        pipe.send(seconds())


def rounds(
    specs: dict[str, Spec], count: int, paper: Path | None, threads: int, device: torch.device = DEVICE
) -> dict[str, list[float]]:
    """Seconds of each work in each round."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name, spec in specs.items():
        pipes[name], far = context.Pipe()
        processes.append(context.Process(target=_serve, args=(far, spec, paper, threads, device), daemon=True))
        processes[-1].start()
        far.close()
    for pipe in pipes.values():
        pipe.recv()  # all have started and warmed up
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


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high, "pairs": len(values)}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within rounds."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


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
        return self._decoder(dim, WIDTH, BLOCKS).to(DEVICE)

    def train_step(self, dim: int) -> Work:
        net = self.net(dim)
        x = randn(BATCH, dim)
        trainer = self._trainer(
            net, torch.optim.Adam(net.parameters(), 1e-3), self.diffusion, 1, None, shape=(dim,), device=DEVICE,
            args=types.SimpleNamespace(log_results=False),
        )  # fmt: skip
        return lambda: trainer.step(x)

    def reverse_step(self, n: int, dim: int) -> Work:
        """What `p_sample_save_all` does at every step, and it is what the paper scores with."""
        net, t = self.net(dim), torch.empty(n, dtype=torch.int64, device=DEVICE)
        x = randn(n, dim)
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
    theirs, ours, schedule = paper.net(dim), MLP(dim), Schedule.linear(timesteps=STEPS)
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
        step = next(c for c in ddpm()(schedule) if c.t == 5)
        z = torch.empty_like(x).normal_(generator=generator())
        reached = step.x * x + step.eps * predicted + step.noise * z
    return {
        "dim": dim,
        "eps": float(difference),
        "gradient": max(float((p - q).norm() / q.norm()) for p, q in grads),
        "x0_hat": float((schedule.predict_x0(x, at[:1], predicted) - x0_hat).abs().max()),
        "next": float((reached - x_next).abs().max()),
    }


# --- ours


def our_train_step(
    kind: int | str, compiled: bool, n: int = BATCH, seed: int = 0, bf16: bool = False, captured: bool = False
) -> Work:
    (net, shape), g = network(kind), generator(seed)
    if compiled:
        net.compile()
    data = randn(10 * n, *shape, g=g)
    schedule, options = Schedule.linear(timesteps=STEPS), {"bf16": bf16, "captured": captured}
    steps = train(net, data, schedule, train_steps=10**9, batch_size=n, lr=1e-3, generator=g, **options)
    return lambda: next(steps).loss


def our_reverse_step(n: int, kind: int | str, metric: bool, table: int = 0) -> Work:
    net, shape = network(kind)
    if table:
        net = Tabulated(net, STEPS, points=table, device=DEVICE)
    schedule, watch = Schedule.linear(timesteps=STEPS), TrajectoryVariance((0, STEPS))

    def forever() -> Iterator[None]:
        g = generator()
        while True:
            watch.reset()
            for step in reverse(net, schedule, (n, *shape), generator=g):
                if metric:
                    watch.update(step)
                yield

    walk = forever()
    return lambda: next(walk)


def our_whole(steps: int, n: int, times: int) -> Work:
    """Trains for `steps` steps, then samples and scores n points in `times` reverse steps; 0 leaves that part out."""
    data, schedule = randn(10 * SMALL, 2), Schedule.linear(timesteps=times)

    def work() -> torch.Tensor | None:
        (net, _), g, metric = network(2), generator(), TrajectoryVariance(WINDOW)
        if steps:
            for step in train(net, data, schedule, train_steps=steps, batch_size=SMALL, lr=1e-3, generator=g):
                step.loss.item()
        return sample(net, schedule, n, metrics=[metric], generator=g).scores[metric.name] if n else None

    return work


class Mappable(MLP):
    """The MLP without its look-up of the distinct t: how many there are depends on the data, which `vmap` cannot have."""

    def time_features(self, t: torch.Tensor) -> list[torch.Tensor]:
        hidden = F.leaky_relu(self.time(sinusoidal(t, self.width)), 0.02)
        return [block.time(hidden) for block in self.body]  # type: ignore[operator]


def side_by_side(seeds: int, n: int) -> Work:
    """One training step of as many networks as one batched network, which gives a GPU fewer and larger products."""
    nets = [Mappable(2, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in range(seeds)]
    weights, _ = torch.func.stack_module_state(nets)
    optimizer = torch.optim.Adam(list(weights.values()), lr=1e-3, fused=True)  # element by element, so as good as one each
    generators = [generator(seed) for seed in range(seeds)]
    data = [randn(10 * n, 2, g=g) for g in generators]
    schedule = Schedule.linear(timesteps=STEPS)

    def loss(w: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(torch.func.functional_call(nets[0], w, (x, t)), eps)

    def step() -> torch.Tensor:
        drawn = [draw(points, n, STEPS, g) for points, g in zip(data, generators, strict=True)]
        states = torch.stack([schedule.q_sample(x0, t, eps) for x0, t, eps in drawn])  # [seeds, n, 2]
        t, eps = (torch.stack([batch[i] for batch in drawn]) for i in (1, 2))
        losses = torch.vmap(loss)(weights, states, t, eps)
        optimizer.zero_grad()
        losses.sum().backward()  # no network's loss depends on another's weights
        optimizer.step()
        return losses.detach()

    return step


def one_by_one(seeds: int, n: int) -> Work:
    steps = [our_train_step(2, False, n, seed) for seed in range(seeds)]
    return lambda: [step() for step in steps]


# --- the plain way: a loop in PyTorch around the same networks, and diffusers' scheduler


def draw(data: torch.Tensor, n: int, steps: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch: x0, t and eps."""
    x0 = data[torch.randint(len(data), (n,), generator=g, device=DEVICE)]
    return x0, torch.randint(steps, (n,), generator=g, device=DEVICE), randn(*x0.shape, g=g)


def plain_scheduler(steps: int = STEPS) -> Any:
    from diffusers import DDPMScheduler

    betas = Schedule.linear(timesteps=steps).betas
    scheduler = DDPMScheduler(steps, trained_betas=betas.numpy(), variance_type="fixed_large", clip_sample=False)
    # Its own table is in float32, where alpha_bar ends at 0 and the predicted x0 at infinity.
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    return scheduler


def plain_train(net: Any, shape: tuple[int, ...], n: int, scheduler: Any, g: torch.Generator, bf16: bool = False) -> Work:
    optimizer, data = torch.optim.Adam(net.parameters(), lr=1e-3), randn(10 * n, *shape, g=g)

    def step() -> float:
        x0, t, eps = draw(data, n, len(scheduler.betas), g)
        with torch.autocast(x0.device.type, dtype=torch.bfloat16, enabled=bf16):
            predicted = net(scheduler.add_noise(x0, eps, t), t)
        loss = F.mse_loss(predicted.float(), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def plain_reverse(
    net: Any, shape: tuple[int, ...], n: int, scheduler: Any, g: torch.Generator, window: int = STEPS
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields, at every step, the state and what the variance over t < window needs: the sums of x0_hat and of its square."""
    x = randn(n, *shape, g=g)
    total, squares = (torch.zeros(n, *shape, dtype=torch.float64, device=DEVICE) for _ in range(2))
    for t in reversed(range(len(scheduler.betas))):
        with torch.no_grad():
            # Expanded, as in `reverse`: the network sees that every t is the same, and spares itself as much work.
            out = scheduler.step(net(x, torch.tensor([t], device=DEVICE).expand(n)), t, x, generator=g)
        x = out.prev_sample
        if t < window:
            x0_hat = out.pred_original_sample.double()
            total += x0_hat
            squares += x0_hat.square()
        yield x, total, squares


def plain_train_step(kind: int | str, n: int, bf16: bool = False) -> Work:
    return plain_train(*network(kind), n, plain_scheduler(), generator(), bf16)


def plain_reverse_step(n: int, kind: int | str) -> Work:
    (net, shape), scheduler, g = network(kind), plain_scheduler(), generator()
    walk = itertools.chain.from_iterable(plain_reverse(net, shape, n, scheduler, g) for _ in itertools.count())
    return lambda: next(walk)


def plain_whole(steps: int, n: int, times: int) -> Work:
    scheduler, k = plain_scheduler(times), WINDOW[1]

    def work() -> torch.Tensor:
        net, g = MLP(2), generator()
        step = plain_train(net, (2,), SMALL, scheduler, g)
        for _ in range(steps):
            step()
        ((_, total, squares),) = deque(plain_reverse(net, (2,), n, scheduler, g, k), maxlen=1)
        return (squares / k - (total / k).square()).mean(1)

    return work


# --- the arithmetic that no rewrite avoids: the trunk's products, two per block; backward twice as many


def floor(n: int, backward: bool, bf16: bool = False) -> tuple[Work, float, float]:
    """Bare products, on a processor in slices that fit the caches; their floating-point operations; their operands' bytes."""
    rows, dtype = min(n, _device.ROWS_IN_CACHE) if DEVICE.type == "cpu" else n, torch.bfloat16 if bf16 else torch.float32
    x, gradient, w = (randn(size, WIDTH).to(dtype) for size in (rows, rows, WIDTH))
    out, dw = torch.empty_like(x), torch.empty_like(w)
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


WORKS: dict[str, Callable[..., Work]] = {
    "train": our_train_step, "reverse": our_reverse_step, "whole": our_whole,
    "plain.train": plain_train_step, "plain.reverse": plain_reverse_step, "plain.whole": plain_whole,
    "side by side": side_by_side, "one by one": one_by_one, "floor": lambda *a: floor(*a)[0],
}  # fmt: skip


def measure_own(count: int, threads: int, quick: bool) -> list[dict[str, Any]]:
    """What needs no code of the paper; prints each row of the table as soon as it is there."""
    rows: list[dict[str, Any]] = []
    some, few = max(count // 2, 5), max(count // 6, 5)

    def add(what: str, size: str, value: dict[str, float] | None, products: str = "float32", **more: Any) -> None:
        row = {"what": what, "size": size, "products": products, "threads": threads, "load": os.getloadavg()[0]}
        rows.append(row | {"ratio": value, **more})
        print(_own_row(rows[-1]), flush=True)

    def compare(size: int, specs: dict[str, Spec], times: int, products: str = "float32") -> None:
        """A row for each work; what goes by the name of base or floor is what the others are held against. All of them multiply
        in one precision."""
        seconds = rounds(specs, times, None, threads)
        base, bare = seconds.pop("base", None), seconds.pop("floor", None)
        for what, ours in seconds.items():
            against = None if base is None or "unscored" in what else ratio(base, ours)
            over = ratio(ours, bare) if bare else None
            add(what, f"{size:,}", against, products, seconds=spread(ours), ours_over_floor=over)

    def growth(what: str, sizes: tuple[int, ...], spec: Callable[[int], Spec]) -> None:
        """The b of cost ~ size^b, by least squares on the logarithms, in each round."""
        seconds = rounds({str(size): spec(size) for size in sizes}, few, None, threads)
        logs = [math.log(size) for size in sizes]
        slopes = [
            statistics.linear_regression(logs, [math.log(s) for s in one]).slope for one in zip(*seconds.values(), strict=True)
        ]
        add(f"growth, {what}", f"{sizes[0]:,} to {sizes[-1]:,}", spread(slopes))

    for line in OWN_HEAD:
        print(line)
    points = (SMALL,) if quick else (SMALL, BATCH, 10 * BATCH)
    for n in points:
        specs: dict[str, Spec] = {"base": ("plain.train", 2, n), "training step": ("train", 2, False, n)}
        times = some if n <= BATCH else few
        compare(n, specs | {"floor": ("floor", n, True)}, times)
        if gains_bf16(torch.device("cpu")):  # the floor is one of float32
            specs = {"base": ("plain.train", 2, n, True), "training step": ("train", 2, False, n, 0, True)}
            compare(n, specs, times, "bfloat16")
    for n in points:
        specs = {"base": ("plain.reverse", n, 2), "reverse step, scored": ("reverse", n, 2, True)}
        specs |= {"reverse step, unscored": ("reverse", n, 2, False), "floor": ("floor", n, False)}
        compare(n, specs, some if n <= BATCH else few)
    compare(IMAGES, {"base": ("plain.train", "U-Net", IMAGES), "U-Net, training step": ("train", "U-Net", False, IMAGES)}, some)
    specs = {"base": ("plain.reverse", IMAGES, "U-Net"), "U-Net, reverse, scored": ("reverse", IMAGES, "U-Net", True)}
    compare(IMAGES, specs | {"U-Net, reverse, unscored": ("reverse", IMAGES, "U-Net", False)}, some)
    compare(SMALL, {"base": ("plain.whole", 50, SMALL, 100), "train, sample, score": ("whole", 50, SMALL, 100)}, few)
    for n in (SMALL // 10, SMALL):
        compare(n, {"base": ("one by one", SEEDS, n), f"{SEEDS} seeds side by side": ("side by side", SEEDS, n)}, some)
    growth("points", (1_000, 3_000, 10_000, 30_000), lambda n: ("reverse", n, 2, True))
    growth("reverse steps", (100, 200, 400), lambda times: ("whole", 0, SMALL // 4, times))
    growth("training steps", (10, 20, 40, 80), lambda steps: ("whole", steps, 0, STEPS))
    return rows


def measure(paper: Path, count: int, threads: int, quick: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def compare(what: str, dim: int, n: int, ours: dict[str, Spec], base: Spec, times: int) -> None:
        bare: Spec = ("floor", n, what == "training step")
        seconds = rounds({"paper": base, **ours, "floor": bare}, times, paper, threads)
        _, flops, size = floor(*bare[1:])
        for name in ours:
            rows.append({
                "what": what, "how": name, "dim": dim, "n": n, "threads": threads, "load": os.getloadavg()[0],
                "products": "bfloat16" if ours[name][0] == "train" and ours[name][-1] else "float32",
                "paper_over_ours": ratio(seconds["paper"], seconds[name]),
                "ours_over_floor": ratio(seconds[name], seconds["floor"]),
                "paper_over_floor": ratio(seconds["paper"], seconds["floor"]),
                "gflop": flops / 1e9, "floor_mb": size / 1e6,
                "floor_gflops": flops / 1e9 / statistics.median(seconds["floor"]),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)

    gains = gains_bf16(torch.device("cpu"))
    for dim in (1, 2):
        ours: dict[str, Spec] = {"eager": ("train", dim, False, BATCH, 0, gains)}
        if not quick:
            ours["compiled"] = ("train", dim, True, BATCH, 0, gains)
        if gains:
            ours["eager, float32"] = ("train", dim, False, BATCH, 0, False)
        compare("training step", dim, BATCH, ours, ("paper.train_step", dim), count)
    for n in (10_000,) if quick else (10_000, 100_000):
        ours = {"metric on": ("reverse", n, 2, True), "metric off": ("reverse", n, 2, False)}
        times = count if n == 10_000 else max(count // 3, 5)
        compare("reverse step", 2, n, ours, ("paper.reverse_step", n, 2), times)
    n = 10_000 if quick else 100_000
    ours = {"metric on": ("reverse", n, 1, True), "metric on, tabulated": ("reverse", n, 1, True, 2048 if quick else 16_384)}
    compare("reverse step", 1, n, ours, ("paper.reverse_step", n, 1), max(count // 3, 5))
    return rows


def measure_gpu(paper: Path | None, count: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds a step on a GPU, each way in turn."""
    bf16 = gains_bf16(device)
    rows: list[dict[str, Any]] = []

    def compare(what: str, ways: dict[str, Spec]) -> None:
        seconds = rounds(ways, count, paper, 2, device)
        rows.append({"what": what, "ms": {way: 1000 * statistics.median(values) for way, values in seconds.items()}})
        print(json.dumps(rows[-1]), flush=True)

    def trained(kind: int | str, n: int) -> dict[str, Spec]:
        ways: dict[str, Spec] = {"eager": ("train", kind, False, n, 0, bf16), "compiled": ("train", kind, True, n, 0, bf16)}
        if device.type == "cuda":
            ways["captured"] = ("train", kind, False, n, 0, bf16, True)
            ways["compiled, captured"] = ("train", kind, True, n, 0, bf16, True)
        return ways

    for dim in (1, 2):
        ways = trained(dim, BATCH) | {"bare products": ("floor", BATCH, True, bf16)}
        if paper:
            ways["the paper's code"] = ("paper.train_step", dim)
        compare(f"training step, {dim}D, {BATCH:,} points", ways)
    compare(f"training step, U-Net, {2 * IMAGES} images of 32 x 32", trained("U-Net", 2 * IMAGES))
    for n in (BATCH, 10 * BATCH):
        ways = {"eager": ("reverse", n, 2, True), "bare products": ("floor", n, False)}
        if paper:
            ways["the paper's code"] = ("paper.reverse_step", n, 2)
        compare(f"reverse step, 2D, scored, {n:,} points", ways)
    for n in (SMALL, BATCH):
        ways = {"eager": ("one by one", SEEDS, n), "side by side": ("side by side", SEEDS, n)}
        compare(f"training step of {SEEDS} networks, {n:,} points each", ways)
    trains = "bfloat16" if bf16 else "float32"
    named = {"device": describe_device(device), "torch": torch.__version__}
    return named | {"training": trains, "rounds": count, "rows": rows}


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
        "gains_bf16": gains_bf16(torch.device("cpu")),
    }


def precision(seeds: int, scale: str) -> list[dict[str, Any]]:
    """What training in bfloat16 does to a model: the main experiment of the line, the same seeds in both. Resumes in `runs`."""
    rows = []
    experiment = experiments.get("line123", scale)
    mixture, schedule = experiment.data(), experiment.schedule()
    for seed, how in itertools.product(range(seeds), ("float32", "bfloat16")):
        os.environ["TINYHALL_PRECISION"] = how
        place = ROOT / "runs" / f"precision-{how}"
        made = reproduce(experiment, seed, root=place, runs=place, samplers=("large", "small"), progress=False)
        assert made.info["precision"] == how, "a run that was trained otherwise lies in its folder"
        x0, t = mixture.sample(200_000, generator(1)), torch.arange(200_000) % schedule.timesteps
        x = schedule.q_sample(x0, t, torch.randn(x0.shape, generator=generator(2)))
        with torch.no_grad():
            excess = (made.net(x, t) - mixture.denoiser(schedule)(x, t)).square().mean()
        row: dict[str, Any] = {"precision": how, "seed": seed, "excess": float(excess), "scale": scale}
        for sampler in ("large", "small"):
            row[sampler] = made.metrics[sampler]["fraction"]["5"]
            row[f"auroc {sampler}"] = made.metrics[sampler]["windows"][spelled(WINDOW)]["5"]["auroc"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    del os.environ["TINYHALL_PRECISION"]
    return rows


# --- the page


def _spread(r: dict[str, float] | None) -> tuple[str, str]:
    return ("", "") if r is None else (f"{r['median']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}")


OWN_HEAD = (
    f"| {'':24} | {'size':>15} | {'products':>17} | {'ms':>8} | {'ratio':>6} | {'quartiles':>12} | {'/ floor':>7} |",
    f"|{'-' * 26}|{'-' * 16}:|{'-' * 18}:|{'-' * 9}:|{'-' * 7}:|{'-' * 13}:|{'-' * 8}:|",
)


def _own_row(r: dict[str, Any]) -> str:
    median, quartiles = _spread(r["ratio"])
    took, over = r.get("seconds"), _spread(r.get("ours_over_floor"))[0]
    ms = f"{1000 * took['median']:,.1f}" if took else ""
    sizes = f"{r['size']:>15} | {r['products']:>17}"
    return f"| {r['what']:24} | {sizes} | {ms:>8} | {median:>6} | {quartiles:>12} | {over:>7} |"


def _own_table(result: dict[str, Any]) -> str:
    lines = [_measured_on(result["own"]["machine"])]
    for threads in sorted({r["threads"] for r in result["own"]["rows"]}):
        rows = [r for r in result["own"]["rows"] if r["threads"] == threads]
        loads, pairs = [r["load"] for r in rows], [r["ratio"]["pairs"] for r in rows if r["ratio"]]
        lines += [
            "",
            f"{'One thread' if threads == 1 else f'{threads} threads'}, {min(pairs)} to {max(pairs)} rounds, "
            f"load average {min(loads):.1f} to {max(loads):.1f}:",
            "",
            *OWN_HEAD,
            *map(_own_row, rows),
        ]
    return "\n".join(lines)


def _measured_on(m: dict[str, Any]) -> str:
    bf16 = "multiplies bfloat16" if m["gains_bf16"] else "does not multiply bfloat16"
    return (
        f"Measured on {m['processor']}, {m['cores']} cores, vectors {m['vectors']}, torch {m['torch']}. "
        f"It {bf16} in hardware, so `th.fit` trains points in {'bfloat16' if m['gains_bf16'] else 'float32'} there."
    )


def _precision_table(result: dict[str, Any]) -> str:
    rows = result["precision"]
    kinds = ("float32", "bfloat16")
    values = {
        "mean squared error of eps against the exact denoiser": [("excess", lambda r: r["excess"], ".2e")],
        "hallucinated": [(s, lambda r, s=s: r[s][0], ".1e") for s in ("large", "small")],
        "AUROC": [(s, lambda r, s=s: r[f"auroc {s}"][0], ".3f") for s in ("large", "small")],
    }
    seeds = len({r["seed"] for r in rows})
    lines = [
        f"Means over {seeds} seeds of line123 at {rows[0]['scale']} scale, and what bfloat16 adds, with its 95% interval:",
        "",
        "| | variance | float32 | bfloat16 | difference |",
        "|---|---|--:|--:|--:|",
    ]
    for label, columns in values.items():
        for name, read, spec in columns:
            told = {k: [read(r) for r in sorted(rows, key=lambda r: r["seed"]) if r["precision"] == k] for k in kinds}
            apart = stats.mean([b - a for a, b in zip(*told.values(), strict=True)])
            cells = [f"{statistics.mean(told[k]):{spec}}" for k in kinds] + [f"{apart:{spec}}"]
            lines.append(f"| {label} | {'' if name == 'excess' else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _table(result: dict[str, Any]) -> str:
    lines = [
        _measured_on(result["machine"]),
        "",
        "| | points | our products | threads | paper / ours | quartiles | pairs | ours / floor | paper / floor |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in result["rows"]:
        median, quartiles = _spread(r["paper_over_ours"])
        lines.append(
            f"| {r['what']}, {r['dim']}D, {r['how'].removesuffix(', float32')} | {r['n']:,} | {r['products']} | {r['threads']} "
            f"| **{median}** | {quartiles} "
            f"| {r['ours_over_floor']['pairs']} | {r['ours_over_floor']['median']:.2f} | {_spread(r['paper_over_floor'])[0]} |"
        )
    lines += ["", "| goal | measured | met |", "|---|---|---|"]
    for what, label, products in (
        ("training step", "a training step 3 times as fast, both in float32", "float32"),
        ("training step", "a training step 3 times as fast, ours in bfloat16", "bfloat16"),
        ("reverse step", "a reverse step, metric on, 3 times as fast, both in float32", "float32"),
    ):
        hows = ("eager", "compiled", "eager, float32", "metric on")
        found = [
            r["paper_over_ours"]["median"]
            for r in result["rows"]
            if r["what"] == what and r["paper_over_ours"] and r["products"] == products and r["how"] in hows
        ]
        if found:
            low, high = min(found), max(found)
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


def _gpu_table(result: dict[str, Any]) -> str:
    gpu = result["gpu"]
    lines = [
        f"Measured on {gpu['device']}, torch {gpu['torch']}.",
        "",
        "| | how | ms a step | eager / this | paper / this |",
        "|---|---|--:|--:|--:|",
    ]
    for r in gpu["rows"]:
        for i, (way, ms) in enumerate(r["ms"].items()):
            against = (f"{r['ms'][base] / ms:.1f}" if base in r["ms"] else "" for base in ("eager", "the paper's code"))
            lines.append(f"| {'' if i else r['what']} | {way} | {ms:.2f} | {' | '.join(against)} |")
    lines += ["", *_gpu_goals({r["what"]: r["ms"] for r in gpu["rows"]})]
    return "\n".join(lines)


def _gpu_goals(ms: dict[str, dict[str, float]], seeds: int = 3) -> list[str]:
    """The goals of the paper's half on points: a training step, and all models of chapters 1 and 2 at the paper's scale."""
    ours, theirs = "compiled, captured", "the paper's code"
    steps = [ms[f"training step, {dim}D, {BATCH:,} points"] for dim in (1, 2)]
    if not all(ours in step and theirs in step for step in steps):
        return []
    times = [step[theirs] / step[ours] for step in steps]
    half = [experiments.EXPERIMENTS[name] for name in HALF]
    took = {way: sum(e.steps * steps[e.data().dim - 1][way] for e in half) * seeds / 60_000 for way in (ours, theirs)}
    said = f"{took[ours]:.0f} minutes of training, calculated, drawing not counted; by the paper's code {took[theirs]:.0f}"
    return [
        "| goal | measured | met |",
        "|---|---|---|",
        f"| a training step of points 10 times as fast as the paper's | {min(times):.1f} to {max(times):.1f} "
        f"| {'yes' if min(times) >= 10 else 'no'} |",
        f"| the {len(half)} models of chapters 1 and 2, {seeds} seeds each, in 15 minutes | {said} "
        f"| {'not run' if took[ours] < 15 else 'no'} |",
    ]


def write_page() -> None:
    result, page = json.loads(JSON.read_text()), PAGE.read_text()
    for mark, table in (
        ("<!-- speed.py writes from here -->", _table),
        ("<!-- and from here -->", _own_table),
        ("<!-- and precision from here -->", _precision_table),
        ("<!-- and of a GPU from here -->", _gpu_table),
    ):
        before, _, rest = page.partition(mark)
        _, end, after = rest.partition("<!-- to here -->")
        page = f"{before}{mark}\n\n{table(result)}\n\n{end}{after}"
    PAGE.write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", type=Path, help="the paper's folder gaussian_experiments")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing compiled, no large runs; changes no file")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parts = "renew one part of the JSON: rows are the paper's; precision trains six models, most of an hour"
    parser.add_argument("--only", choices=("own", "rows", "memory", "precision", "gpu"), help=parts)
    parser.add_argument("--page", action="store_true", help="only write the JSON's numbers into the page")
    args = parser.parse_args()
    if args.page:
        write_page()
        return
    if args.only == "rows" and not args.paper:
        parser.error("--only rows: expected --paper PATH, got none")
    count = 5 if args.quick else args.rounds
    # What this run does not measure stays: it may come from a machine that had the paper's code.
    result: dict[str, Any] = json.loads(JSON.read_text()) if JSON.exists() else {"rows": [], "memory": [], "agreement": []}

    def renewed(old: list[dict[str, Any]], measured: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        return [row for row in old if row["threads"] not in args.threads] + [row for k in args.threads for row in measured(k)]

    if args.only in (None, "own"):
        rows = renewed(result.get("own", {"rows": []})["rows"], lambda k: measure_own(count, k, args.quick))
        result["own"] = {"machine": machine(), "rows": rows}
    if args.paper and args.only in (None, "rows"):
        result["machine"] = machine()
        result["agreement"] = [agreement(Paper(args.paper), dim) for dim in (1, 2)]
        result["rows"] = renewed(result["rows"], lambda k: measure(args.paper, count, k, args.quick))
    if args.only == "gpu":
        result["gpu"] = measure_gpu(args.paper, count, _device.pick("cuda"))
    if args.only == "precision":
        result["precision"] = precision(1 if args.quick else 3, "smoke" if args.quick else "laptop")
    if args.only in (None, "memory") and sys.platform.startswith("linux"):
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
