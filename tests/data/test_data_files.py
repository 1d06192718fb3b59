"""Datasets in files: .npz, D4RL's and d3rlpy's HDF5, and what is wrong with broken ones."""

import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import error
from requirements import data_of_others, needs_proc
from tensordict import TensorDict
from tensordict.memmap import MemoryMappedTensor

from iql_plugins.data import DatasetError, UnknownSourceError, dataset, load_dataset
from iql_plugins.data.arrays import Concatenated
from iql_plugins.data.readers import shipped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    h5py = pytest.importorskip("h5py")


Arrays = dict[str, Any]


def columns(lengths: tuple[int, ...] = (3, 2, 2), ends: str = "TcT", *, following: bool = True) -> Arrays:
    """Episodes of these lengths that end terminated (T), cut (c) or not at all (-); observations count steps."""
    rows = sum(lengths)
    observations = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    arrays = {
        "observations": observations,
        "actions": np.linspace(-1, 1, rows, dtype=np.float32).reshape(rows, 1).repeat(2, 1),
        "rewards": np.arange(rows, dtype=np.float32),
        "terminals": np.zeros(rows, np.float32),
        "timeouts": np.zeros(rows, np.float32),
    }
    for end, kind in zip(np.cumsum(lengths) - 1, ends, strict=True):
        arrays["terminals"][end] = kind == "T"
        arrays["timeouts"][end] = kind == "c"
    if following:
        arrays["next_observations"] = observations + 2
    return arrays


def write_npz(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


def write_hdf5(path: Path, arrays: Arrays) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


WRITERS = {"d.npz": write_npz, "d.hdf5": write_hdf5}


@pytest.fixture(params=list(WRITERS))
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Arrays], Path]:
    return lambda arrays: WRITERS[request.param](tmp_path / request.param, arrays)


def flags(data: TensorDict, key: str) -> list[int]:
    return data["next", key].squeeze(-1).int().tolist()


def test_the_key_layout_of_a_file(write: Callable[[Arrays], Path]) -> None:
    arrays = columns()
    data = load_dataset(write(arrays))
    assert data.batch_size == (7,)
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in data.items(True, True)} == {
        "observation": (torch.float32, (7, 2)),
        "action": (torch.float32, (7, 2)),
        ("next", "observation"): (torch.float32, (7, 2)),
        ("next", "reward"): (torch.float32, (7, 1)),
        ("next", "done"): (torch.bool, (7, 1)),
        ("next", "terminated"): (torch.bool, (7, 1)),
    }
    assert data["next", "observation"].tolist() == arrays["next_observations"].tolist()
    assert data["next", "reward"].squeeze(-1).tolist() == arrays["rewards"].tolist()


def test_a_timeout_is_done_and_no_terminal(write: Callable[[Arrays], Path]) -> None:
    data = load_dataset(write(columns()))
    assert flags(data, "done") == [0, 0, 1, 0, 1, 0, 1]
    assert flags(data, "terminated") == [0, 0, 1, 0, 0, 0, 1]


def test_a_step_that_is_both_is_terminal(write: Callable[[Arrays], Path]) -> None:
    arrays = columns()
    arrays["timeouts"][2] = 1
    assert flags(load_dataset(write(arrays)), "terminated") == [0, 0, 1, 0, 0, 0, 1]


def test_timeouts_may_be_missing(write: Callable[[Arrays], Path]) -> None:
    arrays = columns()
    del arrays["timeouts"]
    assert flags(load_dataset(write(arrays)), "done") == [0, 0, 1, 0, 0, 0, 1]


def test_without_final_observations_the_last_step_of_a_cut_episode_is_left_out(
    write: Callable[[Arrays], Path],
) -> None:
    data = load_dataset(write(columns((3, 3, 2, 2), "TcT-", following=False)))
    # Rows 5 and 9 are gone. Row 4, before a cut, now ends its episode; row 8 ends none, as far as anybody knows.
    assert data["observation"][:, 0].tolist() == [0, 2, 4, 6, 8, 12, 14, 16]
    assert flags(data, "done") == [0, 0, 1, 0, 1, 0, 1, 0]
    assert flags(data, "terminated") == [0, 0, 1, 0, 0, 0, 1, 0]
    after = data["next", "observation"][:, 0]
    assert after[[0, 1, 3, 4, 5, 7]].tolist() == [2, 4, 8, 10, 14, 18]
    assert after[[2, 6]].tolist() == [4, 14], "a terminal step keeps its own observation, not the next episode's"


