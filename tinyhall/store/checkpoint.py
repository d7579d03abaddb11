"""`fit`: training that survives kills. It drives `tinyhall.core.training` with a bar, checkpoints, resume and a clean stop."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..core import _check, _renamed
from ..core import device as _device
from ..core._typing import Float, Int, Tensor
from ..core.schedule import Schedule
from ..core.training import Run, TrainingConfig, start
from .files import alone, differing, read_tensors, write_tensors

_LATER = ("schedule betas", "net layout")  # settings that checkpoints have not always had: one without them loads


def gains_bf16(device: torch.device, images: bool = False) -> bool:
    """Whether bfloat16 products are faster here than float32 ones. TINYHALL_PRECISION=float32 or bfloat16 overrules it.

    They are on recent GPUs and on processors with matrix tiles (AMX); on one with AVX-512's dot products alone they are for
    points, but not for the small convolutions that images pass through.

    Raises:
        TinyhallError: another TINYHALL_PRECISION.
    """
    wanted = os.environ.get("TINYHALL_PRECISION")
    if wanted:
        if wanted not in ("float32", "bfloat16"):
            raise _check.fail("TINYHALL_PRECISION", wanted, "float32 or bfloat16")
        return wanted == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # No public names for these yet.
    asks = ["_is_amx_tile_supported"] + ([] if images else ["_is_avx512_bf16_supported"])
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asks)


def settings(run: Run, note: str = "") -> dict[str, Any]:
    """What a run must agree on to go on as it began. `note` is any text beside, such as an experiment's hash."""
    config, net = run.config, run.net
    told = {
        "batch_size": config.batch(run.data),
        "lr": config.lr,
        "ema": config.ema,
        "schedule": run.schedule.name,
        # rounded: on another processor their last bits may be others
        "schedule betas": fingerprint(run.schedule.betas.float()),
        "data": fingerprint(run.data),
        "net": f"{type(net).__name__}, {sum(p.numel() for p in net.parameters())} parameters",
        "net layout": _layout(net),
        "note": note,
    }
    if run.label is not None:
        told |= {"label": fingerprint(run.label), "label_dropout": config.label_dropout}
    return told


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


