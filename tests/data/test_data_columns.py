"""Every column of every reader is read, known to be metadata, or refused with the name that was probably meant."""

import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import error
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDict

from iql_plugins.data import Dataset, DatasetError, load_dataset, read_dataset
from iql_plugins.data.columns import METADATA, SYNONYMS, TORCHRL_METADATA

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    h5py = pytest.importorskip("h5py")

Arrays = dict[str, Any]

# Of five steps the second ends in a terminal state, the fourth is cut.
TERMINALS, TIMEOUTS, DONES, MASKS = ([0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 1, 0, 1, 0], [1, 0, 1, 1, 1])


def arrays(**ends: Any) -> Arrays:
    """Columns whose next observations are not the following row's."""
    observations = np.arange(10, dtype=np.float32).reshape(5, 2)
    return {
        "observations": observations,
        "next_observations": observations + 100,
        "actions": np.full((5, 2), 0.5, np.float32),
        "rewards": np.arange(5, dtype=np.float32),
        **{key: np.array(flags, np.float32) for key, flags in ends.items()},
    }


def renamed(columns: Arrays, old: str, new: str) -> Arrays:
    return {new if key == old else key: array for key, array in columns.items()}


def written(path: Path, columns: Arrays) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **columns)
    else:
        with h5py.File(path, "w") as file:
            for key, column in columns.items():
                file[key] = column
    return path


@pytest.fixture(params=[".npz", ".hdf5"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Arrays], Path]:
    return lambda columns: written(tmp_path / f"d{request.param}", columns)


def flags(data: TensorDict, key: str) -> list[int]:
    return data["next", key].squeeze(-1).int().tolist()


# Files of transitions: .npz, and HDF5 in D4RL's style


@pytest.mark.parametrize(("column", "synonym"), [(c, s) for c, synonyms in SYNONYMS.items() for s in synonyms])
def test_a_synonym_is_read_as_the_column(column: str, synonym: str, write: Callable[[Arrays], Path]) -> None:
    ends = (
        {"timeouts": TIMEOUTS, "dones": DONES} if column == "dones" else {"terminals": TERMINALS, "timeouts": TIMEOUTS}
    )
    expected = load_dataset(write(arrays(**ends)))
    data = load_dataset(write(renamed(arrays(**ends), column, synonym)))
    assert (data == expected).all()
    assert flags(data, "done") == DONES
    assert flags(data, "terminated") == TERMINALS
    assert data["next", "observation"][:, 0].tolist() == [100, 102, 104, 106, 108]


@pytest.mark.parametrize(
    "ends",
    [
        {"terminals": TERMINALS, "timeouts": TIMEOUTS},
        {"terminations": TERMINALS, "truncations": TIMEOUTS},
        {"terminated": TERMINALS, "truncated": TIMEOUTS, "done": DONES},
        {"terminals": TERMINALS, "episode_terminals": DONES},
        {"terminals": TERMINALS, "dones": DONES},
        {"timeouts": TIMEOUTS, "dones": DONES},
        {"truncations": TIMEOUTS, "dones": DONES},
        {"masks": MASKS, "timeouts": TIMEOUTS},
        {"masks": MASKS, "dones_float": DONES},
        {"masks": MASKS, "timeouts": TIMEOUTS, "dones": DONES},
        {"masks": MASKS, "terminals": TERMINALS, "timeouts": TIMEOUTS},
        {"masks": MASKS, "terminals": TERMINALS, "dones": DONES},
        # OGBench's terminals are the last steps of trajectories; a task may be solved before, or there.
        {"masks": MASKS, "terminals": [0, 0, 0, 1, 0]},
        {"masks": MASKS, "terminals": [0, 1, 0, 1, 0]},
    ],
    ids=lambda ends: "+".join(ends),
)
def test_ends_are_read_for_what_they_mean(ends: Arrays, write: Callable[[Arrays], Path], tmp_path: Path) -> None:
    path = write(arrays(**ends))
    for data in (load_dataset(path), load_dataset(path, memmap_dir=tmp_path / "mapped")):
        assert flags(data, "done") == [0, 1, 0, 1, 0]
        assert flags(data, "terminated") == [0, 1, 0, 0, 0]
    loaded = read_dataset(path)
    assert loaded.both == 0, "no step is called a terminal state and a time-out"


