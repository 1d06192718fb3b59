"""A folder of hostile files, one of each kind that the command line reads: nothing that is in them is executed.

What a payload would do is to write a file, the canary. Every command reads every file; then the canary must not be
there. That a payload works at all is shown by a loader that is told to trust it. A round takes another protocol of
pickle: ``pytest tests/stress --stress 6`` takes all of them.
"""

import base64
import contextlib
import copy
import io
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
pytest.importorskip("torchrl")
pytest.importorskip("minari")
pytest.importorskip("d3rlpy")
pytest.importorskip("h5py")

import d3rlpy
import gymnasium
import h5py
from recorded import agent_for, minari_dataset, saved
from tensordict import NonTensorData, NonTensorStack, TensorDict

import iql_sb3
from iql_plugins.cli import main
from iql_plugins.data import load_dataset
from iql_sb3.files import MEMBER

ENV = "hostile_environments:Hostile-v0"
ROWS = 200
TINY = [
    *("--n-steps", "2", "--hidden-sizes", "8", "--episodes", "1", "--evaluation-episodes", "1"),
    *("--baseline", "none", "--device", "cpu", "--compile", "no"),
]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.canary)!r}, 'a').close()",)


class Hostile(NamedTuple):
    """A hostile file.

    Attributes:
        path: the file or folder.
        commands: that read it, by the exit status that they end with.
        trusted: reads it as somebody does who trusts it, which fires the canary.
    """

    path: Path
    commands: dict[int, list[list[str]]]
    trusted: Callable[[], object]


class Workshop(NamedTuple):
    """What hostile files are made from.

    Attributes:
        folder: where they go.
        canary: the file that payloads write.
        protocol: of pickle.
    """

    folder: Path
    canary: Path
    protocol: int

    @property
    def payload(self) -> bytes:
        """A pickle that writes the canary."""
        return pickle.dumps(Payload(self.canary), protocol=self.protocol)

    def torch_file(self, *, zipped: bool = True) -> bytes:
        """A file of ``torch.save`` that writes the canary."""
        file = io.BytesIO()
        # Protocols that torch's own archive does not have.
        torch.save(
            {"loss": Payload(self.canary)},
            file,
            pickle_protocol=max(self.protocol, 2),
            _use_new_zipfile_serialization=zipped,
        )
        return file.getvalue()


def policy_commands(path: Path, *more: str) -> list[list[str]]:
    folder = path.parent
    return [
        ["evaluate", str(path), "--env", "Pendulum-v1", "--episodes", "1", *more],
        ["export", str(path), "--format", "torch", "--output", str(folder / "exported.pt2"), *more],
        ["convert", str(path), str(folder / "converted.safetensors"), "--to", "tensor", *more],
    ]


def dataset_commands(path: Path) -> list[list[str]]:
    return [["inspect", str(path)], ["train", *TINY, "--dataset", str(path), "--run-dir", str(path.parent / "run")]]


def native(work: Workshop, adapter: str, suffix: str, env: str | None = None) -> Path:
    return saved(agent_for(env), adapter, work.folder / f"policy{suffix}")


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A zip with each of its members changed; None takes it out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)
    return path


def unpickled(path: Path) -> Callable[[], object]:
    return lambda: pickle.loads(path.read_bytes())


# Policies


def poisoned(work: Workshop) -> Callable[[str, bytes], bytes]:
    """Every cloudpickle in ``data``, and every ``.pth`` member, is a payload."""

    def change(name: str, content: bytes) -> bytes:
        if name == "data":
            data = json.loads(content)
            for value in data.values():
                if isinstance(value, dict) and ":serialized:" in value:
                    value[":serialized:"] = base64.b64encode(work.payload).decode()
            return json.dumps(data).encode()
        return work.torch_file() if name.endswith(".pth") else content

    return change


def zip_with_an_agent(work: Workshop) -> Hostile:
    path = rewritten(native(work, "sb3", ".zip"), poisoned(work))
    return Hostile(path, {0: policy_commands(path)}, lambda: iql_sb3.IQL.load(path))


def zip_with_pickles_alone(work: Workshop) -> Hostile:
    change = poisoned(work)
    path = rewritten(native(work, "sb3", ".zip"), lambda name, data: None if name == MEMBER else change(name, data))
    return Hostile(path, {2: policy_commands(path)}, lambda: main(policy_commands(path, "--trust-pickle")[0]))


