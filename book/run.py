"""Runs notebooks side by side, one on each core, into the cache from which `jupyter-book build` takes what they print:
`python book/run.py book/*.ipynb`, from the top of the project.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

# Each notebook has a core to itself. Threads that wait for each other across busy cores take several times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor

CACHE = Path("_build/.jupyter_cache")  # where Jupyter Book looks for it


def run(paths: list[Path]) -> int:
    """How many failed; what went wrong in them is printed."""
    # A cache knows a notebook by its cells, and not the package or the artifacts that these met.
    shutil.rmtree(CACHE, ignore_errors=True)
    cache = get_cache(CACHE)
    for path in paths:
        cache.add_nb_to_project(str(path.resolve()))
    told = load_executor("local-parallel", cache, logger=logging.getLogger()).run_and_cache(timeout=900)
    for path in told.excepted:
        print(cache.get_project_record(path).traceback, file=sys.stderr)
    failed = [*told.excepted, *told.errored]
    for path in failed:
        print(f"failed: {path}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(min(run([Path(name) for name in sys.argv[1:]]), 1))
