"""Replay buffers, datasets and mini-batches of the d3rlpy adapter."""

import copy
import dataclasses
import gc
import pickle
import re
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium
import numpy as np
import pytest
import torch
from d3rlpy.dataset import (
    BasicTransitionPicker,
    Episode,
    FIFOBuffer,
    FrameStackTrajectorySlicer,
    FrameStackTransitionPicker,
    InfiniteBuffer,
    LastFrameWriterPreprocess,
    MDPDataset,
    MixedReplayBuffer,
    MultiStepTransitionPicker,
    ReplayBuffer,
    Signature,
    SparseRewardTransitionPicker,
    create_fifo_replay_buffer,
)
from d3rlpy.preprocessing import (
    MinMaxActionScaler,
    MinMaxObservationScaler,
    MinMaxRewardScaler,
    ReturnBasedRewardScaler,
    StandardObservationScaler,
    StandardRewardScaler,
    TupleObservationScaler,
)
from d3rlpy.torch_utility import TorchMiniBatch
from d3rlpy_helpers import (
    CONTINUOUS,
    DISCRETE,
    PIXEL,
    QUIET,
    VECTOR,
    assert_same_weights,
    config,
    dataset,
    fitted,
    pixel_config,
    weights,
)
from tensordict import TensorDict

from iql_d3rlpy import BoundedActionScaler, FastReplayBuffer, as_fast_buffer, plugin, to_replay_buffer
from iql_d3rlpy import buffer as buffer_module
from iql_d3rlpy.buffer import UnsupportedBufferError
from iql_d3rlpy.mapped import MappedReplayBuffer, _Rows, _taken
from iql_plugins.cli import main
from iql_plugins.data import DatasetError, episodes, load_dataset, summary
from iql_plugins.training.learner import DivergenceError

FIELDS = ("observations", "actions", "rewards", "next_observations", "next_actions", "terminals", "intervals")
PICKERS = {
    "basic": BasicTransitionPicker(),
    "three_steps": MultiStepTransitionPicker(3, 0.9),
    "twenty_steps": MultiStepTransitionPicker(20, 0.9),
    "sparse": SparseRewardTransitionPicker(-1.0),
}


def assert_same_batches(first: Any, second: Any, count: int = 200, fields: Sequence[str] = FIELDS) -> None:
    """Both draw the very same mini-batch from the same random state."""
    batches = []
    for buffer in (first, second):
        np.random.seed(3)
        batches.append(buffer.sample_transition_batch(count))
    for field in fields:
        expected, got = (getattr(batch, field) for batch in batches)
        pairs = zip(expected, got, strict=True) if isinstance(expected, list) else [(expected, got)]
        for theirs, ours in pairs:
            assert ours.dtype == theirs.dtype == np.float32
            np.testing.assert_array_equal(ours, theirs, err_msg=field)
    for expected, got in zip(batches[0].transitions[:20], batches[1].transitions[:20], strict=True):
        np.testing.assert_array_equal(got.action, expected.action)
        if fields is FIELDS:
            np.testing.assert_array_equal(got.rewards_to_go, expected.rewards_to_go)
    assert len(batches[1].transitions) == len(batches[1]) == count


@pytest.mark.parametrize("picker", PICKERS)
def test_mini_batches_are_the_very_ones_of_d3rlpy(kind: str, picker: str) -> None:
    data = dataset(kind, transition_picker=PICKERS[picker])
    fast = as_fast_buffer(data)
    assert isinstance(fast, ReplayBuffer)
    assert_same_batches(data, fast)


@pytest.mark.parametrize("frames", [1, 4])
def test_frames_are_stacked_as_d3rlpy_does(frames: int) -> None:
    data = dataset(CONTINUOUS, (2, 5, 5), transition_picker=FrameStackTransitionPicker(frames))
    fast = as_fast_buffer(data)
    assert fast.sample_transition_batch(3).observations.shape == (3, 2 * frames, 5, 5)
    assert_same_batches(data, fast)


def test_tuples_and_other_dtypes() -> None:
    rng = np.random.default_rng(0)
    data = MDPDataset(
        [rng.normal(size=(30, 3)), rng.integers(0, 256, (30, 3, 4, 4)).astype(np.uint8), rng.integers(0, 9, (30, 2))],
        rng.normal(size=(30, 2)),
        rng.normal(size=30),
        np.eye(30)[14],
        np.eye(30)[29],
        transition_picker=MultiStepTransitionPicker(2, 0.9),
    )
    assert_same_batches(data, as_fast_buffer(data))


