"""Files: written whole or not at all, and anything that is not what it should be is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from common import one_line, same_bits, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyhall.core._check import TinyhallError
from tinyhall.nets import MLP
from tinyhall.store import files
from tinyhall.store.files import load_weights, read_json, read_tensors, write, write_json, write_tensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_tensors(path, MLP(1, width=8, generator=seeded(3)).state_dict(), {"card": "abc"})
    return path


def test_tensors_come_back(saved: Path) -> None:
    tensors, note = read_tensors(saved)
    assert same_bits(tensors, MLP(1, width=8, generator=seeded(3)).state_dict())
    assert note == {"card": "abc"}


def test_any_dtype_and_layout_comes_back(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "half": base.half(), "long": base.long(), "bool": base > 3, "scalar": base[0, 0], "row": base[1]}
    write_tensors(tmp_path / "x", tensors)  # some share storage, which safetensors alone refuses
    assert same_bits(read_tensors(tmp_path / "x")[0], tensors)


def test_read_tensors_outlive_their_file(saved: Path) -> None:
    tensors, _ = read_tensors(saved)
    kept = {k: v.clone() for k, v in tensors.items()}
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert same_bits(tensors, kept)


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": {"x": "é"}}
    write_json(tmp_path / "deep" / "er" / "x.json", value)
    assert read_json(tmp_path / "deep" / "er" / "x.json") == value
    # Sorted: diffs stay small.
    assert list(json.loads((tmp_path / "deep" / "er" / "x.json").read_text())) == ["a", "b", "sha256"]


def test_json_takes_no_nan(tmp_path: Path) -> None:
    for value in (float("nan"), torch.zeros(2)):
        with pytest.raises(TinyhallError) as caught:
            write_json(tmp_path / "x.json", {"a": value})
        one_line(caught.value, "artifact", "what JSON can hold", "x.json")
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half of the n")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with pytest.raises(TinyhallError) as caught:
        write(path, fail)
    one_line(caught.value, "artifact", f"to write {path}", "disk full")
    assert os.listdir(tmp_path) == ["x"]
    assert path.read_text() == "old"
    write(path, lambda part: part.write_text("new") and None)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    """The new file takes the old one's name in one move; it is not poured into it."""
    path = tmp_path / "x"
    path.write_text("old")
    with path.open() as reader:
        write(path, lambda part: part.write_text("new and longer") and None)
        assert reader.read() == "old"


def test_missing(tmp_path: Path) -> None:
    for read in (read_tensors, read_json):
        with pytest.raises(TinyhallError) as caught:
            read(tmp_path / "none")
        one_line(caught.value, "artifact", "expected a file", str(tmp_path / "none"))
        with pytest.raises(TinyhallError):
            read(tmp_path)  # a folder


def test_truncated_at_every_length(saved: Path) -> None:
    content = saved.read_bytes()
    for length in [*range(0, 64), *range(64, len(content), 37), len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(TinyhallError) as caught:
            read_tensors(saved)
        one_line(caught.value, "artifact", "whole safetensors file", str(saved))


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(TinyhallError):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"{}", b"\x80\x04K\x01.", b"PK\x03\x04", b"\xff" * 64, b""])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(TinyhallError) as caught:
        read_tensors(path)
    one_line(caught.value, "artifact", "safetensors", str(path))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"not json", b"{'a': 1}"])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(TinyhallError) as caught:
        read_json(path)
    one_line(caught.value, "artifact", "JSON", str(path))


