"""``.d3`` files of the d3rlpy adapter: whose they are, and that they are as they were written."""

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import d3rlpy
import pytest
import torch
from d3rlpy.base import LearnableConfigWithShape
from d3rlpy_helpers import ACTION, CONTINUOUS, VECTOR, assert_trains_on, config, dataset, fitted

import iql_d3rlpy
from iql_d3rlpy.files import Registered
from iql_plugins.checkpoint import CheckpointError


@pytest.fixture
def place(device: torch.device) -> str:
    """The device as d3rlpy writes it."""
    return f"{device.type}:0"


def saved(kind: str, place: str, path: Path) -> Any:
    """An algorithm that is in a file, too."""
    algorithm = fitted(config(kind).create(place), dataset(kind))
    algorithm.save(path)
    return algorithm


@pytest.mark.parametrize("name", ["IQLConfig", "CQLConfig"])
def test_a_file_of_another_algorithm_is_refused(name: str, tmp_path: Path, place: str) -> None:
    theirs = getattr(d3rlpy.algos, name)().create(place)
    theirs.create_impl(VECTOR, ACTION)
    theirs.save(str(tmp_path / "theirs.d3"))
    with pytest.raises(CheckpointError, match=rf"theirs\.d3.*it holds a {name} of d3rlpy\.algos"):
        iql_d3rlpy.load(tmp_path / "theirs.d3", device=place)


@pytest.mark.parametrize("device", [None, False, "cpu", "cpu:0", torch.device("cpu")])
def test_a_device_is_given_in_every_form(device: Any, kind: str, tmp_path: Path) -> None:
    saved(kind, "cpu:0", tmp_path / "algorithm.d3")
    assert torch.device(iql_d3rlpy.load(tmp_path / "algorithm.d3", device).impl.device).type == "cpu"


def test_what_is_no_device_is_no_fault_of_the_file(tmp_path: Path, place: str) -> None:
    saved("continuous", place, tmp_path / "algorithm.d3")
    with pytest.raises(RuntimeError, match=r"3\.5"):
        iql_d3rlpy.load(tmp_path / "algorithm.d3", 3.5)


def test_a_flip_in_a_checksum_is_an_error(kind: str, tmp_path: Path, place: str) -> None:
    path = tmp_path / "algorithm.d3"
    saved(kind, place, path)
    content = path.read_bytes()
    document = pickle.loads(content)
    model = torch.load(io.BytesIO(document["torch"]), weights_only=True)
    for checksum in (model["checksum"], document["config"].__getnewargs__()[1]):
        assert content.count(checksum.encode()) == 1
        start = content.index(checksum.encode())
        for position in range(start, start + len(checksum)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(CheckpointError, match="its checksum is another one"):
                iql_d3rlpy.load(path, device=place)
            with pytest.raises(CheckpointError, match="its checksum is another one"):
                d3rlpy.load_learnable(str(path), device=place)


def test_another_number_in_the_configuration_or_a_weight_is_an_error(kind: str, tmp_path: Path, place: str) -> None:
    path = tmp_path / "algorithm.d3"
    weight = (
        next(iter(saved(kind, place, path).impl.agent.loss.value_network.parameters())).detach().cpu().numpy().tobytes()
    )
    content = path.read_bytes()
    for old, new in ((b'"expectile": 0.7', b'"expectile": 0.9'), (weight[:8], weight[8:16])):
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        for load in (iql_d3rlpy.load, d3rlpy.load_learnable):
            with pytest.raises(CheckpointError, match="its checksum is another one"):
                load(str(path), device=place)


def test_a_damaged_model_changes_nothing(kind: str, tmp_path: Path, place: str) -> None:
    algorithm = saved(kind, place, tmp_path / "algorithm.d3")
    algorithm.save_model(tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    state["training"]["learner"]["step_count"] += 1
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="the model is not as it was written"):
        algorithm.load_model(tmp_path / "model.pt")
    assert algorithm.grad_step == 4


def test_files_of_earlier_releases_load(kind: str, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "algorithm.d3"
    algorithm = saved(kind, place, path)
    document = pickle.loads(path.read_bytes())
    state = torch.load(io.BytesIO(document["torch"]), weights_only=True)
    del state["checksum"]
    model = io.BytesIO()
    torch.save(state, model)
    monkeypatch.delattr(Registered, "__getnewargs__")
    path.write_bytes(pickle.dumps(document | {"torch": model.getvalue()}))
    for load in (iql_d3rlpy.load, d3rlpy.load_learnable):
        loaded = load(str(path), device=place)
        assert loaded.config == algorithm.config
    assert_trains_on(algorithm, loaded, dataset(kind))


@pytest.mark.slow
def test_json_needs_the_import_that_a_file_does_by_itself(tmp_path: Path) -> None:
    """As the README says: JSON names the algorithm, and d3rlpy knows the names that were registered."""
    saved(CONTINUOUS, "cpu:0", tmp_path / "algorithm.d3")
    config_in_file = LearnableConfigWithShape.deserialize(
        pickle.loads((tmp_path / "algorithm.d3").read_bytes())["config"]
    )
    (tmp_path / "params.json").write_text(config_in_file.serialize())
    by_json = "d3rlpy.algos.DQN.from_json('params.json')"
    by_file = "d3rlpy.load_learnable('algorithm.d3')"
    for code, error in (
        (by_json, "KeyError: 'iql_plugins_"),
        (f"import iql_d3rlpy; {by_json}", None),
        (by_file, None),
        (f"{by_file}; {by_json}", None),
    ):
        command = [sys.executable, "-c", f"import d3rlpy; {code}"]
        finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (finished.returncode == 0) == (error is None), finished.stderr
        assert error is None or error in finished.stderr