def zip_with_an_agent_that_is_a_pickle(work: Workshop) -> Hostile:
    path = rewritten(native(work, "sb3", ".zip"), lambda name, data: work.payload if name == MEMBER else data)
    return Hostile(path, {2: policy_commands(path)}, lambda: pickle.loads(zipfile.ZipFile(path).read(MEMBER)))


def members_of_torch(work: Workshop) -> Hostile:
    path = rewritten(
        native(work, "sb3", ".zip"), lambda name, data: work.torch_file() if name.endswith(".pth") else data
    )

    def trusted() -> None:
        torch.load(io.BytesIO(zipfile.ZipFile(path).read("policy.pth")), weights_only=False)

    return Hostile(path, {0: policy_commands(path)}, trusted)


def d3(work: Workshop, change: Callable[[dict[str, Any]], object]) -> Path:
    path = native(work, "d3rlpy", ".d3")
    document = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(document), protocol=work.protocol))
    return path


def d3_payload(work: Workshop) -> Hostile:
    path = d3(work, lambda document: document | {"version": Payload(work.canary)})
    return Hostile(path, {2: policy_commands(path)}, lambda: d3rlpy.load_learnable(str(path)))


def d3_weights(work: Workshop) -> Hostile:
    path = d3(work, lambda document: document | {"torch": work.torch_file()})

    def trusted() -> None:
        torch.load(io.BytesIO(pickle.loads(path.read_bytes())["torch"]), weights_only=False)

    return Hostile(path, {2: policy_commands(path)}, trusted)


def pt(work: Workshop) -> Hostile:
    path = work.folder / "policy.pt"
    path.write_bytes(work.torch_file(zipped=work.protocol % 2 == 0))
    return Hostile(path, {2: policy_commands(path)}, lambda: torch.load(path, weights_only=False))


def pickle_as(suffix: str) -> Callable[[Workshop], Hostile]:
    def make(work: Workshop) -> Hostile:
        path = work.folder / f"file{suffix}"
        path.write_bytes(work.payload)
        commands = [command for command in policy_commands(path) if suffix not in (".npz", ".hdf5", ".h5", ".pkl")]
        for adapter in ("tensor", "sb3", "d3rlpy", "torchrl"):
            commands += policy_commands(path, "--from", adapter)[:1]
        return Hostile(path, {2: [*commands, *dataset_commands(path)]}, unpickled(path))

    return make


def policy_with_a_module(adapter: str, suffix: str) -> Callable[[Workshop], Hostile]:
    def make(work: Workshop) -> Hostile:
        path = native(work, adapter, suffix, ENV)
        _, export, convert = policy_commands(path)
        return Hostile(path, {2: [["evaluate", str(path)]], 0: [export, convert]}, lambda: gymnasium.make(ENV))

    return make


# Datasets


def arrays() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(ROWS, 3)).astype(np.float32),
        "actions": random.uniform(-2, 2, size=(ROWS, 1)).astype(np.float32),
        "rewards": random.normal(size=ROWS).astype(np.float32),
        "terminals": np.arange(ROWS) % 20 == 19,
        "timeouts": np.zeros(ROWS, bool),
    }


def npz(work: Workshop) -> Hostile:
    path = work.folder / "data.npz"
    columns = arrays()
    for name in ("observations", "rewards", "timeouts"):
        columns[name] = np.array([Payload(work.canary)] * ROWS, object)
    np.savez(path, **columns)
    commands = dataset_commands(path)
    mapped = [*commands[1], "--memmap-dir", str(work.folder / "mapped")]
    return Hostile(path, {2: [*commands, mapped]}, lambda: np.load(path, allow_pickle=True)["rewards"])


def pkl(work: Workshop) -> Hostile:
    path = work.folder / "buffer.pkl"
    path.write_bytes(work.payload)
    return Hostile(path, {2: dataset_commands(path)}, lambda: main(["inspect", str(path), "--trust-pickle"]))


