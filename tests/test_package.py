"""What importing costs."""

from __future__ import annotations

from common import run_python

HEAVY = ("matplotlib", "scipy", "sklearn", "accelerate", "tyro", "diffusers", "pandas", "IPython", "ipywidgets", "plotly")


def test_import_brings_nothing_heavy() -> None:
    code = f"""
import sys
import torch
before = set(sys.modules)
import tinyhall
from tinyhall import artifacts, cards, datasets, device, metrics, nets, sampling, schedule, training
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & set({HEAVY!r})))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_one_process_needs_no_accelerate() -> None:
    """Training and sampling alone never import it."""
    code = """
import sys, torch
from tinyhall import datasets, nets, sampling, schedule, training
g = torch.Generator().manual_seed(0)
s = schedule.Schedule.linear()
run = training.fit(nets.MLP(1), datasets.GaussianMixture.line().sample(20, g), s, steps=1, batch_size=5, lr=1e-3, generator=g,
                   progress=False)
sampling.sample(run.net, s, 2, generator=g, sampler=sampling.ddim(steps=2))
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
