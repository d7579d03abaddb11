"""Artifacts: what one says of itself, what is refused in its place, and the tables of all that was measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT, one_line, same_bits

import tinyhall as th
from tinyhall.core._check import TinyhallError
from tinyhall.core.metrics import parsed
from tinyhall.core.schedule import Schedule
from tinyhall.lab import artifact as artifact_module
from tinyhall.lab import experiments
from tinyhall.lab.artifact import COLUMNS, Artifact, available, load, respelled, results, tidy
from tinyhall.lab.experiment import folder
from tinyhall.store import files
from tinyhall.store.files import read_json, read_tensors, write_json, write_tensors

BOOK = ROOT / "book" / "artifacts"


def artifact(root: Path, name: str, seed: int) -> Path:
    """What a run would leave, without the run."""
    experiment = experiments.get(name, "smoke")
    place = folder(root, experiment, 0)
    write_tensors(place / "model.safetensors", experiment.net(seed).state_dict(), {"card": experiment.hash})
    write_tensors(place / "samples-large.safetensors", {"x": torch.zeros(3, 1)}, {"card": experiment.hash})
    write_json(place / "metrics.json", {"large": {"n": 3}})
    info = {"card": asdict(experiment), "hash": experiment.hash, "seed": 0, "device": "cpu", "revision": "unknown"}
    write_json(place / "card.json", info)
    return place


@pytest.mark.parametrize("name", ["model", "samples-large"])
def test_an_artifact_does_not_take_a_file_of_another(tmp_path: Path, name: str) -> None:
    """The two networks have the same shapes: only the note tells them apart."""
    ours, theirs = artifact(tmp_path, "line123", 0), artifact(tmp_path, "line123-n1000", 1)
    loaded = load("line123", "smoke", 0, tmp_path)
    assert len(loaded.samples("large")["x"]) == 3
    (theirs / f"{name}.safetensors").rename(ours / f"{name}.safetensors")
    with pytest.raises(TinyhallError) as caught:
        loaded.net if name == "model" else loaded.samples("large")
    one_line(caught.value, "artifact", name, loaded.experiment.hash, experiments.get("line123-n1000", "smoke").hash)


def test_a_model_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact(tmp_path, "line123", 0)
    read: list[str] = []
    for module in (files, artifact_module):
        monkeypatch.setattr(module, "read_tensors", lambda path: read.append(path.name) or read_tensors(path))
    loaded = load("line123", "smoke", 0, tmp_path)
    assert same_bits(loaded.net.state_dict(), experiments.get("line123", "smoke").net(0).state_dict())
    assert read == ["model.safetensors"]


def test_what_is_missing_is_made_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(TinyhallError) as caught:
        load("line123", "smoke", 2, tmp_path)
    one_line(caught.value, "artifact", f"reproduce line123 --scale smoke --seed 2 --root {tmp_path}`")


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": None}, {"device": 3}])
def test_an_artifact_says_what_it_is(tmp_path: Path, change: dict) -> None:
    place = artifact(tmp_path, "line123", 0)
    info = read_json(place / "card.json")
    write_json(place / "card.json", info | change)
    with pytest.raises(TinyhallError) as caught:
        load("line123", "smoke", 0, tmp_path)
    one_line(caught.value, "artifact", "seed 0", str(place))
    write_json(place / "card.json", info)
    for metrics in ([], {}, "none"):
        write_json(place / "metrics.json", metrics)
        with pytest.raises(TinyhallError):
            load("line123", "smoke", 0, tmp_path)
    for info in ([], {"card": "line123"}, None):
        write_json(place / "card.json", info)
        with pytest.raises(TinyhallError) as caught:
            available(tmp_path)
        one_line(caught.value, "artifact", str(place))


@pytest.mark.parametrize(
    ("name", "scale", "reduced"),
    [
        ("line123", "laptop", ""),
        ("mnist", "laptop", ""),  # 500 are the paper's, too
        ("grid", "paper", ""),
        ("grid", "laptop", ", T = 300 instead of 1,000"),
        ("recursion", "laptop", ", T = 300 instead of 1,000, 9 modes instead of 25"),
        ("recursion-fine", "laptop", ", 9 modes instead of 25"),
    ],
)
def test_a_caption_says_what_is_not_the_paper_s(name: str, scale: str, reduced: str) -> None:
    experiment = experiments.get(name, scale)
    made = Artifact(Path("nowhere"), experiment, {"seed": 0, "device": "cpu"}, {})
    batch = min(experiment.batch_size, experiment.n)
    size = f"n = {experiment.n:,}, {experiment.steps:,} steps of {batch:,}{reduced}"
    assert made.measured == f"{name}, {scale} scale, seed 0, {size}, on cpu"


@pytest.mark.parametrize(
    ("metrics", "asked", "parts"),
    [
        ({"losses": [1.0], "large": {"fraction": {"6": [0.1, 0, 1, 9]}}}, ("larg",), ("sampler", "one of large", "'larg'")),
        ({"large": {"fraction": {"6": [0.1, 0, 1, 9]}}}, ("large", "7"), ("width", "one of 6", "'7'")),
        ({"arms": {"none": []}}, ("large",), ("sampler", "recursion", "'large'")),
    ],
)
def test_a_fraction_that_was_not_measured(metrics: dict, asked: tuple[str, ...], parts: tuple[str, ...]) -> None:
    made = Artifact(Path("nowhere"), experiments.get("line123"), {}, metrics)
    with pytest.raises(TinyhallError) as caught:
        made.fraction(*asked)
    one_line(caught.value, *parts)
    if "large" in metrics:
        assert made.fraction("large").value == 0.1


# Tables.

SCHEDULE = Schedule.linear()
FOUND = {
    "kept": [0.6, 0.5, 0.7, 50], "removed": [0.7, 0.5, 0.9, 10], "kept_same": [0.65, 0.5, 0.7, 9], "auroc": [0.9, 0.8, 1.0, 50],
}  # fmt: skip
POINTS = {
    "losses": [1.0, 0.5],
    "large": {
        "n": 100, "fraction": {"4": [0.2, 0.1, 0.3, 100], "5": [0.1, 0.05, 0.15, 100]}, "integral": {"5": 0.11},
        "windows": {"0-10": {"5": FOUND}, "[10,20)": {"4": FOUND, "5": FOUND}, "0-200": {}},
    },
    "ddim": {"n": 10, "fraction": {"5": [0.3, 0.2, 0.4, 10]}, "windows": {}},
}  # fmt: skip
IMAGES = {
    "by_step": [{"step": 5, "fraction": {"any": [0.5, 0.1, 0.9, 9]}}],
    "small": {
        "n": 60, "fraction": {"any": [0.5, 0.4, 0.6, 60], "blank": [0.1, 0.0, 0.2, 60]},
        "windows": {"0-100": {"mean": FOUND, "local": None}, "100-1000": {"mean": FOUND, "local": FOUND}},
    },
}  # fmt: skip


def one(table: Any, **where: Any) -> Any:
    """The only row of which that is true."""
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1, table
    return table.iloc[0]


TYPES = {column: "object" for column in ("sampler", "window", "rule", "statistic")}
TYPES |= {column: "float64" for column in ("alpha_bar_low", "alpha_bar_high", "value", "low", "high", "n")}


def types(table: Any) -> dict[str, str]:
    return {column: str(table[column].dtype) for column in COLUMNS}


def raw(row: Any) -> list[float]:
    return [row["value"], row["low"], row["high"], row["n"]]


def test_windows_of_older_files_are_respelled() -> None:
    told = respelled(POINTS)
    assert list(told["large"]["windows"]) == ["[0,10)", "[10,20)", "[0,200)"]
    assert list(respelled(IMAGES)["small"]["windows"]) == ["[0,100)", "[100,1000)"]
    assert respelled(told) == told
    assert told["large"]["windows"]["[0,10)"] == POINTS["large"]["windows"]["0-10"]
    assert (told["losses"], told["ddim"]) == (POINTS["losses"], POINTS["ddim"])
    assert "0-10" in POINTS["large"]["windows"]  # what came is as it was


@pytest.mark.parametrize("window", ["0,10", "x", "", "[0,10]", "-3-5", "[10,0)"])
def test_a_window_that_is_none_is_no_row(window: str) -> None:
    metrics = respelled({"large": {"n": 9, "fraction": {}, "windows": {window: {"5": FOUND}}}})
    with pytest.raises(TinyhallError) as caught:
        tidy(metrics, SCHEDULE)
    one_line(caught.value, "window", "expected")


def test_a_table_of_points_holds_every_figure() -> None:
    table = tidy(respelled(POINTS), SCHEDULE)
    assert tuple(table.columns) == COLUMNS
    assert types(table) == TYPES
    assert len(table) == 3 + 1 + 3 * 4
    assert raw(one(table, sampler="large", statistic="fraction", rule=4.0)) == POINTS["large"]["fraction"]["4"]
    assert raw(one(table, sampler="ddim", statistic="fraction", rule=5.0)) == POINTS["ddim"]["fraction"]["5"]
    exact = one(table, statistic="integral")
    assert (exact["sampler"], exact["rule"], exact["value"]) == ("large", 5.0, 0.11)
    assert exact[["window", "alpha_bar_low", "alpha_bar_high", "low", "high", "n"]].isna().all()
    for window, rule in (("[0,10)", 5.0), ("[10,20)", 4.0), ("[10,20)", 5.0)):
        for statistic, estimate in FOUND.items():
            row = one(table, window=window, rule=rule, statistic=statistic)
            assert raw(row) == estimate
            assert (row["alpha_bar_low"], row["alpha_bar_high"]) == SCHEDULE.alpha_bars(parsed(window))
    ends = table.dropna(subset=["window"])
    assert (ends["alpha_bar_low"] <= ends["alpha_bar_high"]).all() and (ends["alpha_bar_low"] > 0).all()


def test_a_table_of_images_tells_kinds_and_patches_apart() -> None:
    table = tidy(respelled(IMAGES), SCHEDULE)
    assert tuple(table.columns) == COLUMNS and len(table) == 2 + 3 * 4
    assert types(table) == TYPES
    assert raw(one(table, statistic="fraction", rule="blank")) == IMAGES["small"]["fraction"]["blank"]
    assert raw(one(table, statistic="auroc", window="[0,100)", rule="any")) == FOUND["auroc"]
    assert not len(table[(table["window"] == "[0,100)") & table["statistic"].str.endswith(", local")])
    assert raw(one(table, statistic="kept, local", window="[100,1000)")) == FOUND["kept"]


def test_a_table_of_nothing_has_its_columns() -> None:
    table = tidy({"losses": [1.0]}, SCHEDULE)
    assert (tuple(table.columns), len(table), types(table)) == (COLUMNS, 0, TYPES)


def test_a_table_of_generations_numbers_them() -> None:
    told = load("recursion", "laptop", 0, BOOK)
    table = told.table()
    assert tuple(table.columns) == (*COLUMNS, "generation")
    assert (types(table), str(table["generation"].dtype)) == (TYPES, "int64")
    assert set(table["sampler"]) == set(told.metrics["arms"])
    assert table[["window", "rule", "alpha_bar_low", "alpha_bar_high", "low", "high", "n"]].isna().all(axis=None)
    for arm, history in told.metrics["arms"].items():
        assert sorted(table[table["sampler"] == arm]["generation"].unique()) == [1, 2, 3, 4, 5]
        for generation, figures in enumerate(history, start=1):
            where = {"sampler": arm, "generation": generation}
            assert one(table, statistic="hallucinated", **where)["value"] == figures["fraction"]["6"][0]
            assert one(table, statistic="AUROC", **where)["value"] == figures["auroc"][0]


def test_results_of_all_seeds_say_where_each_comes_from() -> None:
    table = results("line123", "recursion", scale="laptop", root=BOOK)
    assert tuple(table.columns) == (*COLUMNS, "experiment", "scale", "seed", "device", "revision", "generation")
    assert table.index.tolist() == list(range(len(table)))
    assert types(table) == TYPES
    assert set(table["scale"]) == {"laptop"}
    for name, seeds in (("line123", (0, 1, 2)), ("recursion", (0, 1, 2))):
        assert sorted(table[table["experiment"] == name]["seed"].unique()) == list(seeds)
        for seed in seeds:
            told = load(name, "laptop", seed, BOOK)
            rows = table[(table["experiment"] == name) & (table["seed"] == seed)]
            assert (set(rows["device"]), set(rows["revision"])) == ({told.info["device"]}, {told.info["revision"]})
            assert rows["value"].tolist() == pytest.approx(told.table()["value"].tolist(), rel=0, abs=0, nan_ok=True)
    of_points, of_generations = (table[table["experiment"] == name] for name in ("line123", "recursion"))
    assert of_points["generation"].isna().all() and of_generations["generation"].notna().all()
    row = one(of_points, seed=1, sampler="large", statistic="fraction", rule=6.0)
    assert raw(row) == list(load("line123", "laptop", 1, BOOK).fraction("large"))


def test_results_of_everything_at_a_scale() -> None:
    table = th.results(scale="laptop", root=BOOK)
    made = {(name, seed) for name, scale, seed in available(BOOK) if scale == "laptop"}
    assert set(zip(table["experiment"], table["seed"], strict=True)) == made
    assert (table["alpha_bar_low"] <= table["alpha_bar_high"]).eq(table["window"].notna()).all()


def test_results_of_an_experiment_that_was_not_run() -> None:
    with pytest.raises(TinyhallError) as caught:
        results("line123", "line124", scale="laptop", root=BOOK)
    one_line(caught.value, "artifact", "line124", "laptop", str(BOOK))


def test_results_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(TinyhallError) as caught:
        results(root=tmp_path)
    one_line(caught.value, "artifact", "any experiment at paper scale", str(tmp_path))


@pytest.mark.parametrize(("name", "scale", "seed"), available(BOOK))
def test_every_artifact_of_the_book_loads_and_has_a_table(name: str, scale: str, seed: int) -> None:
    made = load(name, scale, seed, BOOK)
    table = made.table()
    assert len(table) > 0 and table["value"].notna().any()
    assert tuple(table.columns)[: len(COLUMNS)] == COLUMNS and types(table) == TYPES
    for window in table["window"].dropna().unique():
        a, b = parsed(window)
        assert 0 <= a < b <= made.experiment.timesteps
    for sampler, told in made.metrics.items():
        if not isinstance(told, dict) or "fraction" not in told:
            continue
        rows = table[table["sampler"] == sampler]
        raws = [raw(row) for _, row in rows[rows["statistic"] == "fraction"].iterrows()]
        assert raws == [list(estimate) for estimate in told["fraction"].values()]
        areas = [
            report["auroc"]
            for found in told["windows"].values()
            for rule, report in found.items()
            if report and rule != "local"
        ]
        assert [raw(row) for _, row in rows[rows["statistic"] == "auroc"].iterrows()] == areas
        assert list(rows["window"].dropna().unique()) == [w for w, found in told["windows"].items() if any(found.values())]
