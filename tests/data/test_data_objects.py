"""Datasets in objects: TensorDicts, and replay buffers of Stable-Baselines3, TorchRL and d3rlpy."""

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import error
from tensordict import TensorDict
from tensordict.memmap import MemoryMappedTensor

from iql_plugins.data import DatasetError, check_dataset, dataset, load_dataset


def framework(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def transitions(rows: int = 6, **entries: Any) -> TensorDict:
    """Transitions that the key layout has no objection to; the third ends by time, the fifth in a terminal state."""
    flag = torch.zeros(rows, 1, dtype=torch.bool, device="cpu")
    done, terminated = flag.clone(), flag.clone()
    done[2:5:2] = True
    terminated[4:5] = True
    observation = torch.arange(2.0 * rows, device="cpu").reshape(rows, 2)
    data = TensorDict(
        {
            "observation": observation,
            "action": torch.linspace(-1, 1, rows, device="cpu").unsqueeze(-1),
            "next": {
                "observation": observation + 2,
                "reward": torch.arange(float(rows), device="cpu").unsqueeze(-1),
                "done": done,
                "terminated": terminated,
            },
        },
        [rows],
    )
    return data.update(entries)


def flags(data: TensorDict, key: str) -> list[int]:
    return data["next", key].squeeze(-1).int().tolist()


# TensorDicts


def test_a_tensordict_of_the_key_layout_is_shared() -> None:
    given = transitions(index=torch.zeros(6, device="cpu"))
    data = load_dataset(given)
    assert "index" not in data.keys()
    for key, tensor in data.items(True, True):
        assert tensor.data_ptr() == given[key].data_ptr()
    assert len(given.keys()) == 4, "the caller's TensorDict is not touched"


def test_keys_of_n_step_transitions_are_kept() -> None:
    data = load_dataset(transitions(steps_to_next_obs=torch.full((6, 1), 3, device="cpu")))
    assert data["steps_to_next_obs"].tolist() == [[3]] * 6


def test_other_shapes_and_dtypes_are_brought_to_the_layout() -> None:
    given = transitions(action=torch.nn.functional.one_hot(torch.tensor([0, 2, 1, 0, 2, 1], device="cpu")))
    given["next", "reward"] = given["next", "reward"].squeeze(-1).double()
    given["next", "done"] = given["next", "done"].squeeze(-1)
    given["observation"] = given["observation"].double()
    data = load_dataset(given)
    assert data["action"].tolist() == [[0], [2], [1], [0], [2], [1]]
    assert data["next", "reward"].shape == (6, 1)
    assert data["next", "done"].shape == (6, 1)
    assert data["observation"].dtype == torch.float32


@pytest.mark.parametrize("key", ["observation", "action", ("next", "reward"), ("next", "done"), ("next", "terminated")])
def test_a_missing_key_is_named(key: Any) -> None:
    message = error(transitions().exclude(key))
    assert repr(key) in message
    if key == ("next", "terminated"):
        assert "time-outs" in message


def test_rows_of_trajectories_are_episodes() -> None:
    given = TensorDict.stack([transitions(4), transitions(4), transitions(4)])
    given["next", "done"][:] = False
    given["next", "terminated"][:] = False
    data = load_dataset(given)
    assert data["observation"][:, 0].tolist() == [0, 2, 4, 6] * 3
    # The end of the data needs no mark, and gets none: whether that episode was cut, nobody knows.
    assert flags(data, "done") == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert flags(data, "terminated") == [0] * 12
    assert not given["next", "done"].any()


def test_padding_is_left_out() -> None:
    given = TensorDict.stack([transitions(4), transitions(4)])
    given["next", "done"][:] = False
    given["next", "terminated"][:] = False
    given["collector", "mask"] = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool, device="cpu")
    given["observation"][0, 2:] = torch.nan
    data = load_dataset(given)
    assert data["observation"][:, 0].tolist() == [0, 2, 0, 2, 4]
    assert flags(data, "done") == [0, 1, 0, 0, 1]