def test_masks_alone_are_terminal_states(write: Callable[[Arrays], Path]) -> None:
    data = load_dataset(write(arrays(masks=MASKS)))
    assert flags(data, "done") == flags(data, "terminated") == [0, 1, 0, 0, 0]
    data = load_dataset(write(arrays(masks=MASKS, terminations=TERMINALS)))
    assert flags(data, "done") == flags(data, "terminated") == [0, 1, 0, 0, 0]


def test_trajectories_of_ogbench_without_next_observations(write: Callable[[Arrays], Path]) -> None:
    columns = arrays(masks=MASKS, terminals=[0, 0, 0, 1, 0])
    del columns["next_observations"]
    data = load_dataset(write(columns))
    # The last steps of the trajectory that was cut, and of the one that is under way, have no next observation.
    assert data["observation"][:, 0].tolist() == [0, 2, 4]
    assert data["next", "observation"][:, 0].tolist() == [2, 2, 6]
    assert flags(data, "done") == [0, 1, 1]
    assert flags(data, "terminated") == [0, 1, 0]


def test_masks_that_make_time_outs_of_all_terminals_are_refused(write: Callable[[Arrays], Path]) -> None:
    """D4RL's terminals with a column of ones beside them would lose every terminal state without a word."""
    with pytest.raises(DatasetError, match="'terminals', 2 of them, would be no terminal states: drop 'masks' if"):
        load_dataset(write(arrays(masks=[1] * 5, terminals=[0, 1, 0, 1, 0])))
    data = load_dataset(write(arrays(masks=[1] * 5, timeouts=[0, 1, 0, 1, 0])))
    assert flags(data, "done") == [0, 1, 0, 1, 0]
    assert flags(data, "terminated") == [0] * 5
    assert flags(load_dataset(write(arrays(masks=[1] * 5, terminals=[0] * 5))), "terminated") == [0] * 5


def of_ogbench(compact: bool = False, **more: Any) -> Arrays:
    """What its loader returns of two trajectories of four states."""
    observations = np.arange(8, dtype=np.float32).reshape(8, 1)
    ends = np.array([0, 0, 1, 1] * 2 if compact else [0, 0, 0, 1] * 2)
    columns = {"observations": observations, "actions": np.full((8, 2), 0.5), "rewards": np.zeros(8), "terminals": ends}
    return columns | ({"valids": np.array([1, 1, 1, 0] * 2)} if compact else {}) | more


def test_a_compact_file_of_ogbench_keeps_final_observations_and_bootstraps_from_them(
    write: Callable[[Arrays], Path], tmp_path: Path
) -> None:
    # The first trajectory meets a terminal state in its second row; the second one's final state is one.
    path = write(of_ogbench(compact=True, masks=[1, 0, 1, 1, 1, 1, 1, 0]))
    for data in (load_dataset(path), load_dataset(path, memmap_dir=tmp_path / "mapped")):
        assert data["observation"].squeeze(-1).tolist() == [0, 1, 2, 4, 5, 6]
        assert data["next", "observation"].squeeze(-1)[[0, 2, 3, 4, 5]].tolist() == [1, 3, 5, 6, 7]
        assert flags(data, "done") == [0, 1, 1, 0, 0, 1]
        assert flags(data, "terminated") == [0, 1, 0, 0, 0, 0]
    assert read_dataset(path).dropped == 0, "final observations are no transitions"
    for columns in (of_ogbench(compact=True), of_ogbench(compact=True, masks=[1] * 8)):
        data = load_dataset(write(columns))
        assert flags(data, "done") == [0, 0, 1, 0, 0, 1]
        assert flags(data, "terminated") == [0] * 6