def save(run: Run, path: str | Path, agreed: dict[str, Any]) -> None:
    """One safetensors file, written beside and renamed, so that a killed process leaves the last one whole."""
    raw = run.net.state_dict() if run.raw is None else run.raw
    tensors = {f"net.{k}": v for k, v in raw.items()}
    tensors |= {f"ema.{k}": v for k, v in (run.ema or {}).items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
    tensors["generator"] = run.generator.get_state()
    tensors["losses"] = torch.tensor(run.losses, dtype=torch.float64)
    note = {"settings": json.dumps(agreed, sort_keys=True), "step": str(run.step), "order": str(run.order)}
    note |= {"seconds": f"{run.seconds:.1f}", "bf16": str(int(run.config.bf16))}
    write_tensors(path, tensors, note)


def load(run: Run, path: str | Path, agreed: dict[str, Any]) -> None:
    """Takes up the state saved at `path`; its products are taken as they were.

    Raises:
        TinyhallError: a file that is missing, damaged, or of a run with other settings.
    """
    tensors, note = read_tensors(path)
    try:
        before, step, order = json.loads(note["settings"]), int(note["step"]), int(note["order"])
        seconds, bf16 = float(note.get("seconds", 0)), bool(int(note.get("bf16", 0)))
        if not isinstance(before, dict) or step < 0 or not 0 <= seconds < math.inf:
            raise ValueError(f"step {step}, {seconds} seconds")
    except (KeyError, ValueError, RecursionError) as error:
        raise _check.TinyhallError(f"checkpoint: expected a training checkpoint, got another file at {path}") from error
    before = {key: agreed[key] for key in _LATER} | before
    if (key := differing(agreed, before)) is not None:
        raise _check.TinyhallError(
            f"checkpoint: expected one with {key}={agreed.get(key)!r}, got {before.get(key)!r} in {path}"
        )
    state, device = tensors.get("generator"), run.generator.device.type
    if state is not None and state.shape != run.generator.get_state().shape:
        raise _check.TinyhallError(
            f"checkpoint: expected one made on the same kind of device, {device}, got the random state of another in {path}"
        )
    try:
        _restore(run, tensors)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise _check.TinyhallError(f"checkpoint: expected the tensors of this network, got others in {path}") from error
    run.step, run.order, run.seconds = step, order, seconds
    run.config = dataclasses.replace(run.config, bf16=bf16)


def _restore(run: Run, tensors: dict[str, Tensor]) -> None:
    """Raises KeyError, and leaves the run as it is, where names, shapes or types differ."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    weights, parameters = run.net.state_dict(), dict(enumerate(run.net.parameters()))
    adam: dict[int, dict[str, Tensor]] = {}
    for key, value in under("adam.").items():
        index, _, name = key.partition(".")
        adam.setdefault(int(index), {})[name] = value
    # Nothing is touched before all fits: torch would take what does not, and fail in a later step or never.
    _alike("net", under("net."), weights)
    for i, moments in adam.items():
        _alike(f"adam.{i}", moments, {"step": torch.tensor(0.0), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]})
    if run.ema is not None:
        _alike("ema", under("ema."), run.ema)
    _alike("generator", {"": tensors["generator"]}, {"": run.generator.get_state()})
    losses = tensors["losses"]
    _alike("losses", {"": losses}, {"": torch.empty(losses.numel(), dtype=torch.float64)})
    run.net.load_state_dict(under("net."))
    run.raw = None
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": adam})
    run.generator.set_state(tensors["generator"])
    if run.ema is not None:
        run.ema = {k: v.to(run.ema[k].device) for k, v in under("ema.").items()}
    run.losses = losses.tolist()


def _alike(name: str, there: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    """Raises KeyError unless both have the same names, shapes and types, and what is there is finite."""
    if there.keys() != here.keys():
        raise KeyError(name)
    for key, value in there.items():
        finite = not value.is_floating_point() or bool(torch.isfinite(value).all())
        if value.shape != here[key].shape or value.dtype != here[key].dtype or not finite:
            raise KeyError(f"{name}.{key}")


@_renamed.keywords(steps="train_steps")
def fit(
    net: nn.Module,
    data: Float[Tensor, "n *shape"],
    schedule: Schedule,
    *,
    train_steps: int,
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
    reached `train_steps`, or gone beyond them, is returned as it is: see `Run.step`. On return the network holds the weights to
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
    _check.positive_int("train_steps", train_steps)
    config = TrainingConfig(batch_size, lr, label_dropout, ema, microbatch=microbatch)
    run = start(net, data, schedule, config, generator=generator, label=label)
    agreed, device = settings(run, note), run.data.device
    path = None if checkpoint is None else Path(checkpoint)
    with contextlib.nullcontext() if path is None or _device.rank() else alone(path.parent):
        if path is not None and path.exists():
            # A run goes on as it began, on whatever machine: other products would end in other bits.
            load(run, path, agreed)
        else:
            bf16 = gains_bf16(device, images=data.ndim > 2) if bf16 is None else bf16
            run.config = dataclasses.replace(run.config, bf16=bf16)
        if compile:
            net.compile()
        if captured is None:
            captured = compile and device.type == "cuda" and _device.processes() == 1
        run.config = dataclasses.replace(run.config, captured=captured)
        _drive(run, train_steps, path, agreed=agreed, every=every, progress=progress)
        _device.barrier()  # the checkpoint is there for all processes
    if run.ema is not None:
        run.raw = {k: v.clone() for k, v in net.state_dict().items()}
        net.load_state_dict(run.ema)
    net.eval()
    return run


def _drive(run: Run, end: int, path: Path | None, *, agreed: dict[str, Any], every: int, progress: bool) -> None:
    """Takes the steps, with a bar, checkpoints, a look at the loss, and a clean stop."""
    lead = _device.rank() == 0
    recent = torch.zeros((), device=run.generator.device)
    since = run.step  # after a resume in between, the mean covers what this process saw
    show = progress and lead
    bar = tqdm(total=end, initial=run.step, desc="training", unit="step", disable=not show, mininterval=0.5, leave=False)
    began = time.perf_counter() - run.seconds
    stop = False
    with _Interrupt() as interrupt, bar:
        for step in run.steps(end):
            recent += step.loss
            stop = interrupt.agreed(recent.device)
            complete = step.step % every == 0 or step.step == end
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
                    save(run, path, agreed)
            if stop:
                break
        if stop or interrupt.agreed(recent.device):  # the latter: while the last step was recorded
            _device.barrier()  # no process goes before the first has written
            raise KeyboardInterrupt(f"stopped at step {run.step}" + (f", saved in {path}" if path else ""))


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
