"""Files that can be trusted: safetensors and JSON, nothing unpickled, never half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _check

_LARGEST = 4 * 2**30  # bytes; far beyond any artifact of this project


def write(path: str | Path, fill: Callable[[Path], None]) -> None:
    """Has `fill` write a file beside `path`, then renames it: a reader sees the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name, not a random one: what a killed process left behind, the next write replaces.
    part = path.with_name(f".{path.name}.part")
    try:
        fill(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)  # safetensors writes for the owner alone, and others read an artifact too
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds `folder`, which is made if need be, against every other process that asks; a killed process lets go of it.

    Raises:
        TinyhallError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)  # the folder itself: no lock file stays behind
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _check.TinyhallError(f"checkpoint: expected {folder} to itself, got another process at work in it") from None
        yield
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"

    def fill(part: Path) -> None:
        part.write_text(text)

    write(path, fill)


def read_json(path: str | Path) -> Any:
    """Raises TinyhallError where the file is missing or not JSON."""
    try:
        return json.loads(_existing(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _check.TinyhallError(f"artifact: expected JSON, got something else in {path} ({error})") from error


def write_tensors(path: str | Path, tensors: dict[str, Tensor], note: dict[str, str] | None = None) -> None:
    """Raises TinyhallError where the file cannot be written, such as on a full disk; what was there before stays."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    try:
        write(path, lambda part: save_file(plain, part, metadata=note or {}))
    except SafetensorError as error:
        raise _check.TinyhallError(f"artifact: expected to write {path}, got {error}") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the note written with them.

    Raises:
        TinyhallError: a file that is missing, truncated, too large, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    path = _existing(path)
    if path.stat().st_size > _LARGEST:
        raise _check.TinyhallError(f"artifact: expected at most {_LARGEST} bytes, got {path.stat().st_size} in {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned: a mapped file that is replaced under a live tensor would change it.
            return {k: file.get_tensor(k).clone() for k in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise _check.TinyhallError(f"artifact: expected a whole safetensors file, got {path} ({error})") from error


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise _check.TinyhallError(f"artifact: expected a file, got nothing at {path}")
    return path


def load_weights(net: torch.nn.Module, path: str | Path) -> None:
    """Fills `net` from a safetensors file; half precision is widened to the network's own.

    Raises:
        TinyhallError: a bad file, or tensors of another network.
    """
    tensors, _ = read_tensors(path)
    own = net.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        there, here = tensors.get(name), own.get(name)
        if there is None or here is None or there.shape != here.shape:
            raise _check.TinyhallError(
                f"artifact: expected tensor {name} {_shape(here)}, got {_shape(there)} in {path}; it is of another network"
            )
        if not bool(torch.isfinite(there.float()).all()):
            raise _check.TinyhallError(f"artifact: expected finite weights, got others in {name} of {path}")
    net.load_state_dict({k: v.to(own[k].dtype) for k, v in tensors.items()})


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"of shape {tuple(tensor.shape)}"
