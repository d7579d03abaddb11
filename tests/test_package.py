"""What importing costs, what it needs, and the names that it promises."""

from __future__ import annotations

import importlib

import pytest
from common import run_python

import tinyhall as th

HEAVY = ("matplotlib", "scipy", "sklearn", "accelerate", "tyro", "diffusers", "pandas", "IPython", "ipywidgets", "plotly")

# As if nothing were installed but torch, numpy, safetensors, tqdm, and what these ask for themselves.
ALONE = r"""
import re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

kept, asked = set(), ["torch", "numpy", "safetensors", "tqdm"]
while asked:
    name = plain(asked.pop())
    if name not in kept:
        kept.add(name)
        try:
            asked += [re.match(r"[\w.-]+", line)[0] for line in requires(name) or () if "extra ==" not in line]
        except PackageNotFoundError:
            pass
absent = {module for module, owners in packages_distributions().items() if not kept & set(map(plain, owners))} - {"tinyhall"}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
assert {"scipy", "pandas", "matplotlib", "accelerate", "jaxtyping"} <= absent
"""


def test_import_brings_nothing_heavy() -> None:
    code = f"""
import sys
import torch
before = set(sys.modules)
import tinyhall
from tinyhall import core, datasets, device, experiments, nets
from tinyhall.core import metrics, mixture, mlp, network, noise, recursion, sampling, schedule, training, unet
from tinyhall.measure import denoising, density, filtering, quality, stats
from tinyhall.store import checkpoint, files, generations
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & set({HEAVY!r})))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_import_alone_brings_the_core_and_no_wing() -> None:
    code = """
import sys
import tinyhall
print(sorted({name.split(".")[1] for name in sys.modules if name.startswith("tinyhall.")}))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['core']"


