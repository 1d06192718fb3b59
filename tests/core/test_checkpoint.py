"""The file format: exact, checked, written whole or not at all."""

import json
import os
import pathlib
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from iql_plugins import checkpoint
from iql_plugins.checkpoint import CheckpointError

DOCUMENT = {"name": "é", "numbers": [1, 2.5, None], "nested": {"rate": 0.1}}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.randn(3, 4).t(),
        "half": torch.randn(5).bfloat16(),
        "flags": torch.tensor([True, False]),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 2),
        "view": torch.arange(10)[2:5],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "agent.safetensors"
    checkpoint.write(path, DOCUMENT, tensors())
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = tensors()
    checkpoint.write(tmp_path / "x", DOCUMENT, written)
    document, read = checkpoint.read(str(tmp_path / "x"))
    assert document == DOCUMENT
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.cpu()), name


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for name, document in (("a", DOCUMENT), ("b", dict(reversed(DOCUMENT.items())))):
        torch.manual_seed(0)
        checkpoint.write(tmp_path / name, document, tensors())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_it_is_a_safetensors_file_that_others_can_read(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors())
        assert json.loads(file.metadata()["document"]) == DOCUMENT


@pytest.mark.parametrize("position", [0, 7, 20, 200, -60, -1])
def test_a_byte_that_was_changed_is_found(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x11
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"agent\.safetensors"):
        checkpoint.read(path)


@pytest.mark.parametrize("length", [0, 1, 8, 100, -1])
def test_a_file_that_was_cut_is_refused(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="is no checkpoint, or damaged"):
        checkpoint.read(path)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, "has version '2' of the format, known is '1': it was written by another release"),
        ({"format": "another"}, "no checkpoint of iql-plugins"),
        ({"document": '{"name": "forged"}'}, "is not as it was written: its checksum is another one"),
        ({"checksum": "0" * 64}, "is not as it was written"),
    ],
)
def test_a_header_that_was_changed_is_refused(path: Path, changes: dict[str, str], message: str) -> None:
    _, read = checkpoint.read(path)
    save_file(read, path, metadata(path) | changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path)


@pytest.mark.parametrize("change", ["renamed", "reshaped", "recast", "dropped"])
def test_tensors_that_were_changed_are_refused(path: Path, change: str) -> None:
    _, read = checkpoint.read(path)
    read = {name: tensor.contiguous() for name, tensor in read.items()}
    count = read.pop("count")
    read |= {
        "renamed": {"counter": count},
        "reshaped": {"count": count.reshape(1)},
        "recast": {"count": count.double()},
        "dropped": {},
    }[change]
    save_file(read, path, metadata(path))
    with pytest.raises(CheckpointError, match="its checksum is another one"):
        checkpoint.read(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "NaN"])
def test_a_document_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    header = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "document": text}
    save_file({}, path, header | {"checksum": checkpoint._checksum(text, {})})
    with pytest.raises(CheckpointError, match=r"document"):
        checkpoint.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nowhere"):
        checkpoint.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere.* to write 'x' to"):
        checkpoint.write(tmp_path / "nowhere" / "x", {}, {})


def fail(*arguments: Any, **options: Any) -> Any:
    raise OSError("no space left on device")


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write(path, {}, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupt_while_writing_leaves_the_old_file_and_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(path, {}, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_written_that_json_cannot_say(path: Path) -> None:
    before = path.read_bytes()
    for value in (float("nan"), float("inf"), {1, 2}, path):
        with pytest.raises((TypeError, ValueError), match="JSON"):
            checkpoint.write(path, {"value": value}, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_has_the_permissions_that_open_gives(tmp_path: Path) -> None:
    checkpoint.write_bytes(tmp_path / "ours", b"x")
    pathlib.Path(tmp_path / "plain").write_bytes(b"x")
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")}
    assert modes["ours"] == modes["plain"]


def test_the_state_of_an_optimiser_comes_back() -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([{"params": [parameter], "name": "actor", "betas": (0.8, 0.9)}])
    parameter.sum().backward()
    optimizer.step()
    tree, found = checkpoint.flatten(optimizer.state_dict(), "adam")
    state = checkpoint.unflatten(json.loads(json.dumps(tree)), found)
    assert state["param_groups"][0]["betas"] == [0.8, 0.9]
    assert state["state"].keys() == {0}
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(state["state"][0][name], value)


def test_a_tensor_that_is_missing_or_there_twice_is_named() -> None:
    tree, _ = checkpoint.flatten({"a": torch.zeros(1)}, "x")
    with pytest.raises(CheckpointError, match=r"no tensor 'x\.a'"):
        checkpoint.unflatten(tree, {})
    with pytest.raises(ValueError, match=r"two tensors have the name 'x\.a\.b'"):
        checkpoint.flatten({"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}, "x")