def test_interleaved_trajectories_are_brought_together() -> None:
    identifiers = torch.tensor([0, 0, 1, 1, 0, 1], device="cpu")
    given = transitions(collector={"traj_ids": identifiers})
    given["next", "done"][:] = False
    given["next", "terminated"][:] = False
    data = load_dataset(given)
    assert data["next", "reward"].squeeze(-1).tolist() == [0, 1, 4, 2, 3, 5]
    assert flags(data, "done") == [0, 0, 1, 0, 0, 0]


BAD = {
    "empty": (transitions(6)[:0], "empty"),
    "scalar": (transitions(6)[0], "[N]"),
    "flag": (transitions().set(("next", "done"), torch.zeros(6, 1, device="cpu")), "torch.bool"),
    "order": (
        transitions().set(("next", "terminated"), torch.ones(6, 1, dtype=torch.bool, device="cpu")),
        "in row 0: a terminal state ends its episode",
    ),
    "nan": (transitions().set("action", torch.full((6, 1), torch.nan, device="cpu")), "'action' is not finite"),
    "complex": (
        transitions().set("observation", torch.zeros(6, 2, dtype=torch.complex64, device="cpu")),
        "real numbers",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_tensordict_is_one_clear_error(case: str) -> None:
    given, text = BAD[case]
    assert text in error(given)


def test_the_check_names_key_and_row() -> None:
    data = transitions()
    check_dataset(data)
    data["next", "observation"][4, 1] = torch.inf
    with pytest.raises(DatasetError, match=r"mine: \('next', 'observation'\) is not finite in row 4"):
        check_dataset(data, "mine")
    check_dataset(data, finite=False)
    data["observation"] = data["observation"].double()
    with pytest.raises(DatasetError, match=r"got torch\.float64 of"):
        check_dataset(data, finite=False)


def test_a_memory_mapped_folder_stays_mapped(tmp_path: Path) -> None:
    given = transitions(observation=TensorDict({"a b/c": torch.zeros(6, 2, device="cpu")}, [6]))
    given["next", "observation"] = given["observation"].clone()
    given.memmap(tmp_path / "d")
    data = load_dataset(str(tmp_path / "d"))
    assert all(isinstance(tensor, MemoryMappedTensor) for tensor in data.values(True, True))
    assert (data == given).all()


def test_mapped_trajectories_stay_mapped_but_for_the_flags(tmp_path: Path) -> None:
    given = TensorDict.stack([transitions(4), transitions(4)])
    mapped = given.memmap(tmp_path / "d")
    with (tmp_path / "d" / "observation.memmap").open("r+b") as file:
        data = load_dataset(tmp_path / "d")
        assert not data["observation"].eq(99).any()
        file.write(np.float32(99).tobytes())
    assert data["observation"][0, 0] == 99, "what is read is the file"
    assert not mapped["next", "done"][:, -1].any(), "and the file is not written"


def test_the_check_reads_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = transitions()
    given["action"][5] = torch.nan
    given.memmap(tmp_path / "d")
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 8)
    assert "'action' is not finite in row 5" in error(tmp_path / "d")


def test_a_broken_folder_is_one_clear_error_and_is_left_as_it_was(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        transitions().memmap(tmp_path / name)
        return tmp_path / name

    folder = fresh("cut")
    (folder / "observation.memmap").write_bytes(b"1234567")
    message = error(folder)
    assert "'observation'" in message
    assert "48 bytes" in message
    assert (folder / "observation.memmap").read_bytes() == b"1234567"
    folder = fresh("gone")
    (folder / "next" / "reward.memmap").unlink()
    assert "'reward' is missing" in error(folder)
    folder = fresh("text")
    (folder / "meta.json").write_text("{")
    assert str(folder) in error(folder)
    folder = fresh("huge")
    metadata = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(metadata.replace("[6,1]", "[6000000000000,1]"))
    assert str(folder) in error(folder)
    assert "neither" in error(tmp_path)


def test_a_tensordict_can_be_written_to_be_mapped(tmp_path: Path) -> None:
    given = transitions(steps_to_next_obs=torch.full((6, 1), 3, device="cpu"))
    data = load_dataset(given, memmap_dir=tmp_path / "d")
    assert isinstance(data["observation"], MemoryMappedTensor)
    assert (data == given).all()


# Stable-Baselines3


def buffer_of_sb3(
    steps: int = 5,
    size: int = 8,
    environments: int = 1,
    *,
    action: Any = None,
    observation: Any = None,
    kind: str = "ReplayBuffer",
    **options: Any,
) -> Any:
    """Observations and rewards count steps, + 100 in the second environment; the third step is a time-out."""
    buffers = framework("stable_baselines3.common.buffers")
    spaces = framework("gymnasium").spaces
    action = action or spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
    observation = observation or spaces.Box(-np.inf, np.inf, (1,), np.float32)
    buffer = getattr(buffers, kind)(
        size * environments, observation, action, device="cpu", n_envs=environments, **options
    )
    for step in range(steps):
        now = np.array([[step + 100.0 * e] for e in range(environments)])

        def entries(values: Any) -> Any:
            if isinstance(observation, spaces.Dict):
                return {name: values * 10**i for i, name in enumerate(observation.spaces)}
            return values

        done = np.full(environments, step in (2, 4))
        actions = np.full((environments, buffer.action_dim), 0.5 if isinstance(action, spaces.Box) else step % 3)
        infos = [{"TimeLimit.truncated": step == 2}] * environments
        buffer.add(entries(now), entries(now + 1), actions, now[:, 0], done, infos)
    return buffer


def test_a_buffer_of_sb3() -> None:
    data = load_dataset(buffer_of_sb3())
    assert data["observation"].tolist() == [[0], [1], [2], [3], [4]]
    assert data["next", "observation"].tolist() == [[1], [2], [3], [4], [5]]
    assert flags(data, "done") == [0, 0, 1, 0, 1]
    assert flags(data, "terminated") == [0, 0, 0, 0, 1]
    # Stored as 0.5 between -1 and 1; the bounds are ±2, and 0 and 1.
    assert data["action"].tolist() == [[1.0, 0.75]] * 5
    assert data["action"].dtype == torch.float32


def test_a_full_buffer_of_sb3_comes_oldest_first() -> None:
    data = load_dataset(buffer_of_sb3(11, 8))
    assert data["next", "reward"].squeeze(-1).tolist() == list(range(3, 11))


def test_environments_of_sb3_come_one_after_another() -> None:
    data = load_dataset(buffer_of_sb3(10, 8, 2))
    assert data["observation"].squeeze(-1).tolist() == [*range(2, 10), *range(102, 110)]
    assert data["next", "observation"].squeeze(-1).tolist() == [*range(3, 11), *range(103, 111)]
    # Steps 2 and 4 end episodes; the first environment's last one is cut where the second's begin.
    assert flags(data, "done") == [1, 0, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    assert flags(data, "terminated") == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("steps", [5, 8, 11])
def test_a_buffer_of_sb3_that_saves_memory(steps: int) -> None:
    buffer = buffer_of_sb3(steps, 8, optimize_memory_usage=True, handle_timeout_termination=False)
    data = load_dataset(buffer)
    first = max(0, steps - 7) if steps >= 8 else 0
    assert data["observation"].squeeze(-1).tolist() == list(range(first, steps))
    assert data["next", "observation"].squeeze(-1).tolist() == list(range(first + 1, steps + 1))


def test_dict_observations_of_sb3_and_discrete_actions() -> None:
    spaces = framework("gymnasium").spaces
    box = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    observation = spaces.Dict({"goal": box, "place": box})
    buffer = buffer_of_sb3(action=spaces.Discrete(3), observation=observation, kind="DictReplayBuffer")
    data = load_dataset(buffer)
    assert data["observation", "place"].squeeze(-1).tolist() == [0, 10, 20, 30, 40]
    assert data["next", "observation", "goal"].squeeze(-1).tolist() == [1, 2, 3, 4, 5]
    assert data["action"].tolist() == [[0], [1], [2], [0], [1]]


def test_discrete_observations_of_sb3() -> None:
    data = load_dataset(buffer_of_sb3(observation=framework("gymnasium").spaces.Discrete(9)))
    assert data["observation"].dtype == torch.int64
    assert data["observation"].tolist() == [[0], [1], [2], [3], [4]]


def test_buffers_of_sb3_that_cannot_be_used() -> None:
    spaces = framework("gymnasium").spaces
    assert "empty" in error(buffer_of_sb3(0))
    assert "MultiDiscrete" in error(buffer_of_sb3(action=spaces.MultiDiscrete([3, 3])))
    unscaled = buffer_of_sb3()
    unscaled.actions[3] = 1.5
    assert "scale_action" in error(unscaled)
    broken = buffer_of_sb3()
    broken.observations[1] = np.nan
    assert "'observation' is not finite in row 1" in error(broken)


def test_a_pickled_buffer_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "buffer.pkl"
    path.write_bytes(pickle.dumps(buffer_of_sb3()))
    message = error(path)
    assert str(path) in message
    assert "trust_pickle=True" in message
    assert (load_dataset(path, trust_pickle=True) == load_dataset(buffer_of_sb3())).all()
    path.write_bytes(path.read_bytes()[:50])
    assert str(path) in error(path, trust_pickle=True)
    path.write_bytes(pickle.dumps([1, 2]))
    assert "no replay buffer" in error(path, trust_pickle=True)


def test_a_pickle_of_a_package_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "buffer.pkl"
    path.write_bytes(b"cmissing_package\nThing\n.")
    with pytest.raises(ImportError, match=r"missing_package.*pip install 'iql-plugins\[sb3\]'"):
        load_dataset(path, trust_pickle=True)


def test_a_buffer_with_hindsight_gives_its_real_transitions() -> None:
    framework("stable_baselines3")
    program = """
import numpy as np
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv
from iql_plugins.data import load_dataset
box = spaces.Box(-9, 9, (2,), np.float32)
names = ("observation", "achieved_goal", "desired_goal")
her = HerReplayBuffer(10, spaces.Dict({name: box for name in names}), spaces.Box(-1, 1, (1,)), None)
for step in range(4):
    obs = {name: np.full((1, 2), step, np.float32) for name in names}
    her.add(obs, obs, np.zeros((1, 1)), np.zeros(1), np.array([step == 3]), [{}])
data = load_dataset(her)
assert sorted(data["observation"].keys()) == sorted(names)
assert len(data) == 4 and data["next", "terminated"].sum() == 1
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


# TorchRL


def buffer_of_torchrl(storage: Any, *data: TensorDict) -> Any:
    buffer = framework("torchrl.data").TensorDictReplayBuffer(storage=storage)
    for part in data:
        buffer.extend(part)
    return buffer


def test_a_buffer_of_torchrl() -> None:
    data = framework("torchrl.data")
    loaded = load_dataset(buffer_of_torchrl(data.LazyTensorStorage(10, device="cpu"), transitions()))
    assert (loaded == transitions()).all()


def test_a_full_buffer_of_torchrl_comes_oldest_first() -> None:
    data = framework("torchrl.data")
    buffer = buffer_of_torchrl(data.LazyTensorStorage(8, device="cpu"), transitions(), transitions())
    loaded = load_dataset(buffer)
    assert loaded["next", "reward"].squeeze(-1).tolist() == [4, 5, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("ndim", [1, 2])
def test_trajectories_of_torchrl(ndim: int) -> None:
    data = framework("torchrl.data")
    given = TensorDict.stack([transitions(4), transitions(4)])
    storage = data.LazyTensorStorage(20, ndim=ndim, device="cpu")
    loaded = load_dataset(buffer_of_torchrl(storage, given))
    assert loaded["next", "reward"].squeeze(-1).tolist() == [0, 1, 2, 3] * 2
    assert flags(loaded, "done") == [0, 0, 1, 1, 0, 0, 1, 0]


def test_a_mapped_buffer_of_torchrl_stays_mapped(tmp_path: Path) -> None:
    data = framework("torchrl.data")
    buffer = buffer_of_torchrl(data.LazyMemmapStorage(6, scratch_dir=tmp_path / "s"), transitions())
    loaded = load_dataset(buffer)
    assert isinstance(loaded["observation"], MemoryMappedTensor)


def test_a_buffer_of_torchrl_with_a_list() -> None:
    data = framework("torchrl.data")
    buffer = data.ReplayBuffer(storage=data.ListStorage(10))
    buffer.extend(list(transitions().unbind(0)))
    assert (load_dataset(buffer) == transitions()).all()
    buffer = data.ReplayBuffer(storage=data.ListStorage(10))
    buffer.extend([1, 2, 3])
    assert "must hold TensorDicts" in error(buffer)


def test_buffers_of_torchrl_that_cannot_be_used() -> None:
    data = framework("torchrl.data")
    assert "empty" in error(buffer_of_torchrl(data.LazyTensorStorage(10, device="cpu")))
    given = transitions().exclude(("next", "terminated"))
    buffer = buffer_of_torchrl(data.LazyTensorStorage(10, device="cpu"), given)
    assert "('next', 'terminated')" in error(buffer)
    best = data.TensorDictReplayBuffer(
        storage=data.LazyTensorStorage(10, device="cpu"),
        writer=data.TensorDictMaxValueWriter(rank_key=("next", "reward")),
    )
    best.extend(transitions())
    assert "order of time" in error(best)


# d3rlpy


def dataset_of_d3rlpy(observations: Any = None, **options: Any) -> Any:
    d3rlpy = framework("d3rlpy.dataset")
    terminals, timeouts = np.zeros(9, np.float32), np.zeros(9, np.float32)
    timeouts[3], terminals[8] = 1, 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return d3rlpy.MDPDataset(
            observations=np.arange(18, dtype=np.float32).reshape(9, 2) if observations is None else observations,
            actions=options.pop("actions", np.linspace(-1, 1, 9, dtype=np.float32)[:, None]),
            rewards=np.arange(9, dtype=np.float32)[:, None],
            terminals=terminals,
            timeouts=timeouts,
            **options,
        )


def test_a_dataset_of_d3rlpy_has_as_many_transitions_as_d3rlpy_counts() -> None:
    given = dataset_of_d3rlpy()
    data = load_dataset(given)
    assert len(data) == given.transition_count == 8
    assert flags(data, "done") == [0, 0, 1, 0, 0, 0, 0, 1]
    assert flags(data, "terminated") == [0, 0, 0, 0, 0, 0, 0, 1]
    assert data["next", "observation"][2].tolist() == [6, 7]


def test_a_dataset_that_d3rlpy_wrote_is_read_without_it(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    path = tmp_path / "d.h5"
    given = dataset_of_d3rlpy()
    with path.open("w+b") as file:
        given.dump(file)
    assert (load_dataset(path) == load_dataset(given)).all()
    program = f"""
import sys
from iql_plugins.data import load_dataset
assert len(load_dataset({str(path)!r})) == 8
assert "d3rlpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_discrete_actions_and_tuple_observations_of_d3rlpy() -> None:
    framework("d3rlpy")
    from d3rlpy.constants import ActionSpace

    actions = np.array([0, 1, 1, 0, 2, 1, 0, 1, 0])
    observations = (np.zeros((9, 2), np.float32), np.zeros((9, 1, 4, 4), np.uint8))
    data = load_dataset(
        dataset_of_d3rlpy(observations, actions=actions, action_space=ActionSpace.DISCRETE, action_size=3)
    )
    assert data["action"].squeeze(-1).tolist() == [0, 1, 1, 2, 1, 0, 1, 0]
    assert data["observation", "0"].shape == (8, 2)
    assert data["next", "observation", "1"].dtype == torch.uint8