def test_a_compact_file_of_ogbench_may_be_cut_anywhere(write: Callable[[Arrays], Path]) -> None:
    # Row 6 is a transition whose next observation is not there.
    for rows, expected in ((7, [0, 1, 2, 4, 5]), (6, [0, 1, 2, 4])):
        path = write({key: column[:rows] for key, column in of_ogbench(compact=True).items()})
        assert load_dataset(path)["observation"].squeeze(-1).tolist() == expected
        assert read_dataset(path).dropped == 1


def test_valids_that_go_with_nothing_else_are_refused(write: Callable[[Arrays], Path]) -> None:
    columns = of_ogbench(compact=True)
    message = error(write(columns | {"terminals": [0, 0, 0, 1] * 2}))
    assert "'terminals' 0 and 'valids' 1 in row 2 contradict each other, as in 2 rows" in message
    for key in ("timeouts", "next_observations"):
        more = {key: columns["observations"] if key == "next_observations" else np.zeros(8)}
        assert f"and {key!r}: drop one of the two" in error(write(columns | more))
    del columns["terminals"]
    assert "no 'terminals'" in error(write(columns))


def test_terminals_of_ogbench_do_not_stop_bootstraps_for_want_of_masks(write: Callable[[Arrays], Path]) -> None:
    message = error(write(of_ogbench(qpos=np.zeros((8, 3)))))
    assert "'terminals' are 1 after every 4 steps, and 'masks' are missing: with 'qpos' it looks like" in message
    # As the message says.
    data = load_dataset(write(of_ogbench(qpos=np.zeros((8, 3)), masks=[1] * 8)))
    assert flags(data, "done") == [0, 0, 1, 0, 0, 1]
    assert flags(data, "terminated") == [0] * 6
    columns = renamed(of_ogbench(qpos=np.zeros((8, 3))), "terminals", "terminations")
    assert flags(load_dataset(write(columns)), "terminated") == [0, 0, 0, 1] * 2
    # Without its simulator's state, or after any number of steps, nobody knows.
    assert flags(load_dataset(write(of_ogbench())), "terminated") == [0, 0, 0, 1] * 2
    for ends in ([0, 0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 0, 0, 0], [1] * 8):
        data = load_dataset(write(of_ogbench(qpos=np.zeros((8, 3)), terminals=ends)))
        assert data["next", "terminated"].sum() == sum(ends)


def test_data_of_ogbench_without_rewards_are_told_where_they_are(write: Callable[[Arrays], Path]) -> None:
    columns = of_ogbench(qpos=np.zeros((8, 3)))
    del columns["rewards"]
    message = error(write(columns))
    assert "no 'rewards'; it has actions, observations, terminals; if it is OGBench's: 'rewards' and 'masks'" in message
    assert "ogbench.make_env_and_datasets('cube-double-play-singletask-v0')" in message
    assert "OGBench" not in error(write(columns | {"timeouts": np.zeros(8)}))


def test_dones_alone_are_refused(write: Callable[[Arrays], Path]) -> None:
    for name in ("dones", "done", "episode_terminals"):
        message = error(write(arrays(**{name: DONES})))
        assert repr(name) in message
        assert "add one of them" in message
    assert "no 'terminals'" in error(write(arrays(truncations=TIMEOUTS)))