def test_nothing_is_left_of_cut_episodes_of_one_step(write: Callable[[Arrays], Path]) -> None:
    assert "no transition left" in error(write(columns((1, 1), "cc", following=False)))


def test_dict_observations(write: Callable[[Arrays], Path]) -> None:
    arrays = columns()
    plain, after = arrays.pop("observations"), arrays.pop("next_observations")
    arrays |= {"observations/position": plain, "observations/camera": np.zeros((7, 4, 4, 3), np.uint8)}
    arrays |= {"next_observations/position": after, "next_observations/camera": np.ones((7, 4, 4, 3), np.uint8)}
    data = load_dataset(write(arrays))
    assert data["observation", "position"].tolist() == plain.tolist()
    assert data["next", "observation", "position"].tolist() == after.tolist()
    assert data["next", "observation", "camera"].dtype == torch.uint8
    del arrays["next_observations/camera"]
    assert "'camera'" in error(write(arrays))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([0, 1, 1, 0, 2, 0, 1], np.float32), [[0], [1], [1], [0], [2], [0], [1]]),
        (np.array([[0], [1], [1], [0], [2], [0], [1]], np.float64), [[0], [1], [1], [0], [2], [0], [1]]),
        (np.array([0, 1, 1, 0, 2, 0, 1], np.uint8), [[0], [1], [1], [0], [2], [0], [1]]),
        (np.eye(3, dtype=np.int32)[[0, 1, 1, 0, 2, 0, 1]], [[0], [1], [1], [0], [2], [0], [1]]),
    ],
    ids=["floats", "float-column", "integers", "one-hot"],
)
def test_discrete_actions_are_indices(given: Any, expected: list[list[int]], write: Callable[[Arrays], Path]) -> None:
    data = load_dataset(write(columns() | {"actions": given}))
    assert data["action"].dtype == torch.int64
    assert data["action"].tolist() == expected


@pytest.mark.parametrize("value", [0.5, -1.0, 5000.0])
def test_a_column_of_other_floats_is_continuous(value: float, write: Callable[[Arrays], Path]) -> None:
    actions = np.array([0, 1, 1, 0, value, 0, 1], np.float32)
    data = load_dataset(write(columns() | {"actions": actions}))
    assert data["action"].dtype == torch.float32
    assert data["action"].shape == (7, 1)


def test_the_caller_knows_better_what_is_discrete(write: Callable[[Arrays], Path]) -> None:
    path = write(columns() | {"actions": np.array([0, 1, 1, 0, 1, 0, 1], np.float32)})
    assert load_dataset(path, discrete=False)["action"].dtype == torch.float32
    assert "whole numbers, got 0.5" in error(write(columns() | {"actions": np.full(7, 0.5)}), discrete=True)


def test_discrete_observations_are_indices(write: Callable[[Arrays], Path]) -> None:
    index = np.arange(7, dtype=np.int32)
    data = load_dataset(write(columns() | {"observations": index, "next_observations": index + 1}))
    assert data["observation"].dtype == torch.int64
    assert data["next", "observation"].squeeze(-1).tolist() == list(range(1, 8))


def test_other_numbers_become_float32(write: Callable[[Arrays], Path]) -> None:
    arrays = columns()
    arrays["observations"] = arrays["observations"].astype(">f8")
    arrays["next_observations"] = arrays["next_observations"].astype(np.int16)
    arrays["rewards"] = arrays["rewards"].astype(np.int64)[:, None]
    arrays["terminals"] = arrays["terminals"].astype(bool)[:, None]
    data = load_dataset(write(arrays))
    assert data["observation"].dtype == data["next", "observation"].dtype == torch.float32
    assert data["next", "reward"].dtype == torch.float32
    assert data["observation"][1].tolist() == [2.0, 3.0]


