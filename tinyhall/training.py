"""Training in the open: `train` yields every step, `fit` drives it with progress, checkpoints and resume."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import _check
from . import device as _device
from ._typing import Float, Int, Tensor
from .artifacts import alone, read_tensors, write_tensors
from .schedule import Schedule

_WARM = 3  # steps taken one kernel at a time before a step is captured: they make what is made once
_LATER = ("schedule betas", "net layout")  # settings that checkpoints have not always had: one without them loads


@dataclass(frozen=True)
class TrainStep:
    """What `train` yields after each optimiser step."""

    step: int  # 1 after the first
    loss: Float[Tensor, ""]  # mean squared error of eps, still on the device: float(loss) waits for it
    run: Run


@dataclass
class Run:
    """Everything that a training run must keep to go on as if it had never stopped."""

    net: nn.Module
    optimizer: torch.optim.Adam
    generator: torch.Generator
    order: int  # seeds the shuffling of each epoch
    settings: dict[str, Any]
    step: int = 0
    ema: dict[str, Tensor] | None = None
    losses: list[float] = field(default_factory=list)  # one per `every` steps of fit
    seconds: float = 0.0  # of wall time in fit, interruptions left out
    bf16: bool | None = None  # how its products are taken; None until fit has asked the device
    raw: dict[str, Tensor] | None = None  # the trained weights, where fit has put their average in the network

    def weights(self) -> dict[str, Tensor]:
        """The weights to sample with: the moving average where there is one."""
        return dict(self.net.state_dict()) if self.ema is None else self.ema

    def save(self, path: str | Path) -> None:
        """One safetensors file, written beside and renamed, so that a killed process leaves the last one whole."""
        raw = self.net.state_dict() if self.raw is None else self.raw
        tensors = {f"net.{k}": v for k, v in raw.items()}
        tensors |= {f"ema.{k}": v for k, v in (self.ema or {}).items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        note = {"settings": json.dumps(self.settings, sort_keys=True), "step": str(self.step), "order": str(self.order)}
        note |= {"seconds": f"{self.seconds:.1f}", "bf16": str(int(bool(self.bf16)))}
        write_tensors(path, tensors, note)

    def load(self, path: str | Path) -> None:
        """Takes up the state saved at `path`.

        Raises:
            TinyhallError: a file that is missing, damaged, or of a run with other settings.
        """
        tensors, note = read_tensors(path)
        try:
            settings, step, order = json.loads(note["settings"]), int(note["step"]), int(note["order"])
            seconds, bf16 = float(note.get("seconds", 0)), bool(int(note.get("bf16", 0)))
            if not isinstance(settings, dict) or step < 0 or not 0 <= seconds < math.inf:
                raise ValueError(f"step {step}, {seconds} seconds")
        except (KeyError, ValueError, RecursionError) as error:
            raise _check.TinyhallError(f"checkpoint: expected a training checkpoint, got another file at {path}") from error
        settings = {key: self.settings[key] for key in _LATER if key in self.settings} | settings
        for key in sorted(self.settings.keys() | settings.keys()):
            if self.settings.get(key) != settings.get(key):
                raise _check.TinyhallError(
                    f"checkpoint: expected one with {key}={self.settings.get(key)!r}, got {settings.get(key)!r} in {path}"
                )
        state, device = tensors.get("generator"), self.generator.device.type
        if state is not None and state.shape != self.generator.get_state().shape:
            raise _check.TinyhallError(
                f"checkpoint: expected one made on the same kind of device, {device}, got the random state of another in {path}"
            )
        try:
            self._restore(tensors)
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise _check.TinyhallError(f"checkpoint: expected the tensors of this network, got others in {path}") from error
        self.step, self.order, self.seconds, self.bf16 = step, order, seconds, bf16

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        weights, parameters = self.net.state_dict(), dict(enumerate(self.net.parameters()))
        adam: dict[int, dict[str, Tensor]] = {}
        for key, value in under("adam.").items():
            index, _, name = key.partition(".")
            adam.setdefault(int(index), {})[name] = value
        # Nothing is touched before all fits: torch would take what does not, and fail in a later step or never.
        _alike("net", under("net."), weights)
        for i, moments in adam.items():
            _alike(f"adam.{i}", moments, {"step": torch.tensor(0.0), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]})
        if self.ema is not None:
            _alike("ema", under("ema."), self.ema)
        _alike("generator", {"": tensors["generator"]}, {"": self.generator.get_state()})
        losses = tensors["losses"]
        _alike("losses", {"": losses}, {"": torch.empty(losses.numel(), dtype=torch.float64)})
        self.net.load_state_dict(under("net."))
        self.raw = None
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": adam})
        self.generator.set_state(tensors["generator"])
        if self.ema is not None:
            self.ema = {k: v.to(self.ema[k].device) for k, v in under("ema.").items()}
        self.losses = losses.tolist()


def _alike(name: str, there: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    """Raises KeyError unless both have the same names, shapes and types, and what is there is finite."""
    if there.keys() != here.keys():
        raise KeyError(name)
    for key, value in there.items():
        finite = not value.is_floating_point() or bool(torch.isfinite(value).all())
        if value.shape != here[key].shape or value.dtype != here[key].dtype or not finite:
            raise KeyError(f"{name}.{key}")


def start(
    net: nn.Module,
    data: Tensor,
    schedule: Schedule,
    *,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    label: Tensor | None = None,
    label_dropout: float = 0.0,
    ema: float | None = None,
    note: str = "",
) -> Run:
    """A run at step 0. `note` is any text that a checkpoint must agree on, such as a card's hash."""
    _check.positive("lr", lr)
    _check.number("label_dropout", label_dropout, "a share in [0, 1]", lambda v: 0 <= v <= 1)
    if ema is not None:
        _check.number("ema", ema, "None or a number in (0, 1)", lambda v: 0 < v < 1)
    settings = _settings(net, data, schedule, batch_size, lr, label, label_dropout, ema) | {"note": note}
    capturable = all(p.is_cuda for p in net.parameters())
    fused = all(p.device.type in ("cpu", "cuda") for p in net.parameters())  # not everywhere in older versions of torch
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=fused, capturable=capturable)
    average = None if ema is None else {k: v.detach().clone() for k, v in net.state_dict().items()}
    order = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return Run(net, optimizer, generator, order, settings, ema=average)