def test_every_transition_is_as_likely(kind: str) -> None:
    data = dataset(kind)
    batch = as_fast_buffer(data).sample_transition_batch(20_000)
    counts = Counter(batch.rewards.reshape(-1).tolist())
    assert len(counts) == data.transition_count == 58
    # 345 each, give or take 5 deviations of 18.6.
    assert all(250 < count < 440 for count in counts.values())


@pytest.mark.parametrize("limit", [None, 23, 500])
@pytest.mark.parametrize("picker", PICKERS)
def test_online_data_is_followed(picker: str, limit: int | None) -> None:
    rng = np.random.default_rng(0)
    signature = Signature(dtype=[np.dtype(np.float32)], shape=[(2,)])
    buffers = [
        ReplayBuffer(
            InfiniteBuffer() if limit is None else FIFOBuffer(limit),
            transition_picker=PICKERS[picker],
            observation_signature=signature,
            action_signature=signature,
            reward_signature=Signature(dtype=[np.dtype(np.float32)], shape=[(1,)]),
            action_space=d3rlpy.constants.ActionSpace.CONTINUOUS,
            action_size=2,
        )
        for _ in range(2)
    ]
    plain, fast = buffers[0], as_fast_buffer(buffers[1])
    with pytest.raises(ValueError, match="no transition to sample"):
        fast.sample_transition_batch(1)
    for step in range(150):
        # Through either of the two that share it.
        writers = (plain, fast if step % 3 else buffers[1])
        observation, action, reward = rng.normal(size=2), rng.normal(size=2), float(rng.normal())
        ends = rng.random() < 0.1
        for writer in writers:
            writer.append(observation, action, reward)
            if ends:
                writer.clip_episode(step % 2 == 0)
            if step == 70:
                # A whole episode comes in between the steps of another.
                episode = Episode(np.ones((5, 2), "f"), np.ones((5, 2), "f"), np.ones((5, 1), "f"), True)
                writer.append_episode(episode)
        if plain.transition_count and step % 4 == 0:
            assert fast.transition_count == plain.transition_count
            assert_same_batches(plain, fast, 50)
    assert fast.size() == plain.size()


def test_old_rows_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iql_d3rlpy.buffer._SLACK", 20)
    base = create_fifo_replay_buffer(50, episodes=dataset(CONTINUOUS).episodes)
    fast = as_fast_buffer(base)
    for _ in range(30):
        base.append_episode(dataset(CONTINUOUS).episodes[0])
        assert_same_batches(base, fast, 20)
        columns = fast._columns
        assert columns is not None
        assert columns._transitions.count <= 2 * 50 + 20 + 20


IMAGES = (4, 32, 32)


def image_arrays(steps: int = 1000) -> list[Any]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (steps, *IMAGES)).astype(np.uint8)
    return [images, rng.normal(size=(steps, 2)), rng.normal(size=steps), np.zeros(steps), np.arange(steps) % 50 == 49]


def apart(episodes: Sequence[Any]) -> list[Episode]:
    """Episodes with arrays of their own, as they come from a file."""
    return [Episode(e.observations.copy(), e.actions.copy(), e.rewards.copy(), e.terminated) for e in episodes]