def hdf5(work: Workshop) -> Hostile:
    path = work.folder / "data.hdf5"
    pickled = work.folder / "payload.pkl"
    pickled.write_bytes(work.payload)
    with h5py.File(path, "w") as file:
        for name, column in arrays().items():
            file[name] = column
        del file["rewards"], file["timeouts"], file["observations"]
        file.create_dataset("rewards", (ROWS,), h5py.vlen_dtype(np.uint8))[0] = np.frombuffer(work.payload, np.uint8)
        file["timeouts"] = np.full(ROWS, np.void(work.payload), object).astype(f"V{len(work.payload)}")
        file["observations"] = h5py.ExternalLink(str(pickled), "/")
        file.attrs["pickle"] = np.void(work.payload)

    def trusted() -> None:
        with h5py.File(path) as file:
            pickle.loads(file["rewards"][0].tobytes())

    return Hostile(path, {2: dataset_commands(path)}, trusted)


def parquet(work: Workshop) -> Hostile:
    """Arrow's types of users were pickles; releases before 21 load them if they are told to."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = work.folder / "data.parquet"
    columns = arrays()
    columns |= {key: pa.array(list(columns[key])) for key in ("observations", "actions")}
    table = pa.table(columns)
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": work.payload}
    number = table.schema.get_field_index("rewards")
    table = table.set_column(number, table.schema.field(number).with_metadata(extension), table.column(number))
    pq.write_table(table.replace_schema_metadata({"pandas": work.payload}), path)

    def trusted() -> None:
        pickle.loads(pq.read_schema(path).metadata[b"pandas"])

    return Hostile(path, {0: dataset_commands(path)[:1]}, trusted)


def tensordict_folder(work: Workshop, entry: Any) -> Hostile:
    path = work.folder / "tensordict"
    dataset = load_dataset("pendulum-v1-sac")[:ROWS]
    dataset["hostile"] = entry
    dataset.memmap(path)
    return Hostile(path, {2: dataset_commands(path)}, lambda: TensorDict.load_memmap(path, allow_pickle=True))


def non_tensor_data(work: Workshop) -> Hostile:
    return tensordict_folder(work, NonTensorData(Payload(work.canary), batch_size=[ROWS]))


def non_tensor_stack(work: Workshop) -> Hostile:
    return tensordict_folder(work, NonTensorStack(*[NonTensorData(Payload(work.canary)) for _ in range(ROWS)]))


def minari_with_a_module(work: Workshop) -> Hostile:
    path = minari_dataset(work.folder / "walk", {"id": ENV, "entry_point": "hostile_environments:Environment"})
    inspect, train = dataset_commands(path)
    return Hostile(path, {0: [inspect], 2: [train]}, lambda: gymnasium.make(ENV))


def minari_without_spaces(work: Workshop) -> Hostile:
    import minari

    path = minari_dataset(work.folder / "walk", {"entry_point": "hostile_environments:Environment"})
    file = path / "data" / "metadata.json"
    document = json.loads(file.read_text())
    del document["action_space"]
    file.write_text(json.dumps(document))
    return Hostile(path, {2: dataset_commands(path)}, lambda: minari.MinariDataset(path / "data"))


# Runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run, which is over."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *TINY, "--run-dir", str(folder)]) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_directory(work: Workshop, files: dict[str, bytes], **settings: Any) -> Path:
    folder = work.folder / "run"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    document = json.loads(files["config.json"])
    document["settings"] |= settings
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def going_on(folder: Path) -> list[list[str]]:
    again = str(folder.parent / "again")
    return [["train", "--resume", str(folder)], ["train", "--config", str(folder), "--run-dir", again]]


def run_with_a_module(work: Workshop, files: dict[str, bytes]) -> Hostile:
    folder = run_directory(work, files, env=ENV)
    return Hostile(folder, {2: going_on(folder)}, lambda: gymnasium.make(ENV))


def run_of_a_pickle(work: Workshop, files: dict[str, bytes]) -> Hostile:
    pickled = work.folder / "buffer.pkl"
    pickled.write_bytes(work.payload)
    folder = run_directory(work, files, dataset=str(pickled))
    resume = going_on(folder)
    return Hostile(folder, {2: resume}, lambda: main([*resume[0], "--trust-pickle"]))


def run_of_a_mapped_pickle(work: Workshop, files: dict[str, bytes]) -> Hostile:
    mapped = non_tensor_data(work)
    folder = run_directory(work, files, memmap_dir=str(mapped.path))
    return Hostile(folder, {2: going_on(folder)}, mapped.trusted)


def run_of_an_adapter(work: Workshop, files: dict[str, bytes]) -> Hostile:
    folder = run_directory(work, files, adapter="hostile_environments")
    return Hostile(folder, {2: going_on(folder)}, lambda: __import__("hostile_environments"))


def run_of_pickles(work: Workshop, files: dict[str, bytes]) -> Hostile:
    names = ("checkpoint.safetensors", "policy.safetensors", "policy_best.safetensors")
    folder = run_directory(work, files | dict.fromkeys(names, work.payload))
    commands = [going_on(folder)[0], *policy_commands(folder)]
    return Hostile(folder, {2: commands}, unpickled(folder / "checkpoint.safetensors"))


FILES: dict[str, Callable[[Workshop], Hostile]] = {
    "zip with an agent": zip_with_an_agent,
    "zip with pickles alone": zip_with_pickles_alone,
    "zip with an agent that is a pickle": zip_with_an_agent_that_is_a_pickle,
    "zip with .pth members": members_of_torch,
    "d3": d3_payload,
    "d3 with weights": d3_weights,
    "pt": pt,
    **{f"pickle as {suffix}": pickle_as(suffix) for suffix in (".zip", ".d3", ".pt", ".safetensors", ".npz", ".h5")},
    "safetensors with a module": policy_with_a_module("tensor", ".safetensors"),
    "zip with a module": policy_with_a_module("sb3", ".zip"),
    "d3 with a module": policy_with_a_module("d3rlpy", ".d3"),
    "pt with a module": policy_with_a_module("torchrl", ".pt"),
    "npz": npz,
    "pkl": pkl,
    "hdf5": hdf5,
    "parquet": parquet,
    "TensorDict's data": non_tensor_data,
    "TensorDict's stack": non_tensor_stack,
    "Minari with a module": minari_with_a_module,
    "Minari without spaces": minari_without_spaces,
}
RUNS: dict[str, Callable[[Workshop, dict[str, bytes]], Hostile]] = {
    "run with a module": run_with_a_module,
    "run of a pickle": run_of_a_pickle,
    "run of a mapped pickle": run_of_a_mapped_pickle,
    "run of an adapter": run_of_an_adapter,
    "run of pickles": run_of_pickles,
}


@pytest.fixture(autouse=True)
def device() -> None:
    """The CPU alone, where files are read to."""


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that payloads write, and that the module of :data:`ENV` writes when it is imported."""
    path = tmp_path / "canary"
    module = tmp_path / "modules" / "hostile_environments.py"
    module.parent.mkdir()
    module.write_text(f"open({str(path)!r}, 'a').close()\n")
    monkeypatch.syspath_prepend(module.parent)
    monkeypatch.delitem(sys.modules, "hostile_environments", raising=False)
    monkeypatch.chdir(tmp_path)
    return path


