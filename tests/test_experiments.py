"""Experiments: the paper's figures by default, smaller ones by name, a hash that follows what it should, a new one."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT, one_line, same_bits

import tinyhall
from tinyhall.core import MLP, ddpm, stream
from tinyhall.core._check import TinyhallError
from tinyhall.core.sampling import Sampler
from tinyhall.data.mixtures import GaussianMixture
from tinyhall.lab import bench, provenance
from tinyhall.lab.artifact import available, load
from tinyhall.lab.draws import PointDraw
from tinyhall.lab.experiment import SCALES, Experiment, Lab, folder, spent
from tinyhall.lab.experiments import EXPERIMENTS, get
from tinyhall.lab.pictures import LocalShapesExperiment
from tinyhall.lab.points import ExactExperiment, GaussianExperiment
from tinyhall.lab.reproduce import reproduce
from tinyhall.store.files import write_json, write_tensors


def test_the_main_experiment_is_the_paper_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYHALL_SCALE", raising=False)
    experiment = get("line123")
    assert experiment.scale == "paper"
    assert (experiment.n, experiment.steps, experiment.batch_size, experiment.lr) == (50_000, 50_000, 10_000, 1e-3)
    assert (experiment.timesteps, experiment.beta_start, experiment.beta_end) == (1000, 1e-3, 0.2)
    assert (experiment.blocks, experiment.shared, experiment.window, experiment.samples) == (3, True, (0, 10), 10_000_000)
    assert experiment.data().means[:, 0].tolist() == [1, 2, 3]
    assert experiment.schedule().name == "linear(0.001, 0.2, 1000)"
    assert get("line1245").data().means[:, 0].tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize("name", list(EXPERIMENTS))
@pytest.mark.parametrize("scale", SCALES)
def test_every_experiment_builds_at_every_scale(name: str, scale: str) -> None:
    experiment = get(name, scale)
    assert (experiment.name, experiment.scale) == (name, scale)
    data = experiment.data()
    closed = isinstance(experiment, ExactExperiment | LocalShapesExperiment)  # a denoiser in the network's place
    net = data.denoiser(experiment.schedule()) if closed else experiment.net(0)
    if closed:
        x = data.sample(3, stream(0, "data"))
        assert net(x, torch.zeros(3, dtype=torch.int64)).shape == x.shape
    elif isinstance(experiment, GaussianExperiment):
        assert net.dim == data.dim
        assert net.shared == experiment.shared
    else:
        assert net.shape == data.shape
    assert experiment.schedule().timesteps == experiment.timesteps
    assert experiment.window[1] <= experiment.timesteps
    paper = EXPERIMENTS[name]
    assert (experiment.n <= paper.n, experiment.steps <= paper.steps, experiment.samples <= paper.samples) == (True, True, True)
    assert scale == "paper" or closed or experiment.steps < paper.steps


def test_layouts() -> None:
    assert len(GaussianExperiment("g", layout="grid").data().means) == 25
    assert GaussianExperiment("d", layout="diamond").data().name.startswith("diamond")


def test_separate_networks() -> None:
    assert not get("line123-separate", "paper").shared
    assert len(get("line123-separate", "paper").net(0).body) == 3


def test_scale_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYHALL_SCALE", "smoke")
    assert get("line123").scale == "smoke"
    assert get("line123", "laptop").scale == "laptop"
    monkeypatch.setenv("TINYHALL_SCALE", "galaxy")
    with pytest.raises(TinyhallError) as caught:
        get("line123")
    one_line(caught.value, "scale", "smoke, laptop, paper", "galaxy")


def test_hashes_differ_where_experiments_do() -> None:
    hashes = [get(name, scale).hash for name in EXPERIMENTS for scale in SCALES]
    assert len(set(hashes)) == len(hashes)
    experiment = get("line123", "paper")
    changed = {
        "n": 7, "steps": 7, "batch_size": 7, "lr": 0.5, "blocks": 2, "shared": False, "timesteps": 999, "beta_start": 0.01,
        "beta_end": 0.3, "means": (1.0,), "name": "x", "layout": "grid", "scale": "x",
    }  # fmt: skip
    for field, value in changed.items():
        other = dataclasses.replace(experiment, **{field: value})
        assert other.hash != experiment.hash, field
        assert other.training_hash != experiment.training_hash, field


def test_training_hash_outlives_the_drawing() -> None:
    experiment = get("line123", "paper")
    other = dataclasses.replace(experiment, samples=5, window=(0, 5))
    assert other.training_hash == experiment.training_hash
    assert other.hash != experiment.hash


def test_hash_is_of_the_values_and_not_of_the_process() -> None:
    experiment = get("line123", "smoke")
    assert experiment.hash == dataclasses.replace(experiment).hash
    assert len(experiment.hash) == 12
    assert int(experiment.hash, 16) >= 0


def test_experiments_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get("line123", "smoke").n = 5


def test_streams_are_apart() -> None:
    numbers = {
        (s, p): int(torch.randint(2**62, (1,), generator=stream(s, p))) for s in (0, 1) for p in ("data", "weights", "samples")
    }
    assert len(set(numbers.values())) == 6
    assert numbers[0, "data"] == int(torch.randint(2**62, (1,), generator=stream(0, "data")))


# hash and training_hash at smoke, laptop and paper. Stored artifacts and checkpoints carry them: classes may move and be
# renamed, but a line here changes only with the artifacts that it names.
PINNED = {
    "line123": ("c21025eb02b0 986de8e16bb5", "c26be6d6eba4 152118082e0a", "090731781f85 c9768a8d35b2"),
    "line123-n20000": ("e80c1eb8c631 a96b95fcbba5", "e4875e081945 00387c3afa9b", "933b7a1e3eac c896f6150c9a"),
    "line123-n5000": ("00f4ccaf543c 9ff235fbac4c", "337019fc4a3f 99e967db6eda", "8ef91b63af62 0083ba689736"),
    "line123-n1000": ("cbd283087e8e 9b6060a4daaf", "f950549775d6 2ab69d2168a1", "0abf8169a1a0 0e98460df50d"),
    "line1245": ("bc2c15f7fed1 c5bf4b3bcd74", "a5305c492a2b cfd2217766cb", "589e73b52237 c38ed57cf111"),
    "line124": ("130f278be496 1b6fca257078", "070778b29b3e 99b274e04c77", "c552791796ca 6722f30ed780"),
    "line123-separate": ("07b73b018454 87ec96b6e9a8", "2f6400ff95f0 e3cb55cbb830", "5c4662d06c03 97b7a52605fd"),
    "line123-T250": ("792e6e0101c5 10888a25d948", "2dbd48dec74e 30a6779bb210", "d620feaade38 ba1c50473e5b"),
    "grid": ("9110ebcc6ffd 44e4d7585846", "5ca61852399d ccfd07a8cdc9", "954c73844b58 b43981880baa"),
    "diamond": ("c4c60d285d9f 13d91bf4ba9a", "b610a9279e1d 9ad0f784337c", "a39f34694cab b9a25e1d0e39"),
    "diamond-spaced": ("59e3a2540d56 5de81fe632f8", "a84d711010ed 7d23893d7f36", "92379d6f21c4 20948a2bc172"),
    "grid-tight": ("b8f3c124f89b 9396a179c092", "71d5db1f76a8 d939247c700f", "153c320487a5 78c2ddf7cfce"),
    "shapes": ("4099577ae500 722b31a82110", "2029685952b8 2adc57ff3821", "b4b78e86ca4e ef60010fd3cb"),
    "shapes-n500": ("1f0d528f6b2c 6b1d7f7c593b", "6697632ed638 aaf6b1a78017", "2273d4abdb23 d24132c3ee17"),
    "shapes-n2000": ("8575c1939794 0cf9e5f1d4f4", "4843983fda17 7c68b2054cdb", "ca154651b80b 8529726f3b6d"),
    "shapes-n20000": ("8ff3a021f8ca 140b9167c653", "e2883b2346cf 37c59ec79cdb", "9eeabb193f1e 43cee19f4abe"),
    "simple-shapes": ("7b49413cd47e a8a906ffa297", "624fbd507a88 674a5d97cb1e", "6f6544667dc0 d8d847157b2f"),
    "simple-shapes-local": ("b06b7b5b30fe 7ef28ae97ef2", "6109b2144895 c8e157cafc14", "a9d6ca694970 0b38bd9514aa"),
    "hands": ("990277488367 3f9a01017732", "59f9d1898941 f8ee34225c26", "515bb3263fc5 a0d5abaf9d38"),
    "hands-n500": ("1a79000927b8 f73d0a8241c9", "61a63a938282 898ebfce749f", "394ede08fee8 ffc30951901c"),
    "hand-photos": ("1e7c135e2179 1cbdddcc76e9", "ef936f5ed206 12ed755ae9c4", "4bda0d3d8bce 0a6a137542fd"),
    "shapes-recursion": ("3e2e5c3ce058 325ebf593641", "6abadb27586d c183adf3615d", "dda53035131f fbd690664e67"),
    "mnist": ("97a22ab4b4d9 8a292163242c", "b1d5415d31bc 1813e0fc14de", "469bba00f3b0 0f931bcf9a34"),
    "mnist-fine": ("3564767c514f 6d4e82d4e2f9", "102b1923e003 ffbd062790e9", "0ce5d3410dac 397ed0a8c55a"),
    "mnist-wide": ("094275e03c22 952ea878dd0c", "3a87f53b61b3 ab1ce8371471", "88e936c9945d d644656c267e"),
    "mnist-unguided": ("840fffc310a5 c71742462998", "4af3da8c358b af066cdc98c0", "5f0df35a0a25 732185479ebf"),
    "mnist-real50": ("f9b10d039436 3aa512706e37", "bf0a270f569e d17755bcb4b6", "53b4157b95d1 f0be5fa30ffe"),
    "mnist-accumulated": ("285b850df069 1e9f7e0964c4", "93f1380ce17f cda8bf187a37", "74e2d7fa4fee 154d37b3ff61"),
    "recursion": ("77015437fb61 0a03a9fe7023", "9e7d486269e1 3c090ac30717", "24db61878ae3 6b5ca8130073"),
    "recursion-sweep": ("c32ffdf14208 f7c01f1400ca", "d2a09888d285 030f575a4274", "f00f4a3d52b8 3da8a0c81089"),
    "recursion-oracle": ("033fe37c5bf2 26c04d4b239e", "d2045e46f128 ef0e91d8d832", "c602556bd525 1c39a886eaa4"),
    "recursion-fine": ("1261a54a2ce9 65a7f7a1e27c", "2a81b81b9b93 f6a23fa642d2", "71006188db50 2a92ac084521"),
    "line12": ("b81e609fed2c 59308fa9139c", "88b08bb645a0 a9a6a8602927", "cec926948a6e 1db7ec945ff8"),
    "line123-n25000-epochs": ("ecbfa0463de5 12576e56c7d1", "e9d90a22e54a 633db7f84398", "e5db7bbd908e 43f4e7e4aacf"),
    "line123-n100000-epochs": ("a42baf13a73b 8f3463d6a19e", "bae300243f33 9fa62c7dcf35", "185c8e7a77ed 40c004b54009"),
    "line123-n500000-epochs": ("c29cfd422fb8 baba5d8eb1b6", "97f23fc52b70 e2a2b98abed6", "6a926c8d9cd7 a0a780f51568"),
    "line123-n25000": ("f6de6575da89 ab0293524428", "edf7cd108b93 29595d3f8bb9", "33ca76273b18 82352916ea17"),
    "line123-n100000": ("91c28d885119 c72c28903978", "6de8cdb94b2f 3df7d4ec1d37", "51aa00778f0f 22981c68e0ff"),
    "line123-n500000": ("49eaf249d5d5 c188a4d77459", "39d057594469 bfe7ad825eeb", "f7cf7a3ea07d 5e1c857c4f9b"),
    "line1245-n25000-epochs": ("e4332f8294be 6b990f9567d8", "810f27d1f755 25f29ef26f64", "d300af1e3cae a6e4b5fb5f28"),
    "line123-T250-same": ("dfd6b38d815e 47fce1ae230f", "e667d51a19ff 9148d349b151", "c0d3f947c4c0 997f0332d221"),
    "line123-T500-same": ("53fb73799466 e005fb0ebfd7", "a345cc7eeb84 e878942ae50f", "38f0b77a2266 dce580e77998"),
    "line123-T2000-same": ("9cef4491d229 74f607254ba0", "629c848d540f 49ea8884af31", "d99a3952526b 31e1b7a83e79"),
    "grid-n10000": ("a67c878ade9e 2b3414ddbdd1", "bb2aae9f1e54 95e2115da205", "70bd01eb0ae1 75c63d26dee5"),
    "line123-exact": ("46684dd63960 70c27c296629", "aa61032f61c0 9a40f9fe330c", "76779178d5c2 380f146a1a12"),
    "grid-exact": ("1684872a66f4 8b4de583f4d1", "fb8c6b507302 cc610557f02d", "4a5f268ba5f2 1068679021a5"),
    "simple-shapes-recursion": ("97e96131d4d9 201aa715a49f", "d0faff711ef4 90adaba71027", "f7c34d4f1677 5134e7a5c1be"),
    "digits": ("847513bf5d73 03c83d221465", "e9693966a7c1 3292657a5f5d", "9b37329dedce 0c6fd335f470"),
    "grid-recursion": ("f0117e7a90b7 ee94044dddab", "970f1ff4e0d8 418815ffaabb", "c0d625f57d00 94d4a122e0f3"),
    "grid-recursion-oracle": ("d0f1a4eac3a0 68a94e506e01", "68eb9862c715 3e21c239a20b", "4a4e94aa5033 7c76c5141a23"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_the_hashes_that_artifacts_carry(name: str) -> None:
    assert tuple(f"{get(name, scale).hash} {get(name, scale).training_hash}" for scale in SCALES) == PINNED[name]


def test_a_field_added_later_counts_where_it_is_not_at_its_default() -> None:
    experiment = get("line123", "paper")
    assert "curve" not in experiment._fields()
    assert dataclasses.replace(experiment, curve="cosine").training_hash != experiment.training_hash


def test_a_stream_s_seed_is_fixed_for_ever() -> None:
    # Stored artifacts were made with these numbers.
    digest = int.from_bytes(hashlib.sha256(b"3/training").digest()[:8], "big")
    assert stream(3, "training").initial_seed() == digest % 2**63


def test_an_experiment_s_network_follows_the_seed() -> None:
    experiment = get("line123", "smoke")
    assert same_bits(experiment.net(1).state_dict(), experiment.net(1).state_dict())
    assert not same_bits(experiment.net(1).state_dict(), experiment.net(2).state_dict())


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: get("line321"), ("experiment", "line123", "'line321'")),
        (lambda: get("line123", "huge"), ("scale", "smoke, laptop, paper", "'huge'")),
        (lambda: get("line123", "smoke").at("laptop"), ("scale", "paper", "smoke")),
        (lambda: EXPERIMENTS["line123"].at("Paper"), ("scale", "'Paper'")),
    ],
)
def test_errors(make, parts, unchecked) -> None:
    with pytest.raises(TinyhallError) as caught:
        make()
    one_line(caught.value, *parts)


@pytest.mark.parametrize("changes", [{"lr": 2e-3}, {"samples": 5}, {"name": "line321"}, {"scale": "huge"}])
def test_a_changed_experiment_replaces_no_artifact(changes: dict, tmp_path: Path) -> None:
    experiment = dataclasses.replace(get("line123", "smoke"), **changes)
    with pytest.raises(TinyhallError) as caught:
        reproduce(experiment, root=tmp_path / "a", runs=tmp_path / "r", progress=False)
    one_line(caught.value, "scale" if "scale" in changes else "experiment", "expected")
    assert not list(tmp_path.iterdir())


def test_at_its_own_scale_an_experiment_stays() -> None:
    experiment = get("line123", "smoke")
    assert experiment.at("smoke") is experiment


# The switch is on a chapter's evidence page, where it has one.
SWITCHES = [
    page if (page := chapter.parent / "evidence" / chapter.name).exists() else chapter
    for chapter in sorted((ROOT / "book").glob("[0-9]*.ipynb"))
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda path: path.stem)
def test_a_chapter_s_switch_makes_artifacts_that_the_book_has(switch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(switch.read_text())["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "RETRAIN = False" in first
    made: list[tuple[str, str, int]] = []
    places: set[Path] = set()

    def reproduce(experiment: Experiment, seed: int = 0, root: str = "artifacts", **_: Any) -> None:
        made.append((experiment.name, experiment.scale, seed))
        places.add(Path(root).resolve())

    def run(task: str, scale: str, seed: int = 0, root: str = "artifacts") -> None:
        made.append((bench.task(task).experiment, scale, seed))
        places.add(Path(root).resolve())

    monkeypatch.setattr(tinyhall, "reproduce", reproduce)
    monkeypatch.setattr(bench, "run", run)
    monkeypatch.delenv("TINYHALL_SCALE", raising=False)
    monkeypatch.chdir(switch.parent)
    exec(first.replace("RETRAIN = False", "RETRAIN = True"), {})
    assert made
    assert places <= {(ROOT / "book" / "artifacts").resolve()}
    assert set(made) <= set(available(ROOT / "book" / "artifacts"))


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_revision_is_of_the_package_and_not_of_what_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True)

    place = tmp_path / "site-packages" / "__init__.py"
    place.parent.mkdir()
    place.touch()
    monkeypatch.setattr(provenance, "_PACKAGE", place.parent)
    git("init", "-q")
    (tmp_path / ".gitignore").write_text("site-packages\n")
    git("add", ".gitignore")
    git("commit", "-qm", "another project")
    assert provenance.revision() == "unknown"
    git("add", "-f", "site-packages")
    git("commit", "-qm", "its own")
    assert len(found := provenance.revision()) == 12
    place.write_text("changed")
    assert provenance.revision() == found + "+"


def test_a_revision_is_asked_where_the_package_lies() -> None:
    assert provenance._PACKAGE == Path(tinyhall.__file__).parent


# A new kind of experiment is a class, and nothing else changes.


@dataclasses.dataclass(frozen=True)
class RingExperiment(Experiment):
    """Modes on a circle."""

    modes: int = 8
    samples: int = 100_000

    def _smaller(self, scale: str) -> dict[str, Any]:
        return {"n": 1_000, "steps": 100, "batch_size": 250, "samples": 400, "timesteps": 100}

    def data(self) -> GaussianMixture:
        angle = 2 * math.pi / self.modes * torch.arange(self.modes, dtype=torch.float64)
        return GaussianMixture(torch.stack([angle.cos(), angle.sin()], 1), 0.05, f"ring of {self.modes}")

    def net(self, seed: int, purpose: str = "weights") -> MLP:
        return MLP(2, 32, generator=stream(seed, purpose))

    def samplers(self) -> dict[str, Sampler]:
        return {"large": ddpm("large"), "small": ddpm("small")}

    def make(self, lab: Lab, samplers: Sequence[str], keep: tuple[int, int | None]) -> dict[str, Any]:
        net, run = self.trained(lab)
        began, out, known = time.perf_counter(), folder(lab.root, self, lab.seed), {"card": self.hash}
        write_tensors(out / "model.safetensors", dict(net.state_dict()), known)
        metrics: dict[str, Any] = {"losses": run.losses}
        for name in samplers:
            config = lab.sampling(self.samplers()[name])
            draw = PointDraw.make(
                net, self.data(), self.schedule(), self.samples, generator=lab.stream("samples"), config=config
            )
            metrics[name] = draw.report(self.removes)
            write_tensors(out / f"samples-{name}.safetensors", draw.tensors(), known)
        write_json(out / "metrics.json", metrics)
        return spent(run, began)


def test_a_new_kind_of_experiment_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(inspect.getsource(RingExperiment).splitlines()) < 40
    monkeypatch.setitem(EXPERIMENTS, "ring", RingExperiment("ring"))
    made = reproduce(get("ring", "smoke"), 3, root=tmp_path / "a", runs=tmp_path / "r", device="cpu", progress=False)
    assert available(tmp_path / "a") == [("ring", "smoke", 3)]
    loaded = load("ring", "smoke", 3, tmp_path / "a")
    assert (loaded.experiment, loaded.metrics) == (made.experiment, made.metrics)
    assert loaded.measured.startswith("ring, smoke scale, seed 3, n = 1,000, 100 steps of 250, T = 100 instead of 1,000, on ")
    assert same_bits(loaded.net.state_dict(), made.net.state_dict())
    assert loaded.samples("small")["x"].shape[1:] == (2,)
    table = loaded.table()
    of_draws = table[table.statistic == "fraction"]
    assert set(zip(of_draws["sampler"], of_draws["rule"], strict=True)) == {
        (sampler, rule) for sampler in ("large", "small") for rule in (4.0, 5.0, 6.0, 8.0)
    }
    assert (of_draws["n"] == 400).all()
    six = of_draws[(of_draws["sampler"] == "large") & (of_draws["rule"] == 6.0)]
    assert six["value"].item() == loaded.fraction("large").value == made.metrics["large"]["fraction"]["6"][0]
    assert tinyhall.results("ring", scale="smoke", root=tmp_path / "a")["experiment"].unique().tolist() == ["ring"]