def _settings(
    net: nn.Module, data: Tensor, schedule: Schedule, batch_size: int, lr: float, label: Tensor | None, label_dropout: float,
    ema: float | None,
) -> dict[str, Any]:  # fmt: skip
    """What a run must agree on to go on as it began."""
    settings = {
        "batch_size": min(batch_size, len(data)),
        "lr": lr,
        "ema": ema,
        "schedule": schedule.name,
        "schedule betas": fingerprint(schedule.betas.float()),  # rounded: on another processor their last bits may be others
        "data": fingerprint(data),
        "net": f"{type(net).__name__}, {sum(p.numel() for p in net.parameters())} parameters",
        "net layout": _layout(net),
    }
    if label is not None:
        _check.labels("label", label, len(data))
        settings |= {"label": fingerprint(label), "label_dropout": label_dropout}
    return settings


def _layout(net: nn.Module) -> str:
    """A hash of what decides a network's function beside its weights: their names and shapes, and how they are used."""
    shapes = [(name, tuple(value.shape)) for name, value in net.state_dict().items()]
    used = [getattr(net, name, None) for name in ("blocks", "shared", "stem", "prediction")]
    velocity = getattr(net, "alpha_bar", None) is not None
    return f"sha256:{hashlib.sha256(repr((shapes, used, velocity)).encode()).hexdigest()[:16]}"


def fingerprint(data: Tensor) -> str:
    """Shape and a hash of the bytes: what a checkpoint knows its data by."""
    raw = data.detach().cpu().contiguous().numpy().tobytes()
    return f"{tuple(data.shape)} sha256:{hashlib.sha256(raw).hexdigest()[:16]}"