def test_the_core_works_with_torch_numpy_safetensors_and_tqdm_alone() -> None:
    """Not only its import: it trains, draws, scores and chooses, and `fit` and `load_weights` keep what was trained."""
    code = (
        ALONE
        + """
import tempfile, pathlib
import tinyhall.core as core
assert not [name for name in sys.modules if name.startswith("tinyhall.") and not name.startswith("tinyhall.core")], sys.modules
from tinyhall.data.mixtures import GaussianMixture
g, schedule, data = core.stream(0, "data"), core.Schedule.linear(1e-3, 0.2, 100), GaussianMixture.line()
*_, step = core.train(core.MLP(1, 8), data.sample(20, g), schedule, train_steps=3, batch_size=5, lr=1e-3, generator=g)
out = core.sample(step.run.net, schedule, 12, generator=g, sampler=core.ddim(sample_steps=20),
                  metrics=[core.TrajectoryVariance((0, 50))])
kept = core.lowest_k(next(iter(out.scores.values())), 10)
assert len(kept) == 10 and len(data.judge(out.x[kept]).kind) == 10
images = core.UNet(size=8, widths=(8,), blocks=1, classes=2)
assert core.sample(images, schedule, 2, generator=g, sampler=core.ddim(sample_steps=3)).x.shape == (2, 1, 8, 8)
import tinyhall as th
with tempfile.TemporaryDirectory() as folder:
    run = th.fit(core.MLP(1, 8), data.sample(20, g), schedule, train_steps=3, batch_size=5, lr=1e-3, generator=g,
                 checkpoint=pathlib.Path(folder) / "run", progress=True)
assert run.step == 3
th.PostHocVariance((5, 40)).of(run.net, schedule, out.x, generator=g)
th.nets.Tabulated(run.net, 3, points=10)
th.experiments.get("line123", "smoke")
assert not absent & {name.split(".")[0] for name in sys.modules}
"""
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_one_process_needs_no_accelerate() -> None:
    """Training and sampling alone never import it."""
    code = """
import sys, torch
from tinyhall import datasets, nets
from tinyhall.core import sampling, schedule
from tinyhall.store import checkpoint
g = torch.Generator().manual_seed(0)
s = schedule.Schedule.linear()
run = checkpoint.fit(nets.MLP(1), datasets.GaussianMixture.line().sample(20, g), s, train_steps=1, batch_size=5, lr=1e-3,
                     generator=g, progress=False)
sampling.sample(run.net, s, 2, generator=g, sampler=sampling.ddim(sample_steps=2))
print([m for m in ("accelerate", "scipy", "matplotlib") if m in sys.modules])
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_what_needs_scipy_names_the_extra_that_brings_it() -> None:
    code = """
import sys
sys.modules["scipy"] = None  # as if it were not installed
import torch
import tinyhall as th
for ask in (
    lambda: th.fraction(1, 3), lambda: th.auroc(torch.tensor([0.0, 1.0]), torch.tensor([False, True])),
    lambda: th.mean([1.0, 2.0]), lambda: th.sliced_wasserstein(torch.zeros(2, 2), torch.zeros(2, 2)),
):
    try:
        ask()
    except ImportError as error:
        print(error)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == 4 * ["tinyhall: intervals and AUROC need scipy: pip install 'tinyhall[stats]'"]


def test_every_promised_name_is_there() -> None:
    assert len(set(th.__all__)) == len(th.__all__)
    for name in th.__all__:
        assert getattr(th, name) is not None
    assert set(th.__all__) <= set(dir(th))
    core = importlib.import_module("tinyhall.core")
    for name in core.__all__:
        assert getattr(th, name) is getattr(core, name)
    with pytest.raises(AttributeError, match=r"module 'tinyhall' has no attribute 'law_of_large_numbers'"):
        th.law_of_large_numbers  # noqa: B018


def test_a_name_is_the_same_wherever_it_is_asked_for() -> None:
    for name, module in {
        "fit": "store.checkpoint", "recurse": "store.generations", "PostHocVariance": "measure.denoising",
        "denoising_error": "measure.denoising", "Filter": "measure.filtering", "sample_density": "measure.density",
        "auroc": "measure.stats", "lowest_k": "core.recursion", "stream": "core.noise", "conditioned": "core.network",
        "Step": "core.metrics", "load": "lab.artifact", "reproduce": "lab.reproduce",
    }.items():  # fmt: skip
        assert getattr(th, name) is getattr(importlib.import_module(f"tinyhall.{module}"), name)
    for face, name, module in (
        ("datasets", "GaussianMixture", "data.mixtures"), ("datasets", "MNIST", "data.mnist"),
        ("datasets", "Hands", "data.hands"), ("datasets", "SimpleShapes", "data.shapes"),
        ("datasets", "HandPhotos", "data.hands"), ("nets", "MLP", "core.mlp"), ("nets", "UNet", "core.unet"),
        ("nets", "Tabulated", "measure.density"),
    ):  # fmt: skip
        assert getattr(getattr(th, face), name) is getattr(importlib.import_module(f"tinyhall.{module}"), name)


@pytest.mark.parametrize(
    ("old", "new"),
    [("keep_k", "lowest_k"), ("kept_at", "tnr_at_tpr"), ("law", "sample_density"), ("cards", "experiments")],
)
def test_an_old_name_warns_and_is_the_new_one(old: str, new: str) -> None:
    for _ in range(2):  # not only once
        with pytest.warns(FutureWarning, match=rf"^tinyhall: th\.{old} is now th\.{new}$"):
            found = getattr(th, old)
        assert found is getattr(th, new)
    assert old not in th.__all__


def test_the_old_card_registry_warns_and_is_the_new_one() -> None:
    with pytest.warns(FutureWarning, match=r"th\.cards is now th\.experiments"):
        cards = th.cards
    with pytest.warns(FutureWarning, match=r"CARDS is now .*EXPERIMENTS"):
        assert cards.CARDS is th.experiments.EXPERIMENTS
    assert cards.get("line123", "smoke") == th.experiments.get("line123", "smoke")


def test_a_warning_of_an_old_name_points_at_whoever_uses_it() -> None:
    """In a process without the type checks, whose wrappers would stand between."""
    code = """
import warnings
import tinyhall as th
g = th.stream(0, "data")
uses = [
    lambda: th.keep_k, lambda: th.cards.CARDS, lambda: th.Schedule.linear(steps=100), lambda: th.Schedule.cosine(steps=100),
    lambda: th.Schedule.linear().steps, lambda: th.ddim(steps=5), lambda: th.ddpm(steps=5), lambda: th.hybrid(steps=5),
    lambda: th.train(th.nets.MLP(1), th.GaussianMixture.line().sample(9, g), th.Schedule.linear(), steps=1,
                     batch_size=5, lr=1e-3, generator=g),
    lambda: th.fit(th.nets.MLP(1), th.GaussianMixture.line().sample(9, g), th.Schedule.linear(), steps=1, batch_size=5, lr=1e-3,
                   generator=g, progress=False),
]
for use in uses:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        use()
    assert told and all(w.category is FutureWarning and w.filename == "<string>" for w in told), [str(w) for w in told]
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