@pytest.mark.parametrize(
    ("ends", "row"),
    [
        ({"terminals": TERMINALS, "dones": [0, 0, 0, 1, 0]}, 1),
        ({"truncations": TIMEOUTS, "dones": [0, 1, 0, 0, 0]}, 3),
        ({"terminals": TERMINALS, "timeouts": TIMEOUTS, "dones": [0, 1, 0, 1, 1]}, 4),
        ({"terminals": TERMINALS, "timeouts": TIMEOUTS, "dones": [0, 1, 0, 0, 0]}, 3),
        ({"masks": MASKS, "terminals": [0, 1, 1, 0, 0], "timeouts": TIMEOUTS}, 2),
        ({"masks": MASKS, "terminations": DONES}, 3),
        ({"masks": MASKS, "dones": [0, 0, 0, 1, 0]}, 1),
    ],
    ids=lambda ends: "+".join(ends) if isinstance(ends, dict) else None,
)
def test_ends_that_contradict_each_other_name_the_row(ends: Arrays, row: int, write: Callable[[Arrays], Path]) -> None:
    message = error(write(arrays(**ends)))
    assert f"in row {row} contradict each other" in message
    for name, column in ends.items():
        assert f"{name!r} {column[row]}" in message


@pytest.mark.parametrize(
    ("extra", "meant"),
    [
        ("time_outs", "timeouts"),
        ("truncation", "truncations"),
        ("REWARDS_", "rewards"),
        ("next_observatoins", "next_observations"),
        ("mask", "masks"),
        ("terminals_", "terminals"),
        ("next_state", "next_obs"),
    ],
)
def test_a_near_miss_is_refused_with_the_name_that_was_meant(
    extra: str, meant: str, write: Callable[[Arrays], Path]
) -> None:
    path = write(arrays(terminals=TERMINALS) | {extra: np.zeros(5, np.float32)})
    for options in ({}, {"memmap_dir": path.parent / "mapped"}):
        message = error(path, **options)
        assert f"{path}: {extra!r} is not a column that is read; did you mean {meant!r}?" in message


def test_only_observations_are_groups(tmp_path: Path) -> None:
    path = written(tmp_path / "d.npz", arrays(terminals=TERMINALS) | {"actions/left": np.zeros(5)})
    assert "'actions/left' is not a column that is read; did you mean 'actions'?" in error(path)


def test_an_unknown_column_is_refused_with_the_names_there_are(write: Callable[[Arrays], Path]) -> None:
    message = error(write(arrays(terminals=TERMINALS) | {"xyz": np.zeros(5)}))
    assert "'xyz' is not a column that is read" in message
    assert all(repr(column) in message for column in SYNONYMS)
    assert len(error(write(arrays(terminals=TERMINALS) | {"x" * 5000: np.zeros(5)}))) < 600


def test_two_names_of_one_column_are_refused(write: Callable[[Arrays], Path]) -> None:
    message = error(write(arrays(terminals=TERMINALS, terminations=TERMINALS)))
    assert "'terminals' and 'terminations', which are one column" in message
    columns = renamed(arrays(terminals=TERMINALS), "observations", "observations/place")
    assert "which are one column" in error(write(columns | {"observation/speed": np.zeros(5)}))


def test_metadata_is_known_by_name_and_left_alone(write: Callable[[Arrays], Path]) -> None:
    expected = load_dataset(write(arrays(terminals=TERMINALS)))
    metadata = {name: np.zeros(3) for name in METADATA - {"infos", "metadata"}}
    metadata |= {f"infos/{index}": np.zeros(1) for index in range(2000)}
    metadata |= {"metadata/policy/fc0/bias": np.zeros((2, 2)), "metadata/algorithm": np.bytes_("SAC")}
    assert (load_dataset(write(arrays(terminals=TERMINALS) | metadata)) == expected).all()


def test_groups_of_observations_have_synonyms(write: Callable[[Arrays], Path]) -> None:
    columns = arrays(terminals=TERMINALS)
    columns = renamed(renamed(columns, "observations", "obs/place"), "next_observations", "obs_next/place")
    data = load_dataset(write(columns))
    assert data["observation", "place"][:, 0].tolist() == [0, 2, 4, 6, 8]
    assert data["next", "observation", "place"][:, 0].tolist() == [100, 102, 104, 106, 108]