def train(
    net: nn.Module,
    data: Float[Tensor, "n *shape"],
    schedule: Schedule,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    label: Int[Tensor, " n"] | None = None,
    label_dropout: float = 0.0,
    ema: float | None = None,
    bf16: bool = False,
    microbatch: int | None = None,
    captured: bool = False,
    run: Run | None = None,
) -> Iterator[TrainStep]:
    """Fits the network to predict the noise (Ho et al. 2020, algorithm 1), one yield per optimiser step.

    Args:
        net: predicts eps; trained in place, on the device where it is.
        data: float32 `[n, *shape]`; moved to that device once.
        steps: the optimiser steps to reach, counted from the run's beginning.
        batch_size: samples a step; a set that is smaller is used whole. Every epoch is shuffled anew.
        lr: of Adam, constant.
        generator: draws order, t and noise; on the network's device. The global generator is not touched.
        label: classes `[n]`, handed to the network; `label_dropout` is the share of them replaced by -1, "no class".
        ema: decay of a moving average of the weights; None for none.
        bf16: autocast to bfloat16; worth it where `tinyhall.device.gains_bf16` says so.
        microbatch: rows sent through the network at a time, their gradients added up; by default 2,500 for points on a
            processor, where that keeps activations in cache, otherwise the whole batch.
        captured: take the steps as one CUDA graph: a GPU is then handed hundreds of small kernels at once, and does not wait
            for the processor. The network must do the same at every step, keep its buffers in place, and ask nothing of the
            processor; what is changed between two yields, the rate or the weights that train, comes too late.
        run: a run to continue, with its own generator, begun with the same network, data and settings; without one, a new one.
            One that `fit` returned goes on from its trained weights, not from their average.

    Raises:
        TinyhallError: bad arguments. A loss that is not finite is the caller's to judge; `fit` stops at it.
    """
    device = _place(net, generator)
    _check.floats("data", data)
    steps = _check.positive_int("steps", steps)
    batch_size = min(_check.positive_int("batch_size", batch_size), len(data))
    if label is not None:
        _check.labels("label", label, len(data))
        if isinstance(known := getattr(net, "classes", None), int):
            _check.classes(label, known)
    if captured and (device.type != "cuda" or _device.processes() > 1):
        came = f"one on {device}, {_device.processes()} at work"
        raise _check.TinyhallError(f"captured: expected a network on a GPU and one process, got {came}")
    if run is None:
        run = start(
            net, data, schedule, batch_size=batch_size, lr=lr, generator=generator, label=label, label_dropout=label_dropout,
            ema=ema,
        )  # fmt: skip
    else:
        _same(run, net, _settings(net, data, schedule, batch_size, lr, label, label_dropout, ema))
    if microbatch is None:
        microbatch = _device.ROWS_IN_CACHE if device.type == "cpu" and data.ndim == 2 else batch_size
    _check.positive_int("microbatch", microbatch)
    label = None if label is None else label.to(device)
    # Detached: microbatches share a batch, and none may walk back into what made the data.
    data = data.detach().to(device)
    return _steps(run, data, label, schedule, steps, batch_size, label_dropout, ema, bf16, microbatch, captured)


def _place(net: Any, generator: Any) -> torch.device:
    """The network's device, where the generator must be too."""
    first = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    if first is None:
        raise _check.fail("net", net, "an nn.Module with parameters")
    if _check.generator("generator", generator).device.type != first.device.type:
        raise _check.TinyhallError(f"generator: expected one on {first.device}, the network's device, got {generator.device}")
    return first.device


def _same(run: Run, net: nn.Module, settings: dict[str, Any]) -> None:
    if run.net is not net:
        raise _check.fail("net", type(net).__name__, "the run's own network")
    for key in sorted(settings.keys() | run.settings.keys() - {"note"}):
        if run.settings.get(key) != settings.get(key):
            raise _check.fail(key, settings.get(key), f"{run.settings.get(key)!r}, with which the run began")


def _steps(
    run: Run,
    data: Tensor,
    label: Tensor | None,
    schedule: Schedule,
    steps: int,
    batch_size: int,
    label_dropout: float,
    ema: float | None,
    bf16: bool,
    microbatch: int,
    captured: bool,
) -> Iterator[TrainStep]:
    net, generator, device = run.net, run.generator, data.device
    net.train()
    if run.raw is not None and run.step < steps:
        net.load_state_dict(run.raw)
        run.raw = None
    _device.keep_freed_memory()
    per_epoch = len(data) // batch_size
    epoch, shuffled, first = -1, torch.empty(0), run.step
    weights: dict[str, Tensor] | None = None  # where they lie, once a graph writes to the same places at every step
    schedule._hold(device)

    def update(rows: Tensor) -> Tensor:
        x0 = data[rows]
        t = torch.randint(schedule.steps, (batch_size,), generator=generator, device=device)
        # Rows of a batch are exchangeable. Sorted by t, a microbatch holds few distinct ones (see MLP.time_features).
        t = t.sort().values
        eps = torch.randn(x0.shape, generator=generator, device=device)
        part = None
        if label is not None:
            drop = torch.rand(batch_size, generator=generator, device=device) < label_dropout
            part = label[rows].masked_fill(drop, -1)
        loss = _gradients(net, schedule.q_sample(x0, t, eps), t, eps, part, microbatch, bf16)
        run.optimizer.step()
        return loss

    step: Callable[[Tensor], Tensor] = update
    while run.step < steps:
        if run.step // per_epoch != epoch:
            epoch = run.step // per_epoch
            # Seeded by the epoch, so that a resumed run deals the same batches without storing the order.
            seed = torch.Generator(device).manual_seed((run.order + epoch) % 2**63)
            shuffled = torch.randperm(len(data), generator=seed, device=device)
        at = run.step % per_epoch * batch_size
        rows = shuffled[at : at + batch_size]
        if captured and run.step == first + _WARM:
            step, weights = _capture(run, update, rows), net.state_dict()
        loss = step(rows)
        run.step += 1
        if run.ema is not None:
            _average(run.ema, weights or net.state_dict(), ema or 0.0, run.step)
        yield TrainStep(run.step, loss, run)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all captures: cuBLAS keeps its memory by stream


