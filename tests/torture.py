"""Runs that are killed, files that are damaged, disks that are full: `python tests/torture.py`, or `--short` for a part of it.

One process imports torch and forks a child for each trial, which takes milliseconds. It never differentiates anything itself:
torch's autograd does not survive a fork. All chance is seeded. The whole suite writes book/faults.md. Linux and macOS only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import safetensors.torch  # noqa: E402
import scipy.stats  # noqa: E402, F401 (here, as a child that may open nothing has to find it loaded)
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (an optimiser asks for it; it takes seconds)
import tqdm.auto  # noqa: E402, F401
from common import environment, seeded  # noqa: E402
from torch import nn  # noqa: E402

from tinyhall.core._check import TinyhallError  # noqa: E402
from tinyhall.core.metrics import TrajectoryVariance  # noqa: E402
from tinyhall.core.sampling import sample  # noqa: E402
from tinyhall.core.schedule import Schedule  # noqa: E402
from tinyhall.core.training import Run, TrainingConfig, start  # noqa: E402
from tinyhall.datasets import GaussianMixture  # noqa: E402
from tinyhall.lab import experiments  # noqa: E402
from tinyhall.lab.artifact import load as load_artifact  # noqa: E402
from tinyhall.lab.experiment import folder as place_of  # noqa: E402
from tinyhall.lab.provenance import describe_device, revision  # noqa: E402
from tinyhall.nets import MLP  # noqa: E402
from tinyhall.store import checkpoint as saving  # noqa: E402
from tinyhall.store.checkpoint import fit  # noqa: E402
from tinyhall.store.files import read_json, read_tensors, write_json, write_tensors  # noqa: E402
from tinyhall.store.generations import recurse  # noqa: E402

PAGE = ROOT / "book/faults.md"
SCHEDULE = Schedule.linear(1e-3, 0.2, 100)
DATA = GaussianMixture.line().sample(50, seeded(100))
ROOM = 64 * 2**20  # bytes that a child may allocate to read a file of some kB
MEMORY = sys.platform.startswith("linux")  # elsewhere the limit on memory does not hold


@dataclass
class Count:
    """A row of the page. What was neither survived nor refused is lost."""

    what: str
    tried: int = 0
    survived: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    note: str = ""

    def add(self, outcome: str, of: str) -> None:
        """`outcome`: "survived", "refused", or what went wrong."""
        self.tried += 1
        self.survived += outcome == "survived"
        self.refused += outcome == "refused"
        if outcome not in ("survived", "refused"):
            self.lost.append(f"{of}: {outcome}")


def _written(path: Path) -> tuple[int, bool]:
    """When; of two files of one moment the state, which is written last."""
    return path.stat().st_mtime_ns, path.name == "state.json"


# --- children


def fork(work: Callable[[], object], seconds: int = 600) -> tuple[int, int]:
    """Starts `work` in a child, which hangs if it takes longer than that; `join` tells how it ended."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    os.close(read)
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        text = str(work() or "done")
    except TinyhallError as error:
        text = f"refused: {error}"
    except BaseException as error:  # whatever it is, it is what this suite looks for
        text = f"{type(error).__name__}: {error}"
    os.write(write, text.encode(errors="replace")[:4000])
    os._exit(0)