BROKEN: dict[str, tuple[Callable[[Arrays], Any], list[str]]] = {
    "missing": (lambda a: a.pop("rewards"), ["'rewards'"]),
    "no observations": (lambda a: a.pop("observations"), ["'observations'"]),
    "lengths": (lambda a: a.update(actions=a["actions"][:-1]), ["'actions'", "6 rows"]),
    "empty": (lambda a: a.update({key: array[:0] for key, array in a.items()}), ["empty"]),
    "scalar": (lambda a: a.update(rewards=np.float32(1)), ["'rewards'", "a row for each"]),
    "wide rewards": (lambda a: a.update(rewards=np.zeros((7, 2))), ["rewards", "[7, 2]"]),
    "deep actions": (lambda a: a.update(actions=np.zeros((7, 2, 2))), ["actions", "[7, 2, 2]"]),
    "no actions": (lambda a: a.update(actions=np.zeros((7, 0))), ["actions", "[7, 0]"]),
    "no features": (lambda a: a.update(observations=np.zeros((7, 0))), ["'observation'", "[7, 0]"]),
    "multi-discrete": (lambda a: a.update(actions=np.full((7, 2), 3)), ["discrete actions", "[7, 2]"]),
    "negative": (lambda a: a.update(actions=np.arange(7) - 2), ["'action'", ">= 0", "row 0"]),
    "flag": (lambda a: a["terminals"].__setitem__(4, 0.5), ["'terminals'", "0.5", "row 4"]),
    "nan flag": (lambda a: a["timeouts"].__setitem__(3, np.nan), ["'timeouts'", "nan", "row 3"]),
    "text": (lambda a: a.update(rewards=np.array([b"x"] * 7)), ["'rewards'", "numbers"]),
    "complex": (lambda a: a.update(actions=np.zeros(7, complex)), ["'actions'", "numbers"]),
    "next shape": (lambda a: a.update(next_observations=np.zeros((7, 3))), ["('next', 'observation')", "[7, 3]"]),
    "next dtype": (lambda a: a.update(next_observations=np.zeros((7, 2), np.uint8)), ["uint8"]),
    "nan": (lambda a: a["observations"].__setitem__((5, 1), np.nan), ["'observation'", "row 5", "1 rows"]),
    "inf": (lambda a: a["rewards"].__setitem__(slice(2, 4), np.inf), ["'reward'", "row 2", "2 rows"]),
    "overflow": (lambda a: a.update(actions=np.full((7, 1), 1e300)), ["'action'", "row 0"]),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_column_is_one_clear_error(case: str, write: Callable[[Arrays], Path]) -> None:
    arrays = columns()
    breaks, expected = BROKEN[case]
    breaks(arrays)
    path = write(arrays)
    message = error(path)
    assert str(path) in message
    for text in expected:
        assert text in message


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    whole = write_npz(tmp_path / "whole.npz", columns()).read_bytes()
    for name, content in {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2]}.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        assert str(path) in error(path)
        path = path.with_suffix(".h5")
        path.write_bytes(content)
        assert str(path) in error(path)
    assert "there is no file" in error(tmp_path / "none.npz")
    assert "there is no file" in error(str(tmp_path / "none.hdf5"))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_pickle_in_an_archive_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    arrays = columns()
    arrays["observations"] = np.array([Bomb()] * 7, object)
    np.savez(path, **arrays)
    for options in ({}, {"memmap_dir": tmp_path / "m"}, {"trust_pickle": True}):
        message = error(path, **options)
        assert "'observations'" in message
        assert "pickle" in message
    assert not (tmp_path / "m").exists()
    path.write_bytes(pickle.dumps(Bomb()))
    assert "no .npz archive" in error(path)