def _capture(run: Run, update: Callable[[Tensor], Tensor], rows: Tensor) -> Callable[[Tensor], Tensor]:
    """`update` as a CUDA graph, which reads its rows from one place and leaves its loss in another."""
    wanted = "False for a network that asks the processor, changes what it does, or moves its buffers"
    with torch.cuda.device(rows.device):
        place, graph = rows.clone(), torch.cuda.CUDAGraph()
        graph.register_generator_state(run.generator)  # a replay draws on, as a step does that is taken kernel by kernel
        before = {name: value.data_ptr() for name, value in run.net.state_dict().items()}
        try:
            with torch.cuda.graph(graph, stream=_stream(rows.device)):
                loss = update(place)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _check.TinyhallError(f"captured: expected {wanted}, got True; begin again in a new process") from error
    if before != {name: value.data_ptr() for name, value in run.net.state_dict().items()}:
        raise _check.fail("captured", True, wanted)
    written = [dict(state) for state in run.optimizer.state.values()]

    def step(rows: Tensor, held: Any = written) -> Tensor:  # else a run that is loaded would free what the graph writes to
        place.copy_(rows)
        graph.replay()
        return loss.clone()

    return step


def _gradients(
    net: nn.Module, x: Tensor, t: Tensor, eps: Tensor, label: Tensor | None, microbatch: int, bf16: bool
) -> Float[Tensor, ""]:
    """Leaves d(mean squared error)/d(weights) in .grad, summed over microbatches and processes; returns the error."""
    for p in net.parameters():
        p.grad = None
    total = x.new_zeros(())
    # Each process takes its share of the rows; all of them drew the same batch.
    n, k, world = len(x), _device.rank(), _device.processes()
    low, high = n * k // world, n * (k + 1) // world
    for i in range(low, high, microbatch):
        part = slice(i, min(i + microbatch, high))
        with _device.autocast(x.device, bf16):
            out = net(x[part], t[part]) if label is None else net(x[part], t[part], label[part])
        loss = F.mse_loss(_check.eps(out, x[part]).float(), eps[part], reduction="sum") / eps.numel()
        loss.backward()
        total += loss.detach()
    if world > 1:
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in net.parameters()]
        _device.sum_over_processes([*grads, total])
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g
    return total


@torch.no_grad()
def _average(ema: dict[str, Tensor], weights: dict[str, Tensor], decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))  # early weights are forgotten quickly
    moving = [name for name, value in weights.items() if value.dtype.is_floating_point]
    torch._foreach_lerp_([ema[name] for name in moving], [weights[name] for name in moving], 1 - decay)  # few kernels on a GPU
    for name in weights.keys() - set(moving):
        ema[name].copy_(weights[name])