def join(child: tuple[int, int]) -> str:
    """What `work` returned or "done", "refused: ..." with its error, another error's name and text, or "killed by ..."."""
    pid, read = child
    with open(read, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return f"killed by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else text


def clear(outcome: str) -> bool:
    """Refused, in one line that names what it is about."""
    return outcome.startswith("refused: ") and "\n" not in outcome and ": expected " in outcome


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # for a child that is another user
        yield Path(name)


# --- three runs, each of less than a second


def training(place: Path) -> None:
    net = MLP(1, width=16, generator=seeded(0))
    fit(net, DATA, SCHEDULE, train_steps=25, batch_size=16, lr=1e-3, generator=seeded(5), ema=0.9, progress=False,
        checkpoint=place / "checkpoint.safetensors", every=1)  # fmt: skip


def sampling(place: Path) -> None:
    net = MLP(1, width=16, generator=seeded(0))
    fit(net, DATA, SCHEDULE, train_steps=6, batch_size=16, lr=1e-3, generator=seeded(5), progress=False,
        checkpoint=place / "checkpoint.safetensors", every=2)  # fmt: skip
    for part in range(3):
        drawn = sample(net, SCHEDULE, 200, metrics=[TrajectoryVariance()], generator=seeded(part))
        write_tensors(place / f"samples-{part}.safetensors", {"x": drawn.x, **drawn.scores}, {"part": str(part)})


def learn(data: torch.Tensor, generation: int, checkpoint: Path) -> MLP:
    net = MLP(1, width=16, generator=seeded(generation))
    fit(net, data, SCHEDULE, train_steps=6, batch_size=16, lr=1e-3, generator=seeded(generation), progress=False,
        checkpoint=checkpoint, every=2)  # fmt: skip
    return net


def recursion(place: Path) -> None:
    for arm in ("random", "variance"):
        for _ in recurse(DATA, learn, SCHEDULE, folder=place, arm=arm, drop=0.2, generations=3, seed=5):
            pass


RUNS = {"training": training, "sampling": sampling, "recursion": recursion}


def content(place: Path) -> dict[str, Any]:
    """All that a run left, by file; the seconds it took are nobody's loss."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.suffix == ".safetensors" and not name.startswith("."):
            tensors, note = read_tensors(path)
            note.pop("seconds", None)
            found[name] = {k: (v.dtype, v.shape, v.numpy().tobytes()) for k, v in tensors.items()}, note
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def same(place: Path, whole: dict[str, Any]) -> str:
    try:
        ours = content(place)
    except TinyhallError as error:
        return str(error)
    if ours.keys() != whole.keys():
        return f"other files: {', '.join(sorted(ours.keys() ^ whole.keys()))}"
    wrong = [name for name in whole if ours[name] != whole[name]]
    return f"other content: {', '.join(wrong)}" if wrong else "survived"


# --- kills


class Watched:
    """Counts, in memory that parent and child share, what a run does: it calls a network, and touches files."""

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, 64)

    def __getitem__(self, i: int) -> int:
        return struct.unpack_from("q", self.shared, 8 * i)[0]

    def count(self, i: int) -> int:
        struct.pack_into("q", self.shared, 8 * i, self[i] + 1)
        return self[i]

    def watch(self, place: Path, touch: int = 0, call: int = 0, size: int = 0) -> None:
        """In the child: dies at that touch; or, after that call, in the write that brings a file to that size."""

        def called(module: nn.Module, args: Any) -> None:
            if isinstance(module, MLP) and self.count(0) == call:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        def event(name: str, args: tuple[Any, ...]) -> None:
            if name in ("open", "os.rename", "os.chmod", "os.remove", "os.mkdir") and str(args[0]).startswith(str(place)):
                if self.count(1) == touch:
                    os.kill(os.getpid(), signal.SIGKILL)

        nn.modules.module.register_module_forward_pre_hook(called)
        sys.addaudithook(event)


def kills(name: str, moments: int) -> Count:
    """A third of the moments lie anywhere in a run, a third at a touch of the file system, a third inside a write."""
    run, rng, count = RUNS[name], random.Random(name), Count(f"a {name}, killed")
    killed = inside = 0
    with folder() as top:
        watched, began = Watched(), time.monotonic()

        def unbroken() -> None:
            watched.watch(top / "whole")
            run(top / "whole")

        assert (ended := join(fork(unbroken))) == "done", ended
        took, whole = time.monotonic() - began, content(top / "whole")
        sizes = [path.stat().st_size for path in sorted((top / "whole").rglob("*.safetensors"))]
        calls, touches = watched[0], watched[1]
        for i in range(moments):
            place, seen, way = top / f"{i}", Watched(), ("any", "touch", "write")[i % 3]
            place.mkdir()
            at, share, size = rng.random(), rng.random(), rng.choice(sizes)
            dies = {"any": (), "touch": (1 + int(at * touches),), "write": (0, 1 + int(at * calls), int(share * size))}[way]

            def broken(place: Path = place, seen: Watched = seen, dies: tuple[int, ...] = dies) -> None:
                seen.watch(place, *dies)
                run(place)

            child = fork(broken)
            if way == "any":
                while seen[0] < int(at * calls) and not os.waitid(os.P_PID, child[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    time.sleep(0)
                time.sleep(share * took / calls)
                os.kill(child[0], signal.SIGKILL)  # it has not been waited for: the number is still its own
            ended = join(child)
            killed += ended.startswith("killed by")
            inside += any(place.rglob(".*"))
            again = join(fork(lambda place=place: run(place)))
            outcome = same(place, whole) if again == "done" else again
            if ended not in ("killed by SIGKILL", "killed by SIGXFSZ", "done"):
                outcome = f"ended by itself: {ended}"
            count.add(outcome, f"moment {i}, {way} at {at:.3f}")
            shutil.rmtree(place)
    count.note = f"{moments - killed} too late, {inside} inside the writing of a file"
    return count


# --- damaged files


ARTIFACT, OTHER = experiments.get("line123", "smoke"), experiments.get("line123-n1000", "smoke")  # networks of the same shapes
TRAPS = {"pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"}


class Trap:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch sprung",)


def make(place: Path) -> None:
    """A checkpoint, the generations of a recursion, an artifact, and one of another experiment."""
    training(place / "training")
    recursion(place / "recursion")
    for seed, experiment in enumerate((ARTIFACT, OTHER)):
        out, known = place_of(place / "artifacts", experiment, 0), {"card": experiment.hash}
        write_tensors(out / "model.safetensors", dict(experiment.net(seed).state_dict()), known)
        kept = {"x": torch.randn(30, 1, generator=seeded(seed)).half(), "kind": torch.arange(30) % 3}
        write_tensors(out / "samples-large.safetensors", kept, known | {"sampler": "large"})
        windows = {"0-10": {"6": {"auroc": [0.75, 0.5, 1.0, 15]}}}  # spelled as older files have it
        figures = {"fraction": {"6": [0.25, 0.2, 0.3, 30]}, "n": 30, "windows": windows}
        write_json(out / "metrics.json", {"large": figures, "losses": [1.0, 0.5]})
        info = {"card": asdict(experiment), "hash": experiment.hash, "seed": 0, "device": "cpu", "revision": "unknown"}
        write_json(out / "card.json", info | {"torch": torch.__version__, "train_seconds": 1.5})


def plain(value: Any) -> Any:
    """Comparable: tensors as type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def read_training(place: Path) -> Any:
    net = MLP(1, width=16)
    run = start(net, DATA, SCHEDULE, TrainingConfig(16, 1e-3, ema=0.9), generator=seeded())
    saving.load(run, place / "training/checkpoint.safetensors", saving.settings(run))
    adam = run.optimizer.state_dict()["state"]
    return plain([net.state_dict(), adam, run.ema, run.losses, run.step, run.order, run.generator.get_state()])


def read_recursion(place: Path) -> Any:
    made = recurse(DATA, learn, SCHEDULE, folder=place / "recursion", arm="variance", drop=0.2, generations=3, seed=5)
    return plain([[m.number, m.metrics, m.kept, m.samples().x, m.samples().scores] for m in made])


def read_artifact(place: Path) -> Any:
    made = load_artifact(ARTIFACT.name, ARTIFACT.scale, 0, place / "artifacts")
    info, metrics = ({k: v for k, v in d.items() if k in own} for d, own in ((made.info, INFO), (made.metrics, METRICS)))
    return plain([info, metrics, made.measured, made.samples("large"), made.net.state_dict(), str(made.fraction("large"))])


INFO = {"card", "hash", "seed", "device", "revision", "torch", "train_seconds"}
METRICS = {"large", "losses"}
READERS = {"training": read_training, "recursion": read_recursion, "artifacts": read_artifact}


def header(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(head: Any, payload: bytes, size: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + payload


def damage_bytes(rng: random.Random, path: Path, others: list[Path]) -> str:
    """What disks, copies and users do to any file."""
    raw = bytearray(path.read_bytes())
    at, what = rng.randrange(len(raw)), rng.choice(
        ("bit", "bit", "bit", "bits", "cut", "tail", "zeros", "noise", "twice", "empty", "swapped", "other", "folder", "loop",
         "pipe", "device", "huge", "pickle", "gone")
    )  # fmt: skip
    if what in ("bit", "bits"):
        for _ in range(1 if what == "bit" else rng.randrange(2, 20)):
            raw[at] ^= 1 << rng.randrange(8)
            at = rng.randrange(len(raw))
    elif what == "cut":
        del raw[at:]
    elif what == "tail":
        raw += rng.randbytes(rng.randrange(1, 2000))
    elif what in ("zeros", "noise"):
        end = min(at + rng.randrange(1, 600), len(raw))
        raw[at:end] = bytes(end - at) if what == "zeros" else rng.randbytes(end - at)
    elif what == "twice":
        raw[at:at] = raw[at : at + rng.randrange(1, 600)]
    elif what == "empty":
        raw.clear()
    elif what == "swapped":
        raw = bytearray(rng.choice(others).read_bytes())
    elif what == "other":
        raw = bytearray(rng.choice((b"{}", b"[]", b"null", b"PK\3\4", b"\xff" * 64, b"[" * 100_000, b"9" * 5_000, b"\0" * 200)))
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "pickle":
        torch.save(Trap(), path)
    elif what != "gone":
        path.write_bytes(raw)
    if what == "huge":
        os.truncate(path, 2**40)  # sparse: it takes no room on the disk
    return what


def damage_header(rng: random.Random, path: Path) -> str:
    """A header that lies about the bytes that follow."""
    head, payload = header(path.read_bytes())
    name = rng.choice([k for k in head if k != "__metadata__"])
    entry, what = head[name], rng.choice(("dtype", "shape", "offsets", "name", "drop", "meta", "size", "deep", "many", "order"))
    size = None
    if what == "dtype":
        entry["dtype"] = rng.choice(
            sorted(
                {"F64", "F32", "I32", "U32", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "X", 7} - {entry["dtype"]}, key=str
            )
        )
    elif what == "shape":
        entry["shape"] = rng.choice(
            ([2**62], [2**40, 2**40], [-1], [0], [1.5], "x", [1] * 70_000, [*entry["shape"], 1], [2**64])
        )
    elif what == "offsets":
        a, b = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([b, a], [a, 2**62], [2**63, 2**64], [-4, b], [a + 1, b], [a, b - 1], [0, 0], [a], "x")
        )
    elif what == "name":
        tricks = (
            "../../../etc/passwd",
            "/tmp/x",
            "",
            ".",
            "a\0b",
            "x" * 1_000_000,
            "net.__class__",
            "adam.0.__reduce__",
            "é\n",
        )
        head[rng.choice((*tricks, *head))] = head.pop(name)
    elif what == "drop":
        del head[name]
    elif what == "meta":
        head["__metadata__"] = rng.choice(
            ({"step": 3}, [], "x", {"settings": "[" * 10_000}, {k: "1" for k in map(str, range(9999))})
        )
    elif what == "size":
        size = rng.choice((0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1))
    elif what == "order":
        a, b = rng.sample([k for k in head if k != "__metadata__"], 2)
        head[a], head[b] = head[b], head[a]
    text: Any = {"deep": b"[" * 100_000, "many": json.dumps({f"{i}": entry for i in range(5_000)}).encode()}.get(what, head)
    path.write_bytes(with_header(text, payload, size))
    return f"header's {what}"


def damage_json(rng: random.Random, path: Path) -> str:
    """A value that is well-formed and was not written so."""
    value = json.loads(path.read_text())
    key, what = rng.choice([k for k in value if k != "sha256"]), rng.choice(("key", "type", "nan", "twice", "number", "digest"))
    if what == "key":
        del value[key]
    elif what == "type":
        value[key] = rng.choice([v for v in (None, [], {}, "x", 7, -1.5, True, "../../x", [[[]]]) if v != value[key]])
    elif what == "digest":
        value["sha256"] = rng.choice((None, 7, "", "0" * 64, [1]))
    text = json.dumps(value)
    if what == "nan":
        text = json.dumps(value | {key: rng.choice((float("nan"), float("inf"), -float("inf")))})
    elif what == "twice":
        text = text[:-1] + f', "{key}": "again"}}'
    elif what == "number":
        digits = [i for i, c in enumerate(text) if c.isdigit()]
        i = rng.choice(digits)
        text = text[:i] + str((int(text[i]) + rng.randrange(1, 10)) % 10) + text[i + 1 :]
    path.write_text(text)
    return f"JSON's {what}"


def forge(rng: random.Random, path: Path) -> str:
    """Whole files with a digest that is right, as a program would write them, and of something else."""
    if path.suffix == ".json":
        value = read_json(path)
        wrong: list[Any] = [[], [value], "x", 7, None, {}]
        if path.name == "card.json":
            wrong += [{k: v for k, v in value.items() if k != key} for key in ("hash", "seed", "device")]
            wrong += [value | {"hash": "0" * 12}, value | {"hash": [1]}, value | {"seed": "../.."}, value | {"device": None}]
        elif path.name in ("recursion.json", "state.json"):
            wrong += [value | {"seed": 6}, value | {"seed": None}]
        write_json(path, rng.choice(wrong))
        return "forged JSON"
    tensors, note = read_tensors(path)
    name = rng.choice(sorted(tensors))
    tensor, what = tensors[name], rng.choice(("dtype", "shape", "absent", "renamed", "not finite", "note", "all absent"))
    if path.stem == "samples-large":  # whatever an experiment's samples are, they are what its program wrote
        what = "note"
    if what == "dtype":
        tensors[name] = tensor.double() if tensor.dtype != torch.float64 else tensor.half()
    elif what == "shape":
        tensors[name] = tensor[None] if tensor.ndim == 0 or rng.random() < 0.5 else tensor[:0]
    elif what == "absent" or what == "renamed":
        del tensors[name]
        tensors |= (
            {rng.choice(("../" + name, "x.y.z", "adam.99.step", "adam.x.step", "score.")): tensor} if what == "renamed" else {}
        )
    elif what == "not finite" and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, float("nan"))  # a score may be infinite
    elif what == "note":
        spoiled = {"step": "-5", "settings": "[]", "order": "x", "seconds": "nan", "card": "of another", "sampler": "euler"}
        note |= {k: spoiled.get(k, "other") for k in note}
    elif what == "all absent":
        tensors = {}
    write_tensors(path, tensors, note)
    return f"forged {what}"


def undigested(rng: random.Random, path: Path) -> str:
    """A file from before digests were written, and one bit of it."""
    if path.suffix == ".json":
        path.write_text(json.dumps(read_json(path), indent=1))
    else:
        tensors, note = read_tensors(path)
        safetensors.torch.save_file(tensors, path, note)
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return "bit"


def listing(place: Path) -> list[str]:
    return sorted(str(p) for p in place.rglob("*"))


def examine(place: Path, kind: str, whole: Any, path: Path) -> str:
    """In the child: reads with little memory, and says what came of it."""
    sprung: list[str] = []
    sys.addaudithook(lambda name, args: sprung.append(name) if name in TRAPS else None)
    if MEMORY:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    before, error = listing(place), ""
    try:
        outcome = "survived" if READERS[kind](place) == whole else "loaded as something else"
    except TinyhallError as refusal:
        outcome, error = "refused", str(refusal)
    if sprung:
        return f"ran {sprung}"
    if set(listing(place)) - {str(path)} != set(before) - {str(path)}:  # a state that is gone is made again
        return "touched other files"
    return f"an error that is not clear: {error}" if error and not clear(f"refused: {error}") else outcome


def damages(number: int) -> list[Count]:
    """Four ways to be damaged, each file in turn; and, for comparison, bits in files without a digest."""
    rng = random.Random(0)
    ways: dict[str, Callable[[Path], str]] = {
        "a file damaged: bits, cuts, other files": lambda path: damage_bytes(rng, path, others),
        "a header or a value changed, not the digest": lambda path: (
            damage_json(rng, path) if path.suffix == ".json" else damage_header(rng, path)
        ),
        "a whole file of something else, digest right": lambda path: forge(rng, path),
        "for comparison: a bit in a file from before the digest": lambda path: undigested(rng, path),
    }
    counts = [Count(what) for what in ways]
    with folder() as top:
        assert (ended := join(fork(lambda: make(top / "whole")))) == "done", ended
        # What a reader looks at: no weights of a generation that is done, nor of the arm that is not asked for.
        paths = [
            p for p in sorted((top / "whole").rglob("*.*"))
            if p.is_file() and "random" not in str(p) and OTHER.name not in str(p)
            and not ("recursion" in str(p) and p.name == "checkpoint.safetensors")
        ]  # fmt: skip
        others = [p for p in (top / "whole").rglob("*.*") if p.is_file()]
        whole = {kind: reader(top / "whole") for kind, reader in READERS.items()}
        for i in range(number):
            place = top / "damaged"
            path = place / rng.choice(paths).relative_to(top / "whole")
            kind = path.relative_to(place).parts[0]
            shutil.copytree(top / "whole" / kind, place / kind)
            way = (0, 1, 2, 0, 1, 2, 0, 1, 0, 3)[i % 10]
            did = list(ways.values())[way](path)
            outcome = join(fork(lambda place=place, kind=kind, path=path: examine(place, kind, whole[kind], path)))
            counts[way].add(outcome, f"{i}: {path.relative_to(place)}, {did}")
            shutil.rmtree(place)
    counts[3].note = f"{len(counts[3].lost)} loaded as something else: what the digest is for"
    counts[3].lost = [text for text in counts[3].lost if "loaded as something else" not in text]
    return counts


# --- disks and permissions


def broken_off(
    count: Count, run: Callable[[Path], None], place: Path, whole: dict[str, Any], limit: Callable[[], Any], of: str
) -> None:
    """A run under a limit: ends in one clear line and loses nothing; without the limit it then ends as if there were none."""

    def limited() -> None:
        limit()
        run(place)

    outcome = join(fork(limited))
    if outcome == "done":
        count.add(same(place, whole), of)
        return
    left = sorted(p.name for p in place.rglob(".*"))
    again = join(fork(lambda: run(place)))
    after = same(place, whole) if again == "done" else again
    ok = clear(outcome) and not left and after == "survived"
    count.add("refused" if ok else f"{outcome}; left {left}; {after}", of)


def full_disk(tries: int) -> Count:
    """Half of the tries on a file system of a few kB, where this process may mount one; else a limit on the size of files."""
    rng, count, mounted = random.Random(1), Count("a disk that is full"), 0
    with folder() as top:
        for name, run in RUNS.items():
            assert join(fork(lambda run=run, name=name: run(top / name))) == "done"
            whole = content(top / name)
            sizes = sorted({p.stat().st_size for p in (top / name).rglob("*") if p.is_file()})
            for i in range(tries):
                place = top / f"{name}-{i}"
                place.mkdir()
                size = rng.randrange(0, sizes[-1])
                tmpfs = ["mount", "-t", "tmpfs", "-o", f"size={max(4096, size // 4096 * 4096)}", "none", str(place)]
                if i % 2 and sys.platform.startswith("linux") and not subprocess.run(tmpfs, capture_output=True).returncode:
                    mounted += 1
                    try:
                        grow = ["mount", "-o", "remount,size=64m", str(place)]
                        on_tmpfs(count, run, place, whole, grow, f"{name}, {size} bytes in all")
                    finally:
                        subprocess.run(["umount", str(place)], check=True)
                    continue

                def small(size: int = size) -> None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

                broken_off(count, run, place, whole, small, f"{name}, {size} bytes a file")
    count.note = f"{mounted} on a file system that was full" if mounted else "by a limit on the size of a file"
    return count


def on_tmpfs(count: Count, run: Callable[[Path], None], place: Path, whole: dict[str, Any], grow: list[str], of: str) -> None:
    outcome = join(fork(lambda: run(place)))
    left = sorted(p.name for p in place.rglob(".*"))
    subprocess.run(grow, check=True)
    again = join(fork(lambda: run(place)))
    after = same(place, whole) if again == "done" else again
    ok = (clear(outcome) and not left and after == "survived") or (outcome == "done" and after == "survived")
    count.add(("survived" if outcome == "done" else "refused") if ok else f"{outcome}; left {left}; {after}", of)


def forbidden() -> Count:
    """Folders that may not be written, files that may not be read, by a user who is not root."""
    count = Count("no permission")

    def lower() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)

    with folder() as top:
        for name, run in RUNS.items():
            assert join(fork(lambda run=run, name=name: run(top / name))) == "done"
            whole = content(top / name)
            for what, modes in (
                ("folder, new run", (0o555, None)),
                ("folder, old run", (0o555, None)),
                ("file", (0o755, 0o000)),
            ):
                place = top / f"{name} {what}"
                if what == "folder, new run":
                    place.mkdir()
                else:
                    shutil.copytree(top / name, place)
                last = max((p for p in place.rglob("*.*") if p.is_file()), key=_written, default=None)
                if what == "folder, old run" and last is not None:
                    last.unlink()  # so that there is something left to write
                changed = [p for p in (place, *place.rglob("*")) if p.is_dir()]
                for path in changed:
                    path.chmod(modes[0])
                files = [p for p in place.rglob("*") if p.is_file()] if modes[1] is not None else []
                for path in files:
                    path.chmod(0)

                def as_another(run: Callable[[Path], None] = run, place: Path = place) -> None:
                    lower()
                    run(place)

                outcome = join(fork(as_another))
                for path in changed:
                    path.chmod(0o755)
                for path in files:
                    path.chmod(0o644)
                again = join(fork(lambda run=run, place=place: run(place)))
                after = same(place, whole) if again == "done" else again
                ok = clear(outcome) and after == "survived"
                count.add("refused" if ok else f"{outcome}; {after}", f"{name}, {what}")
    count.note = "by a user without rights" if os.geteuid() == 0 else ""
    return count


