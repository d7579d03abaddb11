"""Peak memory of scoring, above what the imports take: `python tests/benchmarks/memory.py SAMPLES STEPS [network]`.

A process of its own, so that no earlier peak hides this one. Prints one JSON object. Linux only: the kernel keeps the peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def peak(samples: int, steps: int, network: bool = False) -> dict[str, float]:
    """Runs this file in a fresh process; `peak_mb` is its peak resident memory above that after the imports."""
    command = [sys.executable, __file__, str(samples), str(steps), *(["network"] if network else [])]
    # One thread: the peak is the same, and beside other programs threads that wait for each other take many times as long.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=one_thread)
    return json.loads(out.stdout.splitlines()[-1])


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def _main(samples: int, steps: int, network: bool) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    from tinyhall.core.metrics import TrajectoryVariance
    from tinyhall.core.sampling import ddpm, sample
    from tinyhall.core.schedule import Schedule
    from tinyhall.nets import MLP

    schedule = Schedule.linear()
    # Memory does not depend on what the network predicts. The cheap one shows long runs, the real one its own activations.
    net = MLP(2) if network else lambda x, t, label=None: x * 0.999
    generator = torch.Generator().manual_seed(0)
    metric = TrajectoryVariance((0, schedule.timesteps))
    # Once in small, so that what torch loads late counts with the imports.
    sample(net, schedule, 64, shape=(2,), metrics=[metric], sampler=ddpm(sample_steps=2), generator=generator)
    before = _resident("VmRSS")
    out = sample(net, schedule, samples, shape=(2,), metrics=[metric], sampler=ddpm(sample_steps=steps), generator=generator)
    assert len(out) == samples and len(out.scores[metric.name]) == samples
    print(json.dumps({"samples": samples, "steps": steps, "network": network, "peak_mb": _resident("VmHWM") - before}))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), "network" in sys.argv[3:])
