"""Training in the open: `train` yields every step. `tinyhall.store` drives it with progress, checkpoints and resume."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import _check, _renamed
from . import device as _device
from ._typing import Float, Int, Tensor
from .network import where
from .schedule import Schedule

_WARM = 3  # steps taken one kernel at a time before a step is captured: they make what is made once


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        batch_size: samples a step; a set that is smaller is used whole. Every epoch is shuffled anew.
        lr: of Adam, constant.
        label_dropout: share of the labels replaced by -1, "no class".
        ema: decay of a moving average of the weights; None for none.
        bf16: autocast to bfloat16; worth it where `tinyhall.store.checkpoint.gains_bf16` says so.
        microbatch: rows sent through the network at a time, their gradients added up; by default 2,500 for points on a
            processor, where that keeps activations in cache, otherwise the whole batch.
        captured: take the steps as one CUDA graph: a GPU is then handed hundreds of small kernels at once, and does not wait
            for the processor. The network must do the same at every step, keep its buffers in place, and ask nothing of the
            processor; what is changed between two yields, the rate or the weights that train, comes too late.

    Raises:
        TinyhallError: a value out of its range.
    """

    batch_size: int
    lr: float
    label_dropout: float = 0.0
    ema: float | None = None
    bf16: bool = False
    microbatch: int | None = None
    captured: bool = False

    def __post_init__(self) -> None:
        _check.positive_int("batch_size", self.batch_size)
        _check.positive("lr", self.lr)
        _check.number("label_dropout", self.label_dropout, "a share in [0, 1]", lambda v: 0 <= v <= 1)
        if self.ema is not None:
            _check.number("ema", self.ema, "None or a number in (0, 1)", lambda v: 0 < v < 1)
        if self.microbatch is not None:
            _check.positive_int("microbatch", self.microbatch)

    def batch(self, data: Tensor) -> int:
        return min(self.batch_size, len(data))


@dataclass(frozen=True)
class TrainStep:
    """What `train` yields after each optimiser step."""

    step: int  # 1 after the first
    loss: Float[Tensor, ""]  # mean squared error of eps, still on the device: float(loss) waits for it
    run: Run


@dataclass
class Run:
    """A training, and everything that it must keep to go on as if it had never stopped: `steps` goes on from `step`."""

    net: nn.Module
    data: Float[Tensor, "n *shape"]
    schedule: Schedule
    config: TrainingConfig
    generator: torch.Generator
    label: Int[Tensor, " n"] | None
    optimizer: torch.optim.Adam
    order: int  # seeds the shuffling of each epoch
    step: int = 0
    ema: dict[str, Tensor] | None = None
    losses: list[float] = field(default_factory=list)  # one per `every` steps of fit
    seconds: float = 0.0  # of wall time in fit, interruptions left out
    raw: dict[str, Tensor] | None = None  # the trained weights, where fit has put their average in the network

    def weights(self) -> dict[str, Tensor]:
        """The weights to sample with: the moving average where there is one."""
        return dict(self.net.state_dict()) if self.ema is None else self.ema

    def steps(self, end: int) -> Iterator[TrainStep]:
        """Takes optimiser steps until `end`, counted from the run's beginning, and yields each. A run that `fit` returned goes
        on from its trained weights, not from their average."""
        if self.config.captured and (self.data.device.type != "cuda" or _device.processes() > 1):
            came = f"one on {self.data.device}, {_device.processes()} at work"
            raise _check.TinyhallError(f"captured: expected a network on a GPU and one process, got {came}")
        return _steps(self, _check.positive_int("end", end))


def start(
    net: nn.Module, data: Float[Tensor, "n *shape"], schedule: Schedule, config: TrainingConfig, *, generator: torch.Generator,
    label: Int[Tensor, " n"] | None = None,
) -> Run:  # fmt: skip
    """A run at step 0, which `train` begins. Raises as `train`."""
    if not isinstance(net, nn.Module) or next(net.parameters(), None) is None:
        raise _check.fail("net", net, "an nn.Module with parameters")
    device = where(net)
    if _check.generator("generator", generator).device.type != device.type:
        raise _check.TinyhallError(f"generator: expected one on {device}, the network's device, got {generator.device}")
    _check.floats("data", data)
    if label is not None:
        _check.labels("label", label, len(data))
        if isinstance(known := getattr(net, "classes", None), int):
            _check.classes(label, known)
        label = label.to(device)
    capturable = all(p.is_cuda for p in net.parameters())
    fused = all(p.device.type in ("cpu", "cuda") for p in net.parameters())  # not everywhere in older versions of torch
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, fused=fused, capturable=capturable)
    average = None if config.ema is None else {k: v.detach().clone() for k, v in net.state_dict().items()}
    order = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    # Detached: microbatches share a batch, and none may walk back into what made the data.
    return Run(net, data.detach().to(device), schedule, config, generator, label, optimizer, order, ema=average)