def test_errors_call_a_column_as_the_file_does(write: Callable[[Arrays], Path]) -> None:
    columns = arrays(terminated=[0, 0, 0.5, 0, 0])
    assert "'terminated' must be 0 or 1, got 0.5 in row 2" in error(write(columns))
    columns = renamed(arrays(terminals=TERMINALS), "actions", "act")
    assert "'act' has 4 rows" in error(write(columns | {"act": columns["act"][:4]}))
    assert "'act' must be numbers" in error(write(columns | {"act": np.full(5, b"x")}))


def test_whatever_is_in_an_archive_is_a_column(tmp_path: Path) -> None:
    path = written(tmp_path / "d.npz", arrays(terminals=TERMINALS))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("observations/", "")
    assert len(load_dataset(path)) == 5, "a folder is no column"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("timeout.csv", "0\n")
    assert "'timeout.csv' is not a column that is read; did you mean 'timeouts'?" in error(path)
    path = written(path, arrays(terminals=TERMINALS))
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("terminals.npy", archive.read("rewards.npy"))
    assert "'terminals' twice" in error(path)


#: Columns of ends that say what TERMINALS and TIMEOUTS say.
ENDS = [
    ("terminals", "timeouts"),
    ("terminals", "dones"),
    ("timeouts", "dones"),
    ("terminals", "timeouts", "dones"),
    ("masks",),
    ("masks", "terminals"),
    ("masks", "timeouts"),
    ("masks", "dones"),
    ("masks", "terminals", "timeouts", "dones"),
]


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), suffix=st.sampled_from([".npz", ".hdf5"]), names=st.sampled_from(ENDS), row=st.integers(0, 4))
def test_no_value_of_a_column_is_dropped(
    data: st.DataObject, suffix: str, names: tuple[str, ...], row: int, tmp_path: Path
) -> None:
    """Changing it changes the dataset, or is refused."""

    def loaded() -> Dataset:
        called = {name: data.draw(st.sampled_from((name, *SYNONYMS[name]))) for name in columns}
        return read_dataset(written(tmp_path / f"d{suffix}", {called[name]: columns[name] for name in columns}))

    ends = {"terminals": TERMINALS, "timeouts": TIMEOUTS, "dones": DONES, "masks": MASKS}
    columns = arrays(**{name: ends[name] for name in names})
    before = loaded()
    changed = data.draw(st.sampled_from(sorted(columns)))
    if names == ("masks", "terminals") and changed == "terminals" and row == 1:
        return  # OGBench's: a terminal state ends its episode, whether its trajectory goes on or not.
    columns[changed] = columns[changed].copy()
    columns[changed][row] = 1 - columns[changed][row] if changed in ends else columns[changed][row] + 0.25
    try:
        after = loaded()
    except DatasetError:
        return
    assert after.both != before.both or not (after.tensors == before.tensors).all()


# d3rlpy


def d3rlpy_file(path: Path, **extra: Any) -> Path:
    """Two episodes of three steps: terminated, and cut."""
    columns: Arrays = {"columns": ["observations", "actions", "rewards", "terminated"], "num_episodes": 2}
    for number in range(2):
        columns |= {
            f"observations_{number}": np.arange(6, dtype=np.float32).reshape(3, 2),
            f"actions_{number}": np.full((3, 1), 0.5, np.float32),
            f"rewards_{number}": np.arange(3, dtype=np.float32)[:, None],
            f"terminated_{number}": number == 0,
        }
    return written(path, {**columns, "version": "2.1", **extra})