def test_an_array_that_claims_to_be_larger_than_memory(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**50, 3)})
    path = write_npz(tmp_path / "d.npz", {k: v for k, v in columns().items() if k != "observations"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("observations.npy", header.getvalue())
    assert "'observations'" in error(path)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        for key, array in columns().items():
            file.create_dataset(key, shape=(2**50, *array.shape[1:]), dtype="f4", chunks=(1024, *array.shape[1:]))
    assert "more than the" in error(tmp_path / "d.h5")
    assert "more than the" in error(tmp_path / "d.h5", memmap_dir=tmp_path / "m")


def test_hdf5_links_and_data_elsewhere_are_refused(tmp_path: Path) -> None:
    other = write_hdf5(tmp_path / "other.h5", columns())
    for link in (h5py.ExternalLink(str(other), "/observations"), h5py.SoftLink("/nowhere")):
        path = write_hdf5(tmp_path / "d.h5", {k: v for k, v in columns().items() if k != "observations"})
        with h5py.File(path, "a") as file:
            file["observations"] = link
        assert "'observations' is a link" in error(path)
    raw = tmp_path / "raw"
    columns()["observations"].tofile(raw)
    path = write_hdf5(tmp_path / "e.h5", {k: v for k, v in columns().items() if k != "observations"})
    with h5py.File(path, "a") as file:
        file.create_dataset("observations", (7, 2), "f4", external=[(str(raw), 0, 56)])
    assert "data in another file" in error(path)


def test_hdf5_groups_where_datasets_belong(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "d.h5", {k: v for k, v in columns().items() if k != "actions"})
    with h5py.File(path, "a") as file:
        file.create_group("actions")
    assert "'actions'" in error(path)
    with h5py.File(path, "a") as file:
        file["actions/left"] = np.zeros(7)
    assert "'actions'" in error(path)


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.parametrize("following", [True, False])
def test_a_dataset_larger_than_memory_stays_memory_mapped(
    name: str, following: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[name](tmp_path / name, columns((3, 3, 2, 2), "TcT-", following=following))
    expected = load_dataset(path)
    # Three rows at a time.
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 100)
    mapped = load_dataset(path, memmap_dir=tmp_path / "new" / "mapped")
    assert all(isinstance(tensor, MemoryMappedTensor) for tensor in mapped.values(True, True))
    assert (mapped == expected).all()
    again = load_dataset(tmp_path / "new" / "mapped")
    assert (again == expected).all()
    assert sorted(os.listdir(tmp_path / "new")) == ["mapped"]
    assert sorted(os.listdir(tmp_path)) == sorted([name, "new"])
    assert "new or an empty folder" in error(path, memmap_dir=tmp_path / "new" / "mapped")


def test_a_dataset_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    arrays = columns()
    arrays["rewards"][3] = np.nan
    path = write_npz(tmp_path / "d.npz", arrays)
    assert "row 3" in error(path, memmap_dir=tmp_path / "mapped")
    assert os.listdir(tmp_path) == ["d.npz"]


def test_memory_is_looked_at_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_npz(tmp_path / "d.npz", columns())
    monkeypatch.setattr(os, "sysconf", lambda name: 11)
    assert "pass memmap_dir" in error(path)
    assert len(load_dataset(path, memmap_dir=tmp_path / "mapped")) == 7


@needs_proc
def test_loading_takes_no_more_memory_than_a_chunk(tmp_path: Path) -> None:
    """The peak of a process that maps 400 MB stays far below that."""
    path = tmp_path / "d.h5"
    rows = 500_000
    with h5py.File(path, "w") as file:
        for key in ("observations", "next_observations"):
            file.create_dataset(key, (rows, 100), "f4", chunks=(5000, 100), fillvalue=0.5)
        file.create_dataset("actions", (rows, 2), "f4", fillvalue=0.5)
        for key in ("rewards", "terminals"):
            file.create_dataset(key, (rows,), "f4", fillvalue=0)
    # Pages of a mapped file count as resident, but for those that are the process's own.
    program = f"""
from iql_plugins.data import load_dataset
own = lambda: int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
import h5py, threading, time
before, peak, stop = own(), 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, own())
        time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
data = load_dataset({str(path)!r}, memmap_dir={str(tmp_path / "m")!r})
stop.set(); thread.join()
print(len(data), peak - before)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    length, megabytes = finished.stdout.split()
    assert int(length) == rows
    assert float(megabytes) < 300


def test_importing_and_loading_an_npz_imports_no_framework() -> None:
    program = (
        "import sys; from iql_plugins.data import load_dataset; load_dataset('pendulum-v1-sac'); "
        "print({'h5py', 'minari', 'd3rlpy', 'stable_baselines3', 'torchrl', 'gymnasium'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


def test_the_datasets_that_ship() -> None:
    for name in shipped.NAMES:
        data = load_dataset(name)
        assert len(data) == 20_000
    assert "did you mean 'pendulum-v1-sac'" in error("pendulum-v1-sca")


def test_other_sources_are_not_ours(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for source in (tmp_path, tmp_path / "notes.txt", "nothing", 3, None, [], {"observations": 1}):
        with pytest.raises(UnknownSourceError):
            load_dataset(source)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_hdf5(tmp_path / "d.h5", columns())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'iql-plugins\[cli\]'"):
        load_dataset(path)


def test_loading_ignores_the_default_device(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "d.npz", columns(following=False))
    expected = load_dataset(path)
    with torch.device("meta"):
        data = load_dataset(path)
        mapped = load_dataset(path, memmap_dir=tmp_path / "m")
        again = load_dataset(data)
    assert all((other == expected).all() for other in (data, mapped, again))


def test_a_column_of_parts_reads_as_their_concatenation() -> None:
    parts = [np.arange(n * 2, dtype=np.float32).reshape(n, 2) + 100 * n for n in (1, 4, 2)]
    joined, whole = Concatenated(parts, "d", "k"), np.concatenate(parts)
    assert joined.shape == whole.shape
    for start in range(8):
        for stop in range(start, 8):
            assert joined[start:stop].tolist() == whole[start:stop].tolist()
    with pytest.raises(DatasetError, match="'k' is float64"):
        Concatenated([parts[0], parts[1].astype(np.float64)], "d", "k")


# d3rlpy's own file format, and the older one


def write_d3rlpy(path: Path, episodes: list[dict[str, Any]]) -> Path:
    with h5py.File(path, "w") as file:
        file["columns"] = list(episodes[0])
        file["num_episodes"] = len(episodes)
        for number, episode in enumerate(episodes):
            for key, value in episode.items():
                if isinstance(value, list):
                    for index, part in enumerate(value):
                        file[f"{key}_{number}_{index}"] = part
                else:
                    file[f"{key}_{number}"] = value
        file["version"] = "2.1"
    return path


def episode(length: int, terminated: bool, start: float = 0.0) -> dict[str, Any]:
    return {
        "observations": np.arange(start, start + 2 * length, dtype=np.float32).reshape(length, 2),
        "actions": np.linspace(0.1, 0.9, length, dtype=np.float32)[:, None],
        "rewards": np.arange(length, dtype=np.float32)[:, None],
        "terminated": terminated,
    }


def test_a_cut_episode_of_d3rlpy_has_one_transition_less(tmp_path: Path) -> None:
    path = write_d3rlpy(tmp_path / "d.h5", [episode(4, False), episode(3, True, 100), episode(5, False, 200)])
    data = load_dataset(path)
    assert flags(data, "done") == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert flags(data, "terminated") == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert data["next", "observation"][:, 0].tolist() == [2, 4, 6, 102, 104, 104, 202, 204, 206, 208]
    assert data["next", "reward"][:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    mapped = load_dataset(path, memmap_dir=tmp_path / "m")
    assert (mapped == data).all()


def test_tuple_observations_of_d3rlpy_are_entries(tmp_path: Path) -> None:
    one = episode(3, True)
    one["observations"] = [one["observations"], np.zeros((3, 1, 8, 8), np.uint8)]
    data = load_dataset(write_d3rlpy(tmp_path / "d.h5", [one, one]))
    assert data["observation", "0"].shape == (6, 2)
    assert data["next", "observation", "1"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda file: file.__delitem__("actions_1"), "'actions_1'"),
        (lambda file: file.__delitem__("observations_0"), "'observations_0'"),
        (lambda file: file.__delitem__("terminated_1"), "'terminated_1'"),
        (lambda file: file["num_episodes"].write_direct(np.array(10**9)), "'observations_2'"),
        (lambda file: file["num_episodes"].write_direct(np.array(0)), "empty"),
    ],
    ids=["actions", "observations", "terminated", "number", "none"],
)
def test_a_broken_file_of_d3rlpy(change: Callable[[Any], None], text: str, tmp_path: Path) -> None:
    path = write_d3rlpy(tmp_path / "d.h5", [episode(4, False), episode(3, True)])
    with h5py.File(path, "a") as file:
        change(file)
    assert text in error(path)


def test_episodes_of_d3rlpy_that_do_not_fit_together(tmp_path: Path) -> None:
    short, other = episode(4, True), episode(4, True)
    short["actions"] = short["actions"][:3]
    assert "as long in episode 1" in error(write_d3rlpy(tmp_path / "a.h5", [episode(3, True), short]))
    other["observations"] = np.zeros((4, 3), np.float32)
    assert "in episode 1" in error(write_d3rlpy(tmp_path / "b.h5", [episode(3, True), other]))


def test_a_file_of_d3rlpy_1(tmp_path: Path) -> None:
    arrays = columns(following=False)
    arrays["episode_terminals"] = np.maximum(arrays["terminals"], arrays.pop("timeouts"))
    data = load_dataset(write_hdf5(tmp_path / "d.h5", arrays))
    assert flags(data, "done") == [0, 0, 1, 1, 0, 1]
    assert flags(data, "terminated") == [0, 0, 1, 0, 0, 1]


# Real data


@pytest.mark.parametrize(
    ("name", "rows", "ends", "terminals", "discrete"),
    [
        ("reagent_pendulum_mixed", 22_000, 110, 0, False),
        ("reagent_cartpole_mixed", 1_456, 50, 49, True),
        ("tianshou_cartpole_qrdqn", 20_000, 157, 59, True),
        ("d4rl_regen_door-human-v1", 6_729, 25, 0, False),
    ],
)
def test_real_datasets(name: str, rows: int, ends: int, terminals: int, discrete: bool) -> None:
    data = load_dataset(data_of_others(name))
    assert len(data) == rows
    assert int(data["next", "done"].sum()) == ends
    assert int(data["next", "terminated"].sum()) == terminals
    assert (data["action"].dtype == torch.int64) == discrete
    if name == "reagent_cartpole_mixed":
        assert data["next", "done"][-1]
        assert not data["next", "terminated"][-1], "the last episode is a time-out"