@_renamed.keywords(steps="train_steps")
def train(
    net: nn.Module, data: Float[Tensor, "n *shape"], schedule: Schedule, *, train_steps: int, generator: torch.Generator,
    label: Int[Tensor, " n"] | None = None, **config: Any,
) -> Iterator[TrainStep]:  # fmt: skip
    """Fits the network to predict the noise (Ho et al. 2020, algorithm 1), one yield per optimiser step.

    Args:
        net: predicts eps; trained in place, on the device where it is.
        data: float32 `[n, *shape]`; moved to that device once.
        train_steps: the optimiser steps to take; `Run.steps`, of the run that every step carries, takes more.
        generator: draws order, t and noise; on the network's device. The global generator is not touched.
        label: classes `[n]`, handed to the network.
        config: `batch_size`, `lr` and the other fields of `TrainingConfig`.

    Raises:
        TinyhallError: bad arguments. A loss that is not finite is the caller's to judge; `fit` stops at it.
    """
    _check.positive_int("train_steps", train_steps)
    return start(net, data, schedule, TrainingConfig(**config), generator=generator, label=label).steps(train_steps)


def _steps(run: Run, end: int) -> Iterator[TrainStep]:
    net, data, label, generator, config = run.net, run.data, run.label, run.generator, run.config
    device, batch_size = data.device, config.batch(data)
    schedule = run.schedule.to(device)
    in_cache = _device.ROWS_IN_CACHE if device.type == "cpu" and data.ndim == 2 else batch_size
    net.train()
    if run.raw is not None and run.step < end:
        net.load_state_dict(run.raw)
        run.raw = None
    _device.keep_freed_memory()
    per_epoch = len(data) // batch_size
    epoch, shuffled, first = -1, torch.empty(0), run.step
    weights: dict[str, Tensor] | None = None  # where they lie, once a graph writes to the same places at every step

    def update(rows: Tensor) -> Tensor:
        x0 = data[rows]
        t = torch.randint(schedule.timesteps, (batch_size,), generator=generator, device=device)
        # Rows of a batch are exchangeable. Sorted by t, a microbatch holds few distinct ones (see MLP.time_features).
        t = t.sort().values
        eps = torch.randn(x0.shape, generator=generator, device=device)
        part = None
        if label is not None:
            drop = torch.rand(batch_size, generator=generator, device=device) < config.label_dropout
            part = label[rows].masked_fill(drop, -1)
        batch = (schedule.q_sample(x0, t, eps), t, eps, part)
        loss = _gradients(net, batch, config.microbatch or in_cache, config.bf16)
        run.optimizer.step()
        return loss

    step: Callable[[Tensor], Tensor] = update
    while run.step < end:
        if run.step // per_epoch != epoch:
            epoch = run.step // per_epoch
            # Seeded by the epoch, so that a resumed run deals the same batches without storing the order.
            seed = torch.Generator(device).manual_seed((run.order + epoch) % 2**63)
            shuffled = torch.randperm(len(data), generator=seed, device=device)
        at = run.step % per_epoch * batch_size
        rows = shuffled[at : at + batch_size]
        if config.captured and run.step == first + _WARM:
            step, weights = _capture(run, update, rows), net.state_dict()
        loss = step(rows)
        run.step += 1
        if run.ema is not None:
            _average(run.ema, weights or net.state_dict(), config.ema or 0.0, run.step)
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
    net: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor | None], microbatch: int, bf16: bool
) -> Float[Tensor, ""]:
    """Leaves d(mean squared error)/d(weights) in .grad, summed over microbatches and processes; returns the error. A batch is
    x_t, t, eps and, or None, the labels."""
    x, t, eps, label = batch
    for p in net.parameters():
        p.grad = None
    total = x.new_zeros(())
    # Each process takes its share of the rows; all of them drew the same batch.
    n, k, world = len(x), _device.rank(), _device.processes()
    low, high = n * k // world, n * (k + 1) // world
    for i in range(low, high, microbatch):
        part = slice(i, min(i + microbatch, high))
        # Of other devices torch 2.4 knows no autocast, not even to switch it off.
        with torch.autocast(x.device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
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