def test_a_file_of_d3rlpy_has_nothing_that_is_not_read(tmp_path: Path) -> None:
    data = load_dataset(d3rlpy_file(tmp_path / "d.h5"))
    assert flags(data, "done") == [0, 0, 1, 0, 1]
    assert flags(data, "terminated") == [0, 0, 1, 0, 0]
    message = error(d3rlpy_file(tmp_path / "d.h5", timeouts_0=np.zeros(3)))
    assert "'timeouts_0' is not a column that is read; those that are: 'observations'" in message
    message = error(d3rlpy_file(tmp_path / "d.h5", reward_0=np.zeros(3)))
    assert "'reward_0' is not a column that is read; did you mean 'rewards'?" in message
    for name in ("rewards_2", "observations_0_0", "terminated_x"):
        message = error(d3rlpy_file(tmp_path / "d.h5", **{name: np.zeros(3)}))
        assert f"{name!r} belongs to none of its 2 episodes" in message


def test_an_episode_of_d3rlpy_with_a_column_of_its_own_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d3rlpy = pytest.importorskip("d3rlpy.dataset")

    class Costly(d3rlpy.Episode):  # type: ignore[misc, name-defined]
        def serialize(self) -> dict[str, Any]:
            return {**super().serialize(), "reward_": self.rewards}

    columns = (np.zeros((3, 2), np.float32), np.zeros((3, 1), np.float32), np.zeros((3, 1), np.float32), True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, costly = (
            d3rlpy.ReplayBuffer(d3rlpy.InfiniteBuffer(), episodes=[kind(*columns)]) for kind in (d3rlpy.Episode, Costly)
        )
    assert len(load_dataset(plain)) == 3
    assert "'reward_' is not a column that is read; did you mean 'rewards'?" in error(costly)


# Minari


def test_a_dataset_of_minari_has_nothing_that_is_not_read(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari = pytest.importorskip("minari")
        from gymnasium import spaces
        from minari.data_collector import EpisodeBuffer

        box = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        episode = EpisodeBuffer(
            observations=np.arange(8.0).reshape(4, 2),
            actions=np.full((3, 2), 0.5),
            rewards=np.arange(3.0),
            terminations=np.array([False, False, True]),
            truncations=np.zeros(3, bool),
            infos={"success": np.zeros(4, bool)},
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
            minari.create_dataset_from_buffers("walk-v0", [episode], observation_space=box, action_space=box)
    folder = tmp_path / "walk-v0"
    expected = load_dataset(folder)
    assert flags(expected, "terminated") == [0, 0, 1]
    file_path = folder / "data" / "main_data.hdf5"
    with h5py.File(file_path, "a") as file:
        file["episode_0/infos/more"] = np.zeros(1)
    assert (load_dataset(folder) == expected).all()
    # Minari itself reads its own names only; what the other files call them is as good as lost.
    for name, meant in (("truncation", "truncations"), ("next_observations", "observations"), ("dones", None)):
        with h5py.File(file_path, "a") as file:
            file[f"episode_0/{name}"] = np.zeros(3)
        message = error(folder)
        assert f"episode_0: {name!r} is not a column that is read" in message
        assert meant is None or f"did you mean {meant!r}?" in message
        with h5py.File(file_path, "a") as file:
            del file[f"episode_0/{name}"]
    with h5py.File(file_path, "a") as file:
        file["timeouts"] = np.zeros(3)
    assert "'timeouts' is not a column that is read" in error(folder)


# TensorDicts, their folders, and TorchRL's buffers


def transitions(**entries: Any) -> TensorDict:
    """The transitions of the files above, by the key layout."""
    observation = torch.arange(10.0, device="cpu").reshape(5, 2)
    done, terminated = (torch.tensor(column, device="cpu").bool().unsqueeze(-1) for column in (DONES, TERMINALS))
    following = {"observation": observation + 100, "reward": observation[:, :1], "done": done, "terminated": terminated}
    action = torch.full((5, 2), 0.5, device="cpu")
    return TensorDict({"observation": observation, "action": action, "next": following, **entries}, [5])


def mapped(data: TensorDict, folder: Path) -> Path:
    data.memmap(folder)
    return folder


def in_a_buffer(data: TensorDict) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchrl = pytest.importorskip("torchrl.data")
    buffer = torchrl.ReplayBuffer(storage=torchrl.LazyTensorStorage(5, device="cpu"))
    buffer.extend(data)
    return buffer


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(5, *shape, device="cpu")


@pytest.mark.parametrize("kind", ["object", "folder", "buffer"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("extra", None),
        ("observations", "'observation'"),
        ("rewards", "('next', 'reward')"),
        ("traj_ids", "('collector', 'traj_ids')"),
        ("desired_goal", None),
        (("next", "timeouts"), None),
        (("next", "truncate"), "('next', 'truncated')"),
        (("next", "observations"), "('next', 'observation')"),
        (("next", "action_"), None),
        (("agents", "observation"), "'observation'"),
    ],
    ids=str,
)
def test_a_key_that_nobody_reads_is_refused(kind: str, key: Any, meant: str | None, tmp_path: Path) -> None:
    data = transitions().set(key, zeros(1))
    source = {
        "object": lambda: data,
        "folder": lambda: mapped(data, tmp_path / "d"),
        "buffer": lambda: in_a_buffer(data),
    }
    message = error(source[kind]())
    assert f"{key!r} is not a column that is read" in message
    assert meant is None or f"did you mean {meant}?" in message


def test_what_is_no_tensor_is_a_column_too() -> None:
    assert "'timeouts' is not a column" in error(transitions(timeouts=NonTensorData("none", batch_size=[5])))
    known = transitions(language_instruction=NonTensorData("walk", batch_size=[5]))
    assert (load_dataset(known) == transitions()).all()


def test_a_key_of_some_transitions_only_is_a_column_too() -> None:
    first, *rest = transitions().unbind(0)
    first["truncations"] = torch.zeros(1, device="cpu")
    assert "'truncations' is not a column" in error(LazyStackedTensorDict(first, *rest))


@pytest.mark.parametrize("kind", ["object", "folder", "buffer"])
def test_what_torchrl_writes_beside_transitions_is_known(kind: str, tmp_path: Path) -> None:
    known = {key: zeros(1) for key in TORCHRL_METADATA - {"collector", "info"}}
    data = transitions(**known, collector={"step_count": zeros(1)}, info={"a": {"b": zeros()}})
    data["next"].update(TensorDict(known, [5]).exclude("reward", "done", "terminated"))
    data["next", "truncated"] = torch.tensor(TIMEOUTS, device="cpu").bool().unsqueeze(-1)
    source = {
        "object": lambda: data,
        "folder": lambda: mapped(data, tmp_path / "d"),
        "buffer": lambda: in_a_buffer(data),
    }
    assert (load_dataset(source[kind]()) == transitions()).all()


def test_what_a_collector_of_torchrl_writes_is_known() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchrl")
        import torchrl.collectors
        import torchrl.data
        import torchrl.modules
        from tensordict.nn import NormalParamExtractor, TensorDictModule
        from torchrl.data.postprocs import MultiStep
        from torchrl.envs import (
            CatTensors,
            Compose,
            InitTracker,
            PendulumEnv,
            RewardSum,
            StepCounter,
            TransformedEnv,
            UnsqueezeTransform,
        )

        angles = ["th", "thdot"]
        environment = TransformedEnv(
            PendulumEnv(device="cpu"),
            Compose(
                UnsqueezeTransform(dim=-1, in_keys=angles, in_keys_inv=angles),
                CatTensors(in_keys=angles, out_key="observation", dim=-1, del_keys=False),
                StepCounter(max_steps=10),
                InitTracker(),
                RewardSum(),
            ),
        )
        head = torch.nn.Sequential(torch.nn.Linear(2, 2, device="cpu"), NormalParamExtractor())
        actor = torchrl.modules.ProbabilisticActor(
            TensorDictModule(head, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            spec=environment.action_spec,
            distribution_class=torchrl.modules.TanhNormal,
            return_log_prob=True,
        )
        collector = torchrl.collectors.Collector(
            environment, actor, frames_per_batch=25, total_frames=25, postproc=MultiStep(0.9, 3)
        )
        collected = next(iter(collector)).cpu()
        collector.shutdown()
    buffer = torchrl.data.TensorDictReplayBuffer(storage=torchrl.data.LazyTensorStorage(25, device="cpu"))
    state = [(*side, name) for side in ((), ("next",)) for name in ("th", "thdot", "params")]
    buffer.extend(collected.exclude(*state))
    data = load_dataset(buffer)
    assert data["steps_to_next_obs"].unique().tolist() == [1, 2, 3]
    assert flags(data, "done") == [0] * 9 + [1] + [0] * 9 + [1] + [0] * 5
    # The rest is the environment's state: whether the policy reads it, nobody but the user knows.
    assert "is not a column that is read" in error(collected)


def test_a_truncated_step_that_is_not_done_is_refused(tmp_path: Path) -> None:
    data = transitions()
    data["next", "truncated"] = torch.tensor([0, 0, 0, 1, 1], device="cpu").bool().unsqueeze(-1)
    for source in (data, mapped(data, tmp_path / "d"), in_a_buffer(data)):
        assert "('next', 'truncated') is True and ('next', 'done') False in row 4" in error(source)
    # Padding does not count.
    data["collector", "mask"] = torch.tensor([1, 1, 1, 1, 0], device="cpu").bool()
    assert flags(load_dataset(data), "done") == [0, 1, 0, 1]


def test_trajectories_that_are_not_one_number_a_step_are_refused() -> None:
    assert "('collector', 'traj_ids') must have one number" in error(transitions(collector={"traj_ids": zeros(2)}))


# Stable-Baselines3


def buffer_of_sb3(kind: str = "ReplayBuffer", **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffers = pytest.importorskip("stable_baselines3.common.buffers")
        from gymnasium import spaces
    box = spaces.Box(-1, 1, (2,), np.float32)
    buffer = getattr(buffers, kind)(8, box, box, device="cpu", **options)
    for done, timeout in zip(DONES, TIMEOUTS, strict=True):
        values = np.full((1, 2), 0.5, np.float32)
        buffer.add(values, values, values, np.zeros(1), np.array([done]), [{"TimeLimit.truncated": bool(timeout)}])
    return buffer


def test_an_array_that_a_buffer_of_sb3_adds_is_refused(tmp_path: Path) -> None:
    expected = load_dataset(buffer_of_sb3())
    assert flags(expected, "done") == DONES
    assert flags(expected, "terminated") == TERMINALS
    assert (load_dataset(buffer_of_sb3("NStepReplayBuffer", n_steps=3, gamma=0.9)) == expected).all()
    buffer = buffer_of_sb3()
    buffer.priorities, buffer.sums = np.ones((8, 1)), np.zeros(3)
    assert (load_dataset(buffer) == expected).all()
    for name, array, meant in (
        ("truncations", np.zeros((8, 1)), None),
        ("timeout", np.zeros((8, 1)), "timeouts"),
        ("reward", {"left": np.zeros((8, 1))}, "rewards"),
    ):
        buffer = buffer_of_sb3()
        setattr(buffer, name, array)
        path = tmp_path / "buffer.pkl"
        path.write_bytes(pickle.dumps(buffer))
        for message in (error(buffer), error(path, trust_pickle=True)):
            assert f"{name!r} is not a column that is read" in message
            assert meant is None or f"did you mean {meant!r}?" in message


def test_a_timeout_of_sb3_that_ends_no_episode_is_refused() -> None:
    buffer = buffer_of_sb3()
    buffer.timeouts[2] = 1
    assert "'timeouts' is 1 and 'dones' 0 in row 2 of environment 0" in error(buffer)
