"""Files that can be trusted: safetensors and JSON, nothing unpickled, never half-written, each with a digest of its content."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import _check, device

_LARGEST = 32 * 2**30  # bytes of tensors: a checkpoint of a billion parameters (with average and moments, 16 GB) fits
_LARGEST_HEADER = 10**8  # what safetensors takes
_LARGEST_JSON = 2**28
_DIGEST = "sha256"  # its key among a JSON object's or a note's own; files from before it was written have none, and load too


def write(path: str | Path, fill: Callable[[Path], object]) -> None:
    """Has `fill` write a file beside `path`, then renames it: a reader sees the old file or the new one, whole.

    Raises:
        TinyhallError: the file cannot be written, such as on a full disk, or another process is writing it; what was there
            before stays.
    """
    path = Path(path)
    # One name, not a random one: what a killed process left behind, the next write replaces.
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(part, os.O_RDWR | os.O_CREAT):
            try:
                fill(part)
                with part.open("r+b") as file:  # Windows flushes nothing that is open for reading alone
                    os.fsync(file.fileno())
                part.chmod(0o644)  # whatever the writer's mask: others read an artifact too
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _check.TinyhallError(f"artifact: expected to write {path}, got {error.strerror or error}") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds `folder`, which is made if need be, against every other process that asks; a killed process lets go of it.

    Raises:
        TinyhallError: another process holds it, or it cannot be made.
    """
    held = ExitStack()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(_lock(folder, os.O_RDONLY))  # the folder itself: no lock file stays behind
    except OSError as error:
        raise _check.TinyhallError(f"checkpoint: expected a folder to write in, got {error.strerror} at {folder}") from error
    with held:
        yield


@contextmanager
def _lock(path: Path, flags: int) -> Iterator[None]:
    from filelock import has_fcntl, lock_descriptor

    at = path
    if not has_fcntl:
        # Windows opens no folders: a file stands for one. What is being written it keeps from others itself.
        if not path.is_dir() or sys.platform == "emscripten":  # a browser's Python, which has no other process
            yield
            return
        at, flags = path / ".lock", os.O_RDWR | os.O_CREAT
    handle = os.open(at, flags, 0o644)
    try:
        # Between opening and locking, the process that held it may have given the file its final name.
        locked = lock_descriptor(handle, blocking=False)
        if not locked or not at.exists() or not os.path.samestat(os.fstat(handle), at.stat()):
            raise _check.TinyhallError(f"checkpoint: expected {path} to itself, got another process at work in it")
        yield
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    """An object's digest is written among its keys, as "sha256". Raises TinyhallError where the file cannot be written, where
    JSON cannot hold the value (NaN, for one), or where that key is taken."""
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))  # as a reader will have it: lists for tuples, text for keys
    except (TypeError, ValueError) as error:
        raise _check.TinyhallError(f"artifact: expected what JSON can hold, for {path}, got other values ({error})") from error
    if isinstance(plain, dict):
        _free(plain, path)
        plain[_DIGEST] = _of_json(plain)
    text = json.dumps(plain, indent=1, sort_keys=True) + "\n"
    write(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    """Raises TinyhallError where the file is missing, not JSON, or not as it was written."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is none of its numbers")

    try:
        value = json.loads(_existing(path, _LARGEST_JSON).read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise _check.TinyhallError(f"artifact: expected JSON, got something else in {path} ({_brief(error)})") from error
    if isinstance(value, dict) and _DIGEST in value and value.pop(_DIGEST) != _of_json(value):
        raise _changed(path)
    return value


def _of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _free(own: dict[str, Any], path: str | Path) -> None:
    if _DIGEST in own:
        raise _check.TinyhallError(f"artifact: expected no key {_DIGEST!r}, where the digest is written, got one for {path}")


def write_tensors(path: str | Path, tensors: dict[str, Tensor], note: dict[str, str] | None = None) -> None:
    """Raises TinyhallError where the file cannot be written, such as on a full disk, or would be too large to be read back;
    what was there before stays."""
    from safetensors.torch import save

    size = sum(t.nbytes for t in tensors.values())
    if size > _LARGEST:
        raise _check.TinyhallError(f"artifact: expected at most {_LARGEST} bytes of tensors, got {size} for {path}")
    note = dict(note or {})
    _free(note, path)
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    note[_DIGEST] = _of_tensors(plain, note)
    # Its `save_file` goes through a file of a random name, which a kill would leave.
    write(path, lambda part: part.write_bytes(save(plain, note)))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the note written with them.

    Raises:
        TinyhallError: a file that is missing, truncated, too large, not safetensors, or not as it was written.
    """
    from safetensors import SafetensorError, safe_open

    path = _existing(path, _LARGEST + _LARGEST_HEADER)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned: a mapped file that is replaced under a live tensor would change it.
            tensors, note = {k: file.get_tensor(k).clone() for k in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise _check.TinyhallError(f"artifact: expected a whole safetensors file, got {path} ({_brief(error)})") from error
    if _DIGEST in note and note.pop(_DIGEST) != _of_tensors(tensors, note):
        raise _changed(path)
    return tensors, note


def _of_tensors(tensors: dict[str, Tensor], note: dict[str, str]) -> str:
    """Of names, types, shapes, bytes and note: what a flipped bit could change without the format's noticing."""
    digest = hashlib.sha256(json.dumps(note, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _changed(path: str | Path) -> _check.TinyhallError:
    return _check.TinyhallError(f"artifact: expected {path} as it was written, got other content: it was damaged or edited")


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _existing(path: str | Path, largest: int) -> Path:
    path = Path(path)
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise _check.TinyhallError(f"artifact: expected a file, got {error.strerror} at {path}") from error
    if size is None:
        raise _check.TinyhallError(f"artifact: expected a file, got nothing at {path}")
    if size > largest:
        raise _check.TinyhallError(f"artifact: expected at most {largest} bytes, got {size} in {path}")
    return path


def once(write: Callable[..., None], path: Path, *content: Any) -> None:
    """Has one of the processes write a file; when this returns, it is there for all of them."""
    if device.rank() == 0:
        write(path, *content)
    device.barrier()


def differing(now: dict[str, Any], before: dict[str, Any]) -> str | None:
    """The first key, in their order, that two dictionaries do not have alike; None where they agree."""
    return next((key for key in [*now, *before] if now.get(key) != before.get(key)), None)


def load_weights(net: torch.nn.Module, path: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Fills `net` from a safetensors file, or from its `tensors` where they have been read; half precision is widened to the
    network's own.

    Raises:
        TinyhallError: a bad file, or tensors of another network.
    """
    if tensors is None:
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
