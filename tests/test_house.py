"""The plan of the house, as `book/inside.md` tells it: each of its rules is kept here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from common import ROOT, run_python

PACKAGE = ROOT / "tinyhall"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
DOORS = {"fit", "sample", "recurse", "reverse", "UNet.__init__"}  # what users call with keywords: as many as they have settings


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of what a file takes from the package, wherever in it that stands; not what types alone need."""
    own = name(path).split(".")
    here = own if path.name == "__init__.py" else own[:-1]

    def walk(node: ast.AST) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.ImportFrom) and child.level:
                base = ".".join(here[: len(here) - child.level + 1] + ([child.module] if child.module else []))
                for alias in child.names:
                    is_module = (PACKAGE.parent / Path(*f"{base}.{alias.name}".split("."))).with_suffix(".py").exists()
                    yield (f"{base}.{alias.name}", "") if is_module else (base, alias.name)
            elif isinstance(child, ast.ImportFrom | ast.Import):
                names = [child.module or ""] if isinstance(child, ast.ImportFrom) else [a.name for a in child.names]
                assert not any(n.split(".")[0] == "tinyhall" for n in names), f"{path}: relative imports inside the package"
            yield from walk(child)

    yield from walk(TREES[path])


GRAPH = {name(path): {module for module, _ in imports(path)} for path in FILES}


def test_the_core_is_an_evening_s_reading_and_stands_alone() -> None:
    core = sorted((PACKAGE / "core").glob("*.py"))
    assert sum(len(path.read_text().splitlines()) for path in core) <= 2_000
    assert {m for path in core for m in GRAPH[name(path)] if not m.startswith("tinyhall.core")} == set()


def test_the_core_asks_for_torch_numpy_safetensors_and_tqdm_alone() -> None:
    code = """
import sys
class Refuse:
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "safetensors", "tqdm", "tinyhall"}
    def find_spec(self, name, path=None, target=None):
        asks = sys._getframe(1)
        while asks and "importlib" in asks.f_code.co_filename: asks = asks.f_back
        ours = asks and "/tinyhall/" in asks.f_code.co_filename
        if ours and name.split(".")[0] not in self.allowed:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import tinyhall.core
from tinyhall.core import *
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_no_circle_of_imports() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in GRAPH.get(module, ()):
                visit(other, (*above, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_wings_lean_one_way() -> None:
    # What stands to the left is never asked for by what stands to the right of it.
    order = ["figures", "lab", "data", "store", "measure", "core"]
    rank = {wing: i for i, wing in enumerate(order)}
    for module, others in GRAPH.items():
        for other in others:
            a, b = (m.split(".")[1] if "." in m else "" for m in (module, other))
            if a in rank and b in rank:
                assert rank[b] >= rank[a] or (a, b) == ("store", "data"), f"{module} -> {other}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_private_name_is_used_by_another_module(path: Path) -> None:
    rooms = {"_check", "_typing", "_renamed", "__all__", "__version__"}  # shared by all of the package, and private to it
    for module, what in imports(path):
        assert not what.startswith("_") or what in rooms, f"{path}: {what} of {module}"
    modules = {
        alias.asname or alias.name for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        assert not (isinstance(node.value, ast.Name) and node.value.id in modules), f"{path}:{node.lineno}: {ast.unparse(node)}"


def functions() -> Iterator[tuple[Path, str, ast.FunctionDef]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for child in node.body:
                    if isinstance(child, ast.FunctionDef):
                        yield path, f"{node.name}.{child.name}", child
            elif isinstance(node, ast.Module):
                for child in node.body:
                    if isinstance(child, ast.FunctionDef):
                        yield path, child.name, child


def test_no_function_has_more_than_eight_parameters_but_the_public_doors() -> None:
    long = {
        f"{path.relative_to(ROOT)}: {at}"
        for path, at, node in functions()
        if len([a for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")])
        + bool(node.args.kwarg)
        > 8
        and at not in DOORS
    }
    assert long == set()


def test_nothing_passes_more_than_five_things_on_by_position() -> None:
    # Of functions of the package: what torch or matplotlib take is theirs to say.
    own = {node.name for _, _, node in functions() if not node.name.startswith("__")}
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and len(node.args) > 5 and ast.unparse(node.func).split(".")[-1] in own
    }
    assert long == set()


def test_an_experiment_is_never_asked_what_kind_it_is() -> None:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                assert "Experiment" not in ast.unparse(node.args[1]), f"{path}:{node.lineno}"


def test_a_window_has_one_spelling() -> None:
    # Written out as text, a window's ends stand in an f-string as [a,b): `spelled` does that, and nothing else in the package.
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'f"[^"\n]*\{a\}-\{b\}', text.replace('{f"{a}-{b}": int(c)', "")), path
        if path.name != "metrics.py":
            assert "{a},{b})" not in text, path


def test_the_map_names_every_room() -> None:
    told = (ROOT / "book" / "inside.md").read_text(encoding="utf-8")
    for path in FILES:
        room = path.stem if path.stem != "__init__" else path.parent.name
        assert re.search(rf"\b{re.escape(room)}\b", told), f"{room} is not in book/inside.md"
    reference = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    for path in FILES:
        if not path.stem.startswith("_") and path.parent not in (PACKAGE, PACKAGE / "adapters"):
            assert f"automodule:: {name(path)}\n" in reference, f"{name(path)} is not in book/api.md"
