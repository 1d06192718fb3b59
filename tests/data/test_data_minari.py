"""Minari datasets on this machine; none is ever downloaded."""

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict.memmap import MemoryMappedTensor

from iql_plugins.data import DatasetError, UnknownSourceError, load_dataset
from iql_plugins.data.inspection import inspect

pytest.importorskip("minari")

from gymnasium import spaces
from minari_helpers import BOX, episode, make


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of local datasets; whoever reaches for the network fails."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def refuse(*_: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def test_a_local_dataset_by_its_id_and_by_its_path(root: Path) -> None:
    make("test/walk-v0", [episode(3, "T"), episode(2, "c", start=10), episode(2, "-", start=20), episode(1, "b")])
    data = load_dataset("test/walk-v0")
    assert data["next", "done"].squeeze(-1).int().tolist() == [0, 0, 1, 0, 1, 0, 1, 1]
    assert data["next", "terminated"].squeeze(-1).int().tolist() == [0, 0, 1, 0, 0, 0, 0, 1]
    assert data["observation"][:, 0].tolist() == [0, 1, 2, 10, 11, 20, 21, 0]
    assert data["next", "observation"][:, 0].tolist() == [1, 2, 3, 11, 12, 21, 22, 1]
    assert data["observation"].dtype == torch.float32
    for path in (root / "test" / "walk-v0", str(root / "test" / "walk-v0" / "data")):
        assert (load_dataset(path) == data).all()


def test_dict_and_discrete_spaces(root: Path) -> None:
    space = spaces.Dict({"place": BOX, "goal": spaces.Discrete(5)})
    episodes = [episode(3, "T", discrete=True, nested=True), episode(2, "c", discrete=True, nested=True)]
    make("walk-v1", episodes, space, spaces.Discrete(3))
    data = load_dataset("walk-v1")
    assert data["action"].tolist() == [[0], [1], [2], [0], [1]]
    assert data["observation", "goal"].tolist() == [[0], [1], [2], [0], [1]]
    assert data["next", "observation", "goal"].dtype == torch.int64
    assert data["next", "observation", "place"][:, 0].tolist() == [1, 2, 3, 1, 2]


def test_it_can_be_written_to_be_mapped(root: Path) -> None:
    make("walk-v0", [episode(3, "T"), episode(2, "c")])
    data = load_dataset("walk-v0", memmap_dir=root / "mapped")
    assert isinstance(data["observation"], MemoryMappedTensor)
    assert (data == load_dataset("walk-v0")).all()


def test_a_dataset_that_is_not_stored_as_hdf5_is_refused(root: Path) -> None:
    """Neither the names of its columns nor its sizes can be looked at before Minari has read them whole."""
    make("walk-v0", [episode(3, "T")])
    path = root / "walk-v0" / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_format": "arrow"}))
    with pytest.raises(DatasetError, match="stores its episodes as 'arrow': only 'hdf5' is read"):
        load_dataset("walk-v0")


def test_nothing_is_downloaded(root: Path) -> None:
    with pytest.raises(
        UnknownSourceError, match="nothing is downloaded here, run 'minari download D4RL/door/human-v2'"
    ):
        load_dataset("D4RL/door/human-v2")
    assert list(root.iterdir()) == []


def test_an_inspection_knows_the_bounds_and_contradictions(root: Path) -> None:
    make("walk-v0", [episode(3, "T"), episode(2, "b")])
    findings = {finding.code: finding for finding in inspect("walk-v0").findings}
    assert findings["terminal-and-timeout"].row == 4
    assert "actions-outside-bounds" not in findings


def test_a_dataset_without_spaces_is_refused(root: Path) -> None:
    """Its environment would be built to learn them, by whatever callable the file names."""
    make("walk-v0", [episode(3, "T")])
    path = root / "walk-v0" / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["observation_space"]
    metadata["env_spec"] = json.dumps({"id": "x-v0", "entry_point": "os:abort"})
    path.write_text(json.dumps(metadata))
    with pytest.raises(DatasetError, match="'observation_space'"):
        load_dataset("walk-v0")


def test_broken_datasets_are_one_clear_error(root: Path) -> None:
    make("walk-v0", [episode(3, "T"), episode(2, "c")])
    data = root / "walk-v0" / "data"
    whole = (data / "main_data.hdf5").read_bytes()
    metadata = (data / "metadata.json").read_text()

    def error() -> str:
        with pytest.raises(DatasetError) as raised:
            load_dataset("walk-v0")
        assert "\n" not in str(raised.value)
        return str(raised.value)

    (data / "main_data.hdf5").write_bytes(whole[: len(whole) // 2])
    assert str(data) in error()
    (data / "main_data.hdf5").write_bytes(whole)
    (data / "metadata.json").write_text(metadata.replace('"total_steps": 5', '"total_steps": 4'))
    assert "more transitions than the 4" in error()
    (data / "metadata.json").write_text(metadata.replace('"total_steps": 5', '"total_steps": 6'))
    assert "5 transitions, 6 were expected" in error()
    (data / "metadata.json").write_text("{")
    assert str(data) in error()
    (data / "metadata.json").write_text("[]")
    assert str(data) in error()


def test_spaces_without_a_place_in_the_layout_are_refused(root: Path) -> None:
    given = replace(episode(3, "T"), actions=np.zeros((3, 2), np.int64))
    make("walk-v0", [given], action_space=spaces.MultiDiscrete([3, 3]))
    with pytest.raises(DatasetError, match="MultiDiscrete"):
        load_dataset("walk-v0")


def test_without_minari_the_error_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("walk-v0", [episode(3, "T")])
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"pip install 'iql-plugins\[minari\]'"):
        load_dataset("walk-v0")