@pytest.mark.parametrize("where", ["together", "some", "apart"])
def test_a_large_dataset_is_not_held_twice(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_module, "LARGEST_COPY", 1_000)
    arrays = image_arrays()
    episodes = MDPDataset(*arrays).episodes
    tracemalloc.start()
    if where == "apart":
        episodes = apart(episodes)
    elif where == "some":
        episodes = [episodes[number] for number in (7, 3, 5, 19)]
    plain = ReplayBuffer(InfiniteBuffer(), episodes=episodes)
    expected = ReplayBuffer(InfiniteBuffer(), episodes=apart(episodes))
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        fast = as_fast_buffer(plain)
        fast.sample_transition_batch(1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = arrays[0].nbytes
    assert peak - before < 0.1 * size
    assert_same_batches(expected, fast)
    assert_same_batches(expected, plain)
    # More comes behind arrays that stay where they are.
    for buffer in (expected, fast):
        for episode in apart(episodes[:2]):
            buffer.append_episode(episode)
    assert_same_batches(expected, fast)


@pytest.mark.parametrize("largest", [0, 2**28])
def test_episodes_are_left_as_they_are(kind: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_module, "LARGEST_COPY", largest)
    episodes = apart(dataset(kind).episodes)
    before = [dict(vars(episode)) for episode in episodes]
    fast = as_fast_buffer(ReplayBuffer(InfiniteBuffer(), episodes=episodes))
    assert_same_batches(dataset(kind), fast)
    for episode, parts in zip(episodes, before, strict=True):
        assert all(vars(episode)[name] is part for name, part in parts.items())


def test_a_queue_is_gone_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = create_fifo_replay_buffer(100, episodes=dataset(CONTINUOUS).episodes)
    with monkeypatch.context() as patch:
        # To find a position in the middle takes as long as the queue is.
        patch.delattr(FIFOBuffer, "__getitem__")
        fast = as_fast_buffer(buffer)
    assert_same_batches(buffer, fast)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_copies_know_their_own_episodes(copied: Any) -> None:
    fast = as_fast_buffer(dataset(CONTINUOUS))
    fast.sample_transition_batch(2)
    other = copied(fast)
    assert isinstance(other, FastReplayBuffer)
    assert other._columns is None
    assert_same_batches(dataset(CONTINUOUS), other)


def test_a_buffer_of_our_own_class_from_the_start(kind: str) -> None:
    episodes = dataset(kind).episodes
    fast = FastReplayBuffer(InfiniteBuffer(), episodes=episodes)
    assert_same_batches(ReplayBuffer(InfiniteBuffer(), episodes=episodes), fast)
    assert as_fast_buffer(fast) is fast


class OtherPicker(BasicTransitionPicker):  # type: ignore[misc]
    """A user's own."""


class OtherBuffer(MDPDataset):  # type: ignore[misc]
    """A user's own, which prefers something."""

    def sample_transition(self) -> Any:
        return self._transition_picker(self.episodes[0], 0)


def test_what_cannot_be_followed_is_refused() -> None:
    data = dataset(CONTINUOUS)
    with pytest.raises(UnsupportedBufferError, match="has a OtherPicker; fast are BasicTransitionPicker"):
        as_fast_buffer(dataset(CONTINUOUS, transition_picker=OtherPicker()))
    with pytest.raises(UnsupportedBufferError, match="has a sample_transition of its own"):
        as_fast_buffer(OtherBuffer(np.ones((3, 1), "f"), np.full((3, 1), 0.5), np.ones(3), np.eye(3)[2]))
    with pytest.raises(UnsupportedBufferError, match="got MixedReplayBuffer: pass each part"):
        as_fast_buffer(MixedReplayBuffer(data, data, 0.5))
    with pytest.raises(UnsupportedBufferError, match="got list"):
        as_fast_buffer([data])  # type: ignore[arg-type]
    episodes = [Episode(np.ones((3, 1, 2, 2), dtype), np.full((3, 1), 0.5), np.ones((3, 1)), True) for dtype in "Bf"]
    with pytest.raises(UnsupportedBufferError, match="must have the same dtypes, got float32 after uint8"):
        as_fast_buffer(ReplayBuffer(InfiniteBuffer(), episodes=episodes))


def test_fit_takes_the_fast_way_where_it_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for data, fast in ((dataset(kind), True), (dataset(kind, transition_picker=OtherPicker()), False)):
        torch.manual_seed(0)
        np.random.seed(0)
        algorithm, drawn = config(kind).create(), []
        batch = FastReplayBuffer.sample_transition_batch

        def sample(self: Any, size: int, drawn: list[int] = drawn, batch: Any = batch) -> Any:
            drawn.append(size)
            return batch(self, size)

        with monkeypatch.context() as patch:
            patch.setattr(FastReplayBuffer, "sample_transition_batch", sample)
            algorithm.fit(data, n_steps=3, n_steps_per_epoch=3, **QUIET)
        assert drawn == ([16] * 3 if fast else [])
        results.append(weights(algorithm))
    assert_same_weights(*results)


@pytest.mark.parametrize("name", ["CQLConfig", "IQLConfig"])
def test_other_algorithms_of_d3rlpy_learn_the_same_on_it(name: str) -> None:
    results = []
    for data in (dataset(CONTINUOUS), as_fast_buffer(dataset(CONTINUOUS))):
        d3rlpy.seed(0)
        algorithm = getattr(d3rlpy.algos, name)(batch_size=8).create()
        algorithm.fit(data, n_steps=2, n_steps_per_epoch=2, **QUIET)
        results.append(algorithm.impl.policy.state_dict())
    assert_same_weights(*results)


# Datasets


@pytest.mark.parametrize(("source", "count"), [("pendulum-v1-sac", 20_000)])
def test_no_transition_is_lost_where_mdp_dataset_loses_one_an_episode(source: str, count: int) -> None:
    data = load_dataset(source)
    buffer = to_replay_buffer(source)
    assert isinstance(buffer, ReplayBuffer)
    assert buffer.transition_count == count == len(data)
    timeouts = (data["next", "done"] & ~data["next", "terminated"]).numpy().reshape(-1)
    assert timeouts.sum() == 100
    assert buffer.size() == 100
    terminals = data["next", "terminated"].numpy().reshape(-1).astype(float)
    arrays = [data[key].numpy() for key in ("observation", "action", ("next", "reward"))]
    theirs = MDPDataset(*arrays, terminals, timeouts.astype(float))
    assert theirs.transition_count == count - 100

    back = load_dataset(buffer)
    torch.testing.assert_close(back.select(*data.keys(True, True)), data, rtol=0.0, atol=0.0)
    assert len(load_dataset(theirs)) == count - 100


def transitions(kind: str) -> TensorDict:
    """Episodes that terminate, are cut, and are broken off; with a gap between two rows that no flag tells of."""
    rng = np.random.default_rng(0)
    observation = torch.tensor(rng.normal(size=(9, 2)), dtype=torch.float32, device="cpu")
    following = observation.roll(-1, 0)
    following[[2, 5, 6, 8]] += 1.0
    done = torch.zeros(9, 1, dtype=torch.bool, device="cpu")
    done[[2, 5]] = True
    terminated = torch.zeros_like(done)
    terminated[2] = True
    action = torch.tensor(rng.normal(size=(9, 2)), dtype=torch.float32, device="cpu")
    reward = torch.arange(9.0, device="cpu").unsqueeze(-1)
    index = torch.tensor(rng.integers(0, 3, (9, 1)), device="cpu")
    return TensorDict(
        {
            "observation": observation,
            "action": index if kind == DISCRETE else action,
            "next": {"observation": following, "reward": reward, "done": done, "terminated": terminated},
        },
        [9],
    )


def test_each_transition_is_what_it_was(kind: str) -> None:
    data = transitions(kind)
    buffer = to_replay_buffer(data, action_size=4 if kind == DISCRETE else None)
    assert [episode.transition_count for episode in buffer.episodes] == [3, 3, 1, 2]
    assert [episode.terminated for episode in buffer.episodes] == [True, False, False, False]
    buffer.draw = lambda count, size: np.arange(count)
    batch = buffer.sample_transition_batch(9)
    expected = {
        "observations": data["observation"],
        "actions": data["action"].float(),
        "rewards": data["next", "reward"],
        "terminals": data["next", "terminated"].float(),
        "next_observations": data["next", "observation"] * ~data["next", "terminated"],
    }
    for field, tensor in expected.items():
        np.testing.assert_array_equal(getattr(batch, field), tensor.numpy(), err_msg=field)
    info = buffer.dataset_info
    assert info.action_size == (4 if kind == DISCRETE else 2)
    assert info.action_space.name == kind.upper()


def test_dict_observations_become_tuples_sorted_by_name() -> None:
    data = transitions(CONTINUOUS)
    for base in (data, data["next"]):
        base["observation"] = TensorDict({"b": base["observation"], "a": 2.0 * base["observation"]}, [9])
    buffer = to_replay_buffer(data)
    buffer.draw = lambda count, size: np.arange(count)
    first, second = buffer.sample_transition_batch(9).observations
    np.testing.assert_array_equal(first, 2.0 * second)
    assert buffer.transition_count == 9


@pytest.mark.parametrize(
    ("kind", "picker"),
    [
        ("vectors", None),
        ("images and discrete actions", None),
        ("images and discrete actions", FrameStackTransitionPicker(3)),
        ("a Dict", None),
        *(("a Dict", picker) for picker in PICKERS.values()),
    ],
)
def test_data_on_disk_stay_there_and_give_the_very_same_mini_batches(kind: str, picker: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = 600
    shape, dtype = ((3, 8, 8), "u1") if kind.startswith("images") else ((3,), "f4")
    observations = (255 * random.random((rows + 1, *shape))).astype(dtype)
    following = observations[1:].copy()
    # An episode that ended without a flag.
    following[300] = 0
    names = ("",) if kind != "a Dict" else ("/place", "/goal")
    data: dict[str, Any] = {f"observations{name}": observations[:-1] for name in names}
    data |= {f"next_observations{name}": following for name in names}
    discrete = kind.startswith("images")
    data["actions"] = random.integers(4, size=rows) if discrete else random.uniform(-1, 1, (rows, 2)).astype("f4")
    data["rewards"] = random.normal(size=rows).astype("f4")
    data["terminals"] = np.arange(rows) % 97 == 96
    data["timeouts"] = np.isin(np.arange(rows), (50, 51, 200, 599))
    load_dataset(data, discrete=discrete, memmap_dir=tmp_path / "data")
    expected = to_replay_buffer(data, discrete=discrete, transition_picker=picker)
    found = to_replay_buffer(tmp_path / "data", transition_picker=picker)
    assert isinstance(found, MappedReplayBuffer)
    assert found.dataset_info == expected.dataset_info
    assert (found.size(), found.transition_count) == (expected.size(), rows)
    assert_same_batches(expected, found, 2 * rows)
    np.random.seed(1)
    for theirs, ours in zip(expected.episodes, found.episodes, strict=True):
        assert (theirs.terminated, theirs.size()) == (ours.terminated, ours.size())
        for one, other in zip(buffer_module._columns(theirs), buffer_module._columns(ours), strict=True):
            np.testing.assert_array_equal(one, other)
    batches = []
    for buffer in (expected, found):
        np.random.seed(3)
        batches.append(buffer.sample_transition_batch(60).transitions)
    for theirs, ours in zip(*batches, strict=True):
        for field in ("action", "reward", "next_action", "terminal", "interval", "rewards_to_go"):
            np.testing.assert_array_equal(getattr(theirs, field), getattr(ours, field))
        np.testing.assert_array_equal(np.array(theirs.next_observation), np.array(ours.next_observation))
    with pytest.raises(TypeError, match="nothing can be appended"):
        found.append_episode(expected.episodes[0])
    with pytest.raises(UnsupportedBufferError, match="has a _OwnPicker; fast are"):
        to_replay_buffer(tmp_path / "data", transition_picker=_OwnPicker())


@pytest.mark.parametrize("converted", [True, False], ids=["with a summary", "without"])
@pytest.mark.parametrize(
    ("names", "scalers"),
    [
        ([""], lambda: (StandardObservationScaler(), BoundedActionScaler(), ReturnBasedRewardScaler())),
        ([""], lambda: (MinMaxObservationScaler(), MinMaxActionScaler(), MinMaxRewardScaler())),
        (
            ["/goal", "/place"],
            lambda: (
                TupleObservationScaler([MinMaxObservationScaler(), StandardObservationScaler()]),
                MinMaxActionScaler(),
                StandardRewardScaler(),
            ),
        ),
    ],
    ids=["standard", "min_max", "tuple"],
)
def test_scalers_are_fitted_to_data_on_disk_without_a_look_at_each_step(
    names: list[str], scalers: Any, converted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    random, rows = np.random.default_rng(0), 300
    data = {f"observations{name}": random.normal(3, 2, (rows, 3)).astype("f4") for name in names}
    data |= {"actions": random.uniform(-1, 0.5, (rows, 2)).astype("f4"), "rewards": random.normal(size=rows)}
    data |= {"terminals": np.arange(rows) % 50 == 49}
    np.savez(tmp_path / "data.npz", **data)
    if converted:
        assert main(["convert-dataset", str(tmp_path / "data.npz"), str(tmp_path / "shards")]) == 0
    else:
        load_dataset(tmp_path / "data.npz", memmap_dir=tmp_path / "shards")
    in_memory, on_disk = (to_replay_buffer(tmp_path / name) for name in ("data.npz", "shards"))
    # With another chunk size, so that pieces come together.
    monkeypatch.setattr(summary, "CHUNK", 64)

    def fitted_on(buffer: Any) -> list[Any]:
        observation, action, reward = scalers()
        made = config(CONTINUOUS, observation_scaler=observation, action_scaler=action, reward_scaler=reward)
        # d3rlpy's encoders take no tuples; its scalers are fitted before it asks them to.
        with pytest.raises(ValueError, match="takes one observation") if len(names) > 1 else nullcontext():
            fitted(made.create(), buffer, steps=1)
        return [*getattr(observation, "observation_scalers", [observation]), action, reward]

    expected = fitted_on(in_memory)

    def forbidden(*_: object) -> Any:
        raise AssertionError("all of the dataset was read")

    monkeypatch.setattr(_Rows, "episodes", property(forbidden))
    if converted:
        monkeypatch.setattr(summary, "moments", forbidden)
        monkeypatch.setattr(episodes, "episode_returns", forbidden)
    for theirs, ours in zip(expected, fitted_on(on_disk), strict=True):
        assert theirs.built
        for field in dataclasses.fields(theirs):
            np.testing.assert_allclose(getattr(ours, field.name), getattr(theirs, field.name), rtol=1e-6)


def test_every_other_row_of_data_on_disk_is_drawn_as_of_data_in_memory(tmp_path: Path) -> None:
    mapped = load_dataset("pendulum-v1-sac")[:400].memmap(tmp_path)[::2]
    found = to_replay_buffer(mapped)
    assert isinstance(found, MappedReplayBuffer)
    assert_same_batches(to_replay_buffer(mapped.clone()), found, 200)


def test_rows_that_do_not_lie_one_after_the_other_are_not_copied_for_each_batch() -> None:
    class Watched(np.ndarray[Any, Any]):
        def take(self, *arguments: Any, **options: Any) -> Any:
            assert self.flags.c_contiguous
            return super().take(*arguments, **options)

    array, rows = np.arange(20).reshape(10, 2), np.array([3, 0])
    for rows_of in (array, array[::2]):
        np.testing.assert_array_equal(_taken(rows_of.view(Watched), rows), rows_of[rows])


def test_what_summaries_do_not_know_d3rlpy_fits_to_each_step(tmp_path: Path) -> None:
    load_dataset("pendulum-v1-sac")[:400].memmap(tmp_path / "shards")
    picker = PICKERS["three_steps"]
    fitted_scalers = []
    for source in (load_dataset("pendulum-v1-sac")[:400], tmp_path / "shards"):
        scaler = StandardRewardScaler()
        data = to_replay_buffer(source, transition_picker=picker)
        fitted(config(CONTINUOUS, action_scaler=MinMaxActionScaler(), reward_scaler=scaler).create(), data, steps=1)
        fitted_scalers.append(scaler)
    assert fitted_scalers[0] == fitted_scalers[1]


def test_the_number_of_discrete_actions_of_data_on_disk_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", **{"observations": np.zeros((9, 2), "f4"), "rewards": np.zeros(9, "f4")},
             actions=np.arange(9) % 4, terminals=np.arange(9) == 8)  # fmt: skip
    assert main(["convert-dataset", str(tmp_path / "data.npz"), str(tmp_path / "shards")]) == 0
    monkeypatch.setattr(summary, "_extremes", lambda values: pytest.fail("all actions were read"))
    assert to_replay_buffer(tmp_path / "shards").dataset_info.action_size == 4


class _OwnPicker(BasicTransitionPicker):  # type: ignore[misc]
    pass


@pytest.mark.parametrize("key", ["steps_to_next_obs", ("next", "discount")])
def test_n_step_transitions_are_left_to_d3rlpy(key: Any) -> None:
    data = transitions(CONTINUOUS).set(key, torch.full((9, 1), 3, device="cpu"))
    with pytest.raises(ValueError, match="MultiStepTransitionPicker"):
        to_replay_buffer(data)


@pytest.mark.parametrize("picker", PICKERS)
def test_a_datasets_transition_picker_is_kept(kind: str, picker: str) -> None:
    data = dataset(kind, transition_picker=PICKERS[picker])
    # The action after a cut is in no dataset.
    known = [field for field in FIELDS if field != "next_actions"]
    assert_same_batches(data, to_replay_buffer(data), fields=known)
    given = to_replay_buffer(dataset(kind), transition_picker=PICKERS[picker])
    assert_same_batches(data, given, fields=known)


def test_a_datasets_frame_stack_slicer_preprocessor_and_action_size_are_kept() -> None:
    shape, count = (1, 5, 5), 6
    buffer = ReplayBuffer(
        InfiniteBuffer(),
        transition_picker=FrameStackTransitionPicker(4),
        trajectory_slicer=FrameStackTrajectorySlicer(4),
        writer_preprocessor=LastFrameWriterPreprocess(),
        observation_signature=Signature(dtype=[np.dtype(np.uint8)], shape=[shape]),
        action_signature=Signature(dtype=[np.dtype(np.int64)], shape=[(1,)]),
        reward_signature=Signature(dtype=[np.dtype(np.float32)], shape=[(1,)]),
        action_space=d3rlpy.constants.ActionSpace.DISCRETE,
        action_size=count,
    )
    rng = np.random.default_rng(0)

    def play(*buffers: ReplayBuffer) -> None:
        for _ in range(10):
            frames = rng.integers(0, 256, (4, 5, 5)).astype(np.uint8)
            for each in buffers:
                each.append(frames, 1, 0.5)
        for each in buffers:
            each.clip_episode(True)

    play(buffer)
    ours = to_replay_buffer(buffer)
    assert ours.sample_transition_batch(3).observations.shape == (3, 4, 5, 5)
    assert ours.dataset_info == buffer.dataset_info
    assert to_replay_buffer(buffer, action_size=7).dataset_info.action_size == 7
    assert type(ours.trajectory_slicer) is FrameStackTrajectorySlicer
    play(buffer, ours)
    known = [field for field in FIELDS if field != "next_actions"]
    assert_same_batches(buffer, ours, fields=known)
    mixed = MixedReplayBuffer(buffer, buffer, 0.5)
    assert type(to_replay_buffer(mixed).transition_picker) is FrameStackTransitionPicker


def test_a_transition_picker_of_ones_own_is_refused() -> None:
    class Own(BasicTransitionPicker):
        pass

    for data, picker in ((dataset(CONTINUOUS, transition_picker=Own()), None), (dataset(CONTINUOUS), Own())):
        with pytest.raises(UnsupportedBufferError, match="has a Own; fast are"):
            to_replay_buffer(data, transition_picker=picker)


def test_files_of_d3rlpy_load_and_come_back(kind: str, tmp_path: Path) -> None:
    data = dataset(kind)
    with (tmp_path / "data.h5").open("w+b") as file:
        data.dump(file)
    loaded = load_dataset(tmp_path / "data.h5", discrete=kind == DISCRETE)
    assert len(loaded) == data.transition_count
    # The action after a cut is in no dataset.
    known = [field for field in FIELDS if field != "next_actions"]
    assert_same_batches(data, to_replay_buffer(loaded), fields=known)


# Mini-batches


def test_transition_mini_batches_are_mapped(kind: str) -> None:
    batch = dataset(kind, transition_picker=MultiStepTransitionPicker(3, 0.9)).sample_transition_batch(200)
    mapped = plugin.iql_map_batch(batch)
    assert mapped is not None
    assert mapped.batch_size == (200,)
    for key, array in {
        "observation": batch.observations,
        "action": batch.actions,
        ("next", "observation"): batch.next_observations,
        ("next", "reward"): batch.rewards,
        ("next", "terminated"): batch.terminals,
        ("next", "done"): batch.terminals,
        "steps_to_next_obs": batch.intervals,
    }.items():
        np.testing.assert_array_equal(mapped[key].cpu().numpy(), array)
    assert mapped["next", "terminated"].dtype == torch.bool
    assert mapped["steps_to_next_obs"].dtype == torch.int64
    assert mapped["action"].dtype == (torch.int64 if kind == DISCRETE else torch.float32)
    assert mapped["next", "terminated"].any()
    assert set(mapped["steps_to_next_obs"].reshape(-1).tolist()) == {1, 2, 3}


def test_torch_mini_batches_are_mapped(kind: str, device: torch.device) -> None:
    batch = dataset(kind).sample_transition_batch(8)
    torch_batch = TorchMiniBatch.from_batch(batch, 0.99, False, str(device))
    mapped, expected = plugin.iql_map_batch(torch_batch), plugin.iql_map_batch(batch)
    torch.testing.assert_close(mapped, expected)
    assert mapped is not None
    # Without a copy where dtypes agree.
    assert mapped["observation"] is torch_batch.observations


def test_fast_batches_and_tuples_are_mapped() -> None:
    data = transitions(CONTINUOUS)
    for base in (data, data["next"]):
        base["observation"] = TensorDict({"b": base["observation"], "a": 2.0 * base["observation"]}, [9])
    mapped = plugin.iql_map_batch(to_replay_buffer(data).sample_transition_batch(4))
    assert mapped is not None
    torch.testing.assert_close(mapped["observation", "0"], 2.0 * mapped["observation", "1"])
    assert mapped["next", "observation", "0"].shape == (4, 2)


def test_other_objects_are_nobodys() -> None:
    for other in (None, {"observations": np.ones(3)}, dataset(CONTINUOUS), np.ones(VECTOR)):
        assert plugin.iql_map_batch(other) is None


def spoilt(column: str, row: int, value: float, **options: Any) -> MDPDataset:
    """A dataset with one number that is out of place."""
    data = dataset(CONTINUOUS, **options)
    start = 0
    for episode in data.episodes:
        if start <= row < start + len(episode):
            getattr(episode, column)[row - start, 0] = value
        start += len(episode)
    return data


def primary_and_secondary(data: MDPDataset) -> MixedReplayBuffer:
    return MixedReplayBuffer(data, dataset(CONTINUOUS), secondary_mix_ratio=0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("column", "key"), [("observations", "'observation'"), ("actions", "'action'"), ("rewards", "'next', 'reward'")]
)
@pytest.mark.parametrize("wrapped", [lambda data: data, as_fast_buffer, primary_and_secondary])
def test_data_that_are_not_finite_are_refused_by_key_and_row(column: str, key: str, bad: float, wrapped: Any) -> None:
    data = wrapped(spoilt(column, 33, bad))
    algorithm = config(CONTINUOUS).create()
    for fit in (
        algorithm.fit,
        lambda data, **options: algorithm.fit_online(gymnasium.make("Pendulum-v1"), data, **options),
    ):
        with pytest.raises(DatasetError, match=rf"the \w+: \(?{key}\)? is not finite in row 33"):
            fit(data, n_steps=1, n_steps_per_epoch=1, **QUIET)
    assert algorithm.impl is None


def test_an_observation_of_a_tuple_is_named() -> None:
    observations = [np.zeros((30, 3), np.float32), np.zeros((30, 2))]
    observations[1][17, 1] = 1e300
    data = MDPDataset(observations, np.zeros((30, 2), np.float32), np.zeros(30), np.eye(30)[29])
    # Finite in float64, and not in the float32 of mini-batches.
    with pytest.raises(DatasetError, match=r"\('observation', '1'\) is not finite in row 17"):
        config(CONTINUOUS).create().fit(data, n_steps=1, n_steps_per_epoch=1, **QUIET)


def test_what_is_never_sampled_may_be_anything() -> None:
    # The last step of an episode that was cut: of it only the observation is read.
    data = spoilt("rewards", 39, np.nan)
    fitted(config(CONTINUOUS).create(), data)
    with pytest.raises(DatasetError, match="'observation' is not finite in row 39"):
        fitted(config(CONTINUOUS).create(), spoilt("observations", 39, np.nan))


def test_integers_and_images_have_nothing_to_look_at() -> None:
    fitted(pixel_config(DISCRETE).create(), dataset(DISCRETE, PIXEL))


@pytest.mark.parametrize(
    ("scaler", "factor"),
    [(None, 1.0), (MinMaxActionScaler(minimum=np.full(2, -4.0), maximum=np.full(2, 4.0)), 4.0)],
    ids=["without a scaler", "fitted"],
)
def test_actions_beyond_the_bounds_are_clipped_and_counted_once(
    scaler: Any, factor: float, capsys: pytest.CaptureFixture[str]
) -> None:
    # The bounds are those of the scaler, without one -1 and 1.
    models = []
    for beyond in (1.0, 3.0):
        data = dataset(CONTINUOUS)
        for episode in data.episodes:
            episode.actions[:] *= factor
            episode.actions[::4, 1] = beyond * factor
        capsys.readouterr()
        np.random.seed(0)
        torch.manual_seed(0)
        models.append(fitted(config(CONTINUOUS, action_scaler=copy.deepcopy(scaler)).create(), data))
    said = re.findall(r"'action' is beyond the bounds in (\d+) of (\d+) rows, first in row 0", capsys.readouterr().out)
    assert said == [("15", "58")]
    assert_same_weights(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("rows", [31, 1])
def test_actions_that_no_clipping_explains_are_refused_unless_they_are_to_be_clipped(rows: int) -> None:
    data = dataset(CONTINUOUS)
    for row in range(rows):
        episode = data.episodes[row // 20]
        episode.actions[row % 20, 0] = 1.5 if rows > 1 else 1e9
    algorithm = config(CONTINUOUS).create()
    with pytest.raises(DatasetError, match=r"action_scaler=MinMaxActionScaler\(minimum, maximum\).*clip_all_actions=T"):
        fitted(algorithm, data)
    assert algorithm.impl is None
    fitted(config(CONTINUOUS, clip_all_actions=True).create(), data)
    # A scaler that is fitted to the data has bounds that fit them.
    fitted(config(CONTINUOUS, action_scaler=MinMaxActionScaler()).create(), data)


@pytest.mark.parametrize("scaler", [None, MinMaxActionScaler()])
def test_the_choice_to_clip_all_actions_is_saved(scaler: Any, tmp_path: Path) -> None:
    algorithm = fitted(config(CONTINUOUS, clip_all_actions=True, action_scaler=scaler).create(), dataset(CONTINUOUS))
    algorithm.save(tmp_path / "model.d3")
    loaded = d3rlpy.load_learnable(str(tmp_path / "model.d3"))
    assert loaded.config.clip_all_actions is True
    assert loaded.to_agent().config.clip_all_actions is True


def test_a_training_that_diverges_stops_and_writes_no_model(tmp_path: Path) -> None:
    algorithm = config(CONTINUOUS).create()

    def spoil(_: Any, __: int, step: int) -> None:
        if step == 6:
            with torch.no_grad():
                next(algorithm.impl.policy.parameters()).fill_(np.nan)

    with pytest.raises(DivergenceError, match="the actor's weights not finite at step 6"):
        algorithm.fit(
            dataset(CONTINUOUS),
            n_steps=9,
            n_steps_per_epoch=3,
            show_progress=False,
            logger_adapter=d3rlpy.logging.FileAdapterFactory(root_dir=str(tmp_path)),
            callback=spoil,
        )
    assert [path.name for path in tmp_path.rglob("*.d3")] == ["model_3.d3"]


def test_online_training_that_diverges_stops() -> None:
    algorithm = config(CONTINUOUS, critic_learning_rate=1e38, batch_size=4).create()
    env = gymnasium.make("Pendulum-v1")
    with pytest.raises(DivergenceError, match="not finite at step"):
        algorithm.fit_online(env, n_steps=20, n_steps_per_epoch=20, random_steps=5, **QUIET)