def together(rounds: int) -> Count:
    """Two processes start the same run in the same folder: what is there in the end is that of one."""
    rng, count = random.Random(2), Count("two processes in one folder")
    with folder() as top:
        for name, run in RUNS.items():
            assert join(fork(lambda run=run, name=name: run(top / name))) == "done"
            whole, took = content(top / name), 0.3
            for i in range(rounds):
                place = top / f"{name}-{i}"
                first = fork(lambda run=run, place=place: run(place))
                time.sleep(rng.random() ** 2 * took)
                second = fork(lambda run=run, place=place: run(place))
                ends = [join(first), join(second)]
                again = join(fork(lambda run=run, place=place: run(place)))
                after = same(place, whole) if again == "done" else again
                ok = all(end == "done" or clear(end) for end in ends) and after == "survived"
                outcome = ("survived" if ends == ["done", "done"] else "refused") if ok else f"{ends}; {after}"
                count.add(outcome, f"{name}, round {i}")
    return count


# --- a long run


def night(checkpoints: int) -> Count:
    """As many checkpoints as a night has minutes and more: memory and disk stay as they were after the first tenth."""
    count = Count(f"a run with {checkpoints:,} checkpoints")

    def resident() -> int:
        if MEMORY:
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run() -> str:
        marks: list[tuple[int, int, int]] = []
        save = saving.save

        def watched(run: Run, path: str | Path, agreed: dict[str, Any]) -> None:
            save(run, path, agreed)
            sizes = [p.stat().st_size for p in Path(path).parent.iterdir()]
            marks.append((resident(), sum(sizes), len(sizes)))

        saving.save = watched
        with folder() as place:
            fit(MLP(1, width=16), DATA, SCHEDULE, train_steps=checkpoints, batch_size=16, lr=1e-3, generator=seeded(5), ema=0.9,
                progress=False, checkpoint=place / "checkpoint.safetensors", every=1)  # fmt: skip
        early, late = marks[checkpoints // 10], marks[-1]
        return json.dumps([len(marks), late[0] - early[0], late[1] - early[1], late[2]])

    ended = join(fork(run, seconds=300))
    if not ended.startswith("["):
        count.add(ended, "run")
        return count
    made, memory, disk, files = json.loads(ended)
    # A loss a checkpoint is kept for good, 8 bytes; the numbers in a header grow by some digits.
    flat = memory < 4 * 2**20 and disk < 8 * checkpoints + 64 and files == 1 and made == checkpoints
    count.add("survived" if flat else f"{memory} bytes of memory, {disk} of disk, {files} files, {made} checkpoints", "run")
    count.note = f"{memory / 2**20:+.1f} MB of memory and {disk / 1000:+.1f} kB of disk after the first tenth, one file"
    return count


# --- chapters that break


@dataclass
class Mutation:
    """A change to the package or to what it loads, and who should notice."""

    what: str
    path: str
    old: str
    new: str
    book: str
    tests: str = ""
    noticed: dict[str, bool] = field(default_factory=dict)


ARTIFACTS = "book/artifacts"
MUTATED = "a wrong number in the package or an artifact"
MUTATIONS = (
    Mutation("nothing", "tinyhall/measure/stats.py", "Estimate(k / n,", "Estimate(k / n,", "beside", "filtering"),
    Mutation("`stats.fraction` is a tenth too high", "tinyhall/measure/stats.py", "Estimate(k / n,", "Estimate(1.1 * k / n,",
             "beside", "filtering"),
    Mutation("`GaussianMixture.judge` is a tenth too strict", "tinyhall/core/mixture.py", "(d / self.std)",
             "(1.1 * d / self.std)", "beside", "datasets"),
    Mutation("`ddpm` adds a tenth too much noise", "tinyhall/core/sampling.py", "of_eps, math.sqrt(variance)",
             "of_eps, 1.1 * math.sqrt(variance)", "beside", "sampling"),
    Mutation("`TrajectoryVariance` divides by one less", "tinyhall/core/metrics.py", "self._squares / self.count",
             "self._squares / max(self.count - 1, 1)", "beside", "metrics"),
    Mutation("a fraction in an artifact", f"{ARTIFACTS}/line123-laptop/seed0/metrics.json", "0.002982,", "0.003982,", "beside"),
    Mutation("a training's seconds in an artifact", f"{ARTIFACTS}/line123-laptop/seed0/card.json", "768.8", "868.8", "status"),
)  # fmt: skip


def chapters(mutations: tuple[Mutation, ...] = MUTATIONS) -> Count:
    """In a copy of the last commit: do the book's compared outputs, and the package's tests, notice a change?"""
    count = Count(MUTATED)

    def passes(place: Path, *arguments: str) -> bool:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(
            command, cwd=place, env=environment(PYTHONPATH=str(place)), capture_output=True, text=True, timeout=600
        )
        if done.returncode > 1:  # nothing was tested
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        return done.returncode == 0

    with folder() as place:
        command = ["git", "archive", "HEAD", "tinyhall", "book", "tests", "pyproject.toml"]
        archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "x"], cwd=place, input=archive.stdout, check=True)
        nbval = ("--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "600")
        for m in mutations:
            path = place / m.path
            text = path.read_text()
            assert text.count(m.old) == 1, f"{m.old!r} is not once in {m.path}"
            path.write_text(text.replace(m.old, m.new))
            m.noticed["the book"] = not passes(place, *nbval, f"book/{m.book}.ipynb")
            if m.tests:
                m.noticed["the tests"] = not passes(place, "-m", "not slow", f"tests/test_{m.tests}.py")
            path.write_text(text)
            ok = any(m.noticed.values()) != (m.old == m.new)
            count.add("refused" if ok and m.old != m.new else "survived" if ok else "was not noticed", m.what)
    return count


# --- the page


def write_page(counts: list[Count], mutations: tuple[Mutation, ...]) -> None:
    # Whether a wrong number is noticed is another question, with a table of its own.
    shown = [c for c in counts if c.what != MUTATED]
    rows = "\n".join(f"| {c.what} | {c.tried} | {c.survived} | {c.refused} | {len(c.lost)} | {c.note} |" for c in shown)
    said = {True: "yes", False: "no", None: ""}
    noticed = "\n".join(
        f"| {m.what} | {m.book} | {said[m.noticed.get('the book')]} | {said[m.noticed.get('the tests')]} |" for m in mutations
    )
    package = [m for m in mutations if m.old != m.new and m.tests]
    stored = [m for m in mutations if m.old != m.new and not m.tests]
    by_book, by_tests = (sum(m.noticed.get(who, False) for m in package) for who in ("the book", "the tests"))
    read = sum(m.noticed.get("the book", False) for m in stored)
    PAGE.write_text(f"""# When things go wrong

A training that runs overnight meets a closed lid, a full disk, a second terminal. This page is written by
`make torture`, which does such things on purpose, with all chance seeded. *Survived* means that the run ended in the bits
of one that nothing happened to, or that what was read is what was written; *refused*, that one line said what was
wrong, and nothing was lost. *Lost* is everything else, and must be 0: another result, a crash, an unclear error, a
file left behind, more memory than the file has. (Files from before the digest do not count there: that row says what they would
have let through.)

| | tried | survived | refused | lost | |
|---|--:|--:|--:|--:|---|
{rows}

Measured on {describe_device(torch.device("cpu"))}, revision {revision()}, torch
{torch.__version__}. A `+` after a revision means that the package then had changes that were not committed.

## What was done

- **Killed.** A training, a training with sampling, and a recursion of two arms get SIGKILL: a third of the moments
  anywhere in the run, a third at a touch of the file system (opening, renaming, ...), a third with part of a file on
  the disk. Called again, each must leave the same files with the same bits as a run that was not killed, and no
  other.
- **Damaged.** Checkpoints, generations and artifacts with bits flipped, ends cut off, files swapped, replaced by
  pickles, pipes and devices; headers that claim other types, shapes, places or names; JSON with other values; and
  files that are whole, digest and all, but of another experiment, type or shape. A child with {ROOM / 2**20:.0f} MB of
  memory to spare reads each; nothing may be run, and no other file touched. Every file that the package writes
  carries a digest of its content. Those from before it did are read as they are: the row for comparison shows what a
  single bit does to them.
- **Full, forbidden, shared.** Files that may grow to some size and no more, file systems of some kB, folders and
  files without permission, a second process in the same folder. Afterwards, without the obstacle, the run must end in
  the bits of one that had none.
- **Long.** Memory and disk after each checkpoint, the first tenth of them left out.

## Would the book notice?

A book whose outputs are compared with stored ones is only as good as the comparison. In a copy of the repository one
number at a time is wrong; "nothing" is the control. One notebook is run, the one named. The tests are those of the
module that was changed; for an artifact none were run.

| what is wrong | notebook | the book notices | the tests notice |
|---|---|---|---|
{noticed}

Of {len(package)} wrong numbers in the package the notebook notices {by_book} and the tests {by_tests}; of
{len(stored)} in artifacts the notebook notices {read}. So a page that prints what it printed before says that what is
stored is what it was, and little about the package: that is for the tests to say.
""")


def suite(short: bool) -> Iterator[Count]:
    moments, damaged, disks, rounds, checkpoints = (4, 60, 2, 1, 100) if short else (50, 560, 16, 12, 1000)
    for name in RUNS:
        yield kills(name, moments)
    yield from damages(damaged)
    yield full_disk(disks)
    yield forbidden()
    yield together(rounds)
    yield night(checkpoints)
    if not short:
        yield chapters()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a part of everything but the book, in seconds; writes no page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = []
    for count in suite(args.short):
        print(f"{count.what:60} {count.tried:4} {count.survived:4} {count.refused:4} {len(count.lost):4}  {count.note}")
        print("".join(f"    {text[:1000]}\n" for text in count.lost), end="", flush=True)
        counts.append(count)
    if not args.short:
        write_page(counts, MUTATIONS)
    return int(any(count.lost for count in counts))


if __name__ == "__main__":
    sys.exit(main())