def fit(
    net: nn.Module,
    data: Float[Tensor, "n *shape"],
    schedule: Schedule,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    label: Int[Tensor, " n"] | None = None,
    label_dropout: float = 0.0,
    ema: float | None = None,
    bf16: bool | None = None,
    microbatch: int | None = None,
    compile: bool = False,
    captured: bool | None = None,
    checkpoint: str | Path | None = None,
    every: int = 1000,
    note: str = "",
    progress: bool = True,
) -> Run:
    """Drives `train` to the end: a bar with loss and steps a second, checkpoints, resume, and a clean stop.

    Where `checkpoint` exists, the run goes on from it and ends in the bits of one that was never interrupted; one that has
    reached `steps`, or gone beyond them, is returned as it is: see `Run.step`. On return the network holds the weights to
    sample with (the moving average where `ema` is given).

    Args:
        bf16: None lets the device decide. A run that is resumed goes on as it began.
        compile: `torch.compile` the network; pays from some thousand steps on, and needs a C++ compiler.
        captured: as in `train`; None for yes where one process compiles for a GPU.
        checkpoint: a file; written every `every` steps, at the end, and on SIGINT.
        every: steps between checkpoints; also between entries of `Run.losses`, each a mean over that many steps, or
            over those since the run was resumed.
        note: what the checkpoint must agree on beside data, network and settings.
        Others: as in `train`.

    Raises:
        TinyhallError: bad arguments, a checkpoint of another run or in a folder where another process is at work, or a loss
            that is not finite.
        KeyboardInterrupt: after SIGINT, to whichever of the processes, once the checkpoint is written.
    """
    _check.floats("data", data)
    _check.positive_int("every", every)
    device = _place(net, generator)
    batch_size = min(_check.positive_int("batch_size", batch_size), len(data))
    run = start(
        net, data, schedule, batch_size=batch_size, lr=lr, generator=generator, label=label, label_dropout=label_dropout,
        ema=ema, note=note,
    )  # fmt: skip
    path = None if checkpoint is None else Path(checkpoint)
    with contextlib.nullcontext() if path is None or _device.rank() else alone(path.parent):
        if path is not None and path.exists():
            run.load(path)
        if compile:
            net.compile()
        # A run goes on as it began, on whatever machine: other products would end in other bits.
        if run.bf16 is None:
            run.bf16 = _device.gains_bf16(device, images=data.ndim > 2) if bf16 is None else bf16
        if captured is None:
            captured = compile and device.type == "cuda" and _device.processes() == 1
        steps_left = train(
            net, data, schedule, steps=steps, batch_size=batch_size, lr=lr, generator=generator, label=label,
            label_dropout=label_dropout, ema=ema, bf16=run.bf16, microbatch=microbatch, run=run,
            captured=captured,
        )  # fmt: skip
        _drive(run, steps_left, steps, path, every, progress)
        _device.barrier()  # the checkpoint is there for all processes
    if run.ema is not None:
        run.raw = {k: v.clone() for k, v in net.state_dict().items()}
        net.load_state_dict(run.ema)
    net.eval()
    return run


def _drive(run: Run, steps_left: Iterator[TrainStep], steps: int, path: Path | None, every: int, progress: bool) -> None:
    """Takes the steps, with a bar, checkpoints, a look at the loss, and a clean stop."""
    lead = _device.rank() == 0
    recent = torch.zeros((), device=run.generator.device)
    since = run.step  # after a resume in between, the mean covers what this process saw
    bar = _bar(steps, run.step, progress and lead)
    began = time.perf_counter() - run.seconds
    stop = False
    with _Interrupt() as interrupt, bar:
        for step in steps_left:
            recent += step.loss
            stop = interrupt.agreed(recent.device)
            complete = step.step % every == 0 or step.step == steps
            due = complete or stop
            if due or step.step % 100 == 0:
                mean = float(recent) / (step.step - since)
                # The loss was finite before the last update; a checkpoint must not keep what that update broke.
                broken = due and not all(bool(torch.isfinite(p).all()) for p in run.net.parameters())
                if not math.isfinite(mean) or broken:
                    came = "weights that are not" if math.isfinite(mean) else str(float(step.loss))
                    raise _check.TinyhallError(
                        f"loss: expected a finite number, got {came} by step {step.step}; "
                        "the last checkpoint is as it was. Look at the data's range, or lower lr"
                    )
                bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
            bar.update()
            if due:
                run.seconds = time.perf_counter() - began
                if complete:
                    run.losses.append(float(recent) / (step.step - since))
                    recent.zero_()
                    since = step.step
                if path is not None and lead:
                    run.save(path)
            if stop:
                break
        if stop or interrupt.agreed(recent.device):  # the latter: while the last step was recorded
            _device.barrier()  # no process goes before the first has written
            raise KeyboardInterrupt(f"stopped at step {run.step}" + (f", saved in {path}" if path else ""))


def _bar(steps: int, done: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, initial=done, desc="training", unit="step", disable=not show, mininterval=0.5, leave=False)


class _Interrupt:
    """Turns SIGINT into a request, so that no step is cut in two. Only the main thread may listen to signals."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked. All of them call this after the same steps, and stop together: a step needs all."""
        if _device.processes() == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=device)
        _device.sum_over_processes([asked])
        return float(asked) > 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