@pytest.mark.parametrize("kind", [*FILES, *RUNS])
def test_nothing_that_is_in_a_hostile_file_is_executed(
    kind: str,
    canary: Path,
    stress: int,
    trained: dict[str, bytes],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for number in range(stress):
        folder = tmp_path / str(number)
        folder.mkdir()
        work = Workshop(folder, canary, (pickle.HIGHEST_PROTOCOL - number) % (pickle.HIGHEST_PROTOCOL + 1))
        hostile = FILES[kind](work) if kind in FILES else RUNS[kind](work, copy.deepcopy(trained))
        for status, commands in hostile.commands.items():
            for command in commands:
                capfd.readouterr()
                ended = main(command)
                error = capfd.readouterr().err
                assert not canary.exists(), f"{command} executed what is in {kind}"
                assert ended == status, (command, error)
                assert "Traceback" not in error
                if status:
                    # Notes of what is done may precede it.
                    *notes, line = error.splitlines()
                    assert line.startswith("iql-plugins: "), error
                    assert not any(note.startswith("iql-plugins: ") for note in notes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # What a payload leaves behind is nothing that a loader can go on with.
            with contextlib.suppress(Exception):
                hostile.trusted()
        assert canary.exists(), "the payload does nothing"
        canary.unlink()
        sys.modules.pop("hostile_environments", None)