def written(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    if name == "json":
        write_json(path, {"steps": 1234, 3: (0.5, None), "a": "ü"})
    else:
        write_tensors(
            path, {"x": torch.arange(24.0).reshape(4, 6), "b": torch.tensor(True), "none": torch.zeros(0)}, {"a": "1"}
        )
    return path


@pytest.mark.parametrize("name", ["json", "tensors"])
def test_no_flipped_bit_passes(tmp_path: Path, name: str) -> None:
    """Each is refused, or leaves what is read as it was: a blank in a header, a letter of the digest's own key."""
    path = written(tmp_path, name)
    content, read = path.read_bytes(), read_json if name == "json" else read_tensors
    whole, refused = read(path), 0
    for bit in [8 * i + 3 * i % 8 for i in range(len(content))]:  # one of each byte
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            got = read(path)
        except TinyhallError as error:
            one_line(error, "artifact", str(path))
            refused += 1
            continue
        if name == "json":
            assert whole.items() <= got.items(), bit
        else:
            assert same_bits(got[0], whole[0]) and whole[1].items() <= got[1].items(), bit
    assert refused > 0.8 * len(content)


@pytest.mark.parametrize("name", ["json", "tensors"])
def test_files_from_before_the_digest_load(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    path = written(tmp_path, name)
    if name == "json":
        value = read_json(path)
        path.write_text(json.dumps(value))
        assert read_json(path) == value
    else:
        tensors, note = read_tensors(path)
        save_file(tensors, path, note)
        assert same_bits(read_tensors(path)[0], tensors)


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5_000, '{"a": NaN}'])
def test_json_that_is_no_data(tmp_path: Path, content: str) -> None:
    (tmp_path / "x").write_text(content)
    with pytest.raises(TinyhallError) as caught:
        read_json(tmp_path / "x")
    one_line(caught.value, "artifact", "JSON", str(tmp_path / "x"))


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    """The second is refused while the first is at it; a reader sees the first one's file, whole."""
    path = tmp_path / "x"

    def slowly(part: Path) -> None:
        part.write_text("first")
        with pytest.raises(TinyhallError) as caught:
            write(path, lambda part: part.write_text("second") and None)  # locks are of open files: a process is no exception
        one_line(caught.value, str(part), "another process")

    write(path, slowly)
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["x"]


def test_too_large(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files._LARGEST > 4 * 4 * 10**9  # a billion weights in float32, their average and two moments of each
    monkeypatch.setattr(files, "_LARGEST", 100)
    content = saved.read_bytes()
    with pytest.raises(TinyhallError) as caught:
        write_tensors(saved, {"x": torch.zeros(20), "y": torch.zeros(6).half(), "z": torch.zeros(9, dtype=torch.uint8)})
    one_line(caught.value, "artifact", "at most 100 bytes", "got 101", str(saved))
    assert saved.read_bytes() == content
    write_tensors(saved, {"x": torch.zeros(25)}, {"long": 1000 * "note"})
    assert read_tensors(saved)[0]["x"].shape == (25,)  # what was written is read
    monkeypatch.setattr(files, "_LARGEST_HEADER", 0)
    with pytest.raises(TinyhallError) as caught:
        read_tensors(saved)
    one_line(caught.value, "artifact", "at most 100 bytes", str(saved))


def test_the_digest_s_key_is_taken(tmp_path: Path) -> None:
    for write_it in (
        lambda path: write_json(path, {"sha256": "of mine", "a": 1}),
        lambda path: write_tensors(path, {"a": torch.ones(1)}, {"sha256": "of mine"}),
    ):
        with pytest.raises(TinyhallError) as caught:
            write_it(tmp_path / "x")
        one_line(caught.value, "artifact", "no key 'sha256'", str(tmp_path / "x"))
    assert os.listdir(tmp_path) == []


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x"

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save(Trap(), path)
    with pytest.raises(TinyhallError):
        read_tensors(path)
    assert not (tmp_path / "sprung").exists()


def test_weights_are_loaded(saved: Path) -> None:
    net = MLP(1, width=8)
    load_weights(net, saved)
    assert same_bits(net.state_dict(), MLP(1, width=8, generator=seeded(3)).state_dict())


def test_half_precision_is_widened(tmp_path: Path) -> None:
    source = MLP(1, width=8, generator=seeded(3)).state_dict()
    write_tensors(tmp_path / "x", {k: v.half() for k, v in source.items()})
    net = MLP(1, width=8)
    load_weights(net, tmp_path / "x")
    for k, v in net.state_dict().items():
        assert v.dtype == torch.float32
        torch.testing.assert_close(v, source[k], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: w.pop("norm.weight"), ("norm.weight", "of shape (8,)", "absent")),
        (lambda w: w.update(extra=torch.zeros(2)), ("extra", "absent", "(2,)")),
        (lambda w: w.update({"norm.weight": torch.zeros(9)}), ("norm.weight", "(8,)", "(9,)")),
        (lambda w: w.update({"time.bias": torch.full((8,), float("nan"))}), ("time.bias", "finite")),
    ],
)
def test_weights_of_another_network_are_refused(saved: Path, change, parts: tuple[str, ...]) -> None:
    weights, note = read_tensors(saved)
    change(weights)
    write_tensors(saved, weights, note)
    net = MLP(1, width=8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(TinyhallError) as caught:
        load_weights(net, saved)
    one_line(caught.value, "artifact", str(saved), *parts)
    assert same_bits(net.state_dict(), before)
