"""Datasets that anyone can make again: the same bytes, whatever happened on the way, and what a file says of itself."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from iql_plugins import load_dataset, read_dataset
from iql_plugins.cli import main, make_dataset, rollouts
from iql_plugins.cli.recipes import RECIPES, classic, locomotion, mazes
from iql_plugins.cli.recipes.recipe import Columns, Parts, Rows
from iql_plugins.cli.workers import locked
from iql_plugins.data import Dataset
from iql_plugins.spaces import Box, Discrete, Spaces

Make = Callable[..., dict[str, Any]]
#: Each small enough for a test.
SMALL = ("pendulum-mixed", "cartpole-mixed", "pointmaze-umaze", "pointmaze-medium-dense", "ogbench-pointmaze-navigate",
         "ogbench-pointmaze-stitch", "hopper-medium", "hopper-replay")  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classic, "_EPISODES", {"Pendulum-v1": 1, "CartPole-v1": 2})
    for module, name, value in (
        (mazes, "_POINTMAZE_PARTS", 2), (mazes, "_POINTMAZE_ROWS", 400),
        (mazes, "_OGBENCH_PARTS", 2), (mazes, "_OGBENCH_SIZES", {"navigate": (1, 300), "stitch": (2, 150)}),
        (locomotion, "_CHUNK", 110), (locomotion, "_EVALUATION_EPISODES", 1),
        (locomotion, "_ROLLOUT_PARTS", 2), (locomotion, "_ROLLOUT_ROWS", 30),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def make(capfd: pytest.CaptureFixture[str]) -> Make:
    """Makes a dataset in this process; what it prints."""

    def call(name: str, out: Path, *arguments: str) -> dict[str, Any]:
        capfd.readouterr()
        status = main(["make-dataset", name, "--out", str(out), "--json", *arguments])
        document: dict[str, Any] = json.loads(capfd.readouterr().out)
        return document | {"status": status}

    return call


def short(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAC stops after three chunks, wherever it is by then."""
    if not recipe.startswith("hopper"):
        return
    real = locomotion._chunk

    def chunk(task: Any, seed: int, number: int, parts: Parts) -> Columns:
        return {**real(task, seed, number, parts), "mean_return": np.array(1500.0 if number == 2 else 0.0)}

    monkeypatch.setattr(locomotion, "_chunk", chunk)


def without(columns: dict[str, np.ndarray[Any, Any]], *names: str) -> dict[str, np.ndarray[Any, Any]]:
    return {name: rows for name, rows in columns.items() if name not in names}


@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.slow
def test_whoever_is_interrupted_after_any_part_ends_with_the_same_bytes(
    recipe: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short(recipe, monkeypatch)
    whole = make(recipe, tmp_path / "whole")
    assert whole["status"] == 0
    write = make_dataset.checkpoint.write_bytes

    def interrupted(path: Path, content: bytes) -> None:
        write(path, content)
        raise KeyboardInterrupt

    folder, calls = tmp_path / "interrupted", 0
    file = folder / f"{recipe}-0.npz"
    while not file.exists():
        with monkeypatch.context() as patch:
            # What is written goes on being there; what comes next is not done.
            patch.setattr(make_dataset.checkpoint, "write_bytes", interrupted)
            assert make(recipe, folder)["status"] == 130
        # The caller's random state does not matter.
        np.random.seed(calls)
        torch.manual_seed(calls)
        calls += 1
        assert calls < 20
    assert calls >= 3
    again = make(recipe, folder)
    assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    assert again["file_sha256"] == whole["file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("recipe", SMALL)
def test_a_dataset_is_read_with_its_spaces_and_its_environment(
    recipe: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short(recipe, monkeypatch)
    made = make(recipe, tmp_path, "--seed", "3")
    dataset = read_dataset(made["file"])
    assert dataset.env == RECIPES[recipe].env == made["env"]
    with gymnasium.make(made["env"]) as env:
        assert dataset.spaces == Spaces.from_gymnasium(env.observation_space, env.action_space)
        dataset.spaces.check(dataset.tensors)
        low, high = getattr(env.action_space, "low", 0), getattr(env.action_space, "high", 1)
    action = dataset.tensors["action"].numpy()
    assert (action >= low).all()
    assert (action <= high).all()
    assert len(dataset.tensors) == made["transitions"]
    assert (made["recipe"], made["seed"]) == (recipe, 3)
    assert made["versions"]["numpy"] == np.__version__
    # Each row's next observation is where the next row begins, but where an episode ends.
    goes_on = ~dataset.tensors["next", "done"].squeeze(-1)[:-1]
    keys = [key for key in dataset.tensors.keys(True, True) if "observation" in key and "next" not in key]
    for key in keys or [("observation", "observation")]:
        path = key if isinstance(key, tuple) else (key,)
        first, following = dataset.tensors[key][1:], dataset.tensors[("next", *path)][:-1]
        assert torch.equal(first[goes_on], following[goes_on])


def test_seeds_are_datasets_of_their_own(make: Make, tmp_path: Path) -> None:
    one, two = (make("pendulum-mixed", tmp_path, "--seed", seed) for seed in ("0", "1"))
    assert one["sha256"] != two["sha256"]
    assert len(list(tmp_path.iterdir())) == 2


def test_returns_are_those_of_the_rows(make: Make, tmp_path: Path) -> None:
    made = make("cartpole-mixed", tmp_path)
    with np.load(made["file"]) as file:
        ends = file["terminals"] | file["timeouts"]
        assert made["episodes"] == ends.sum() == 10
        # A step of CartPole is worth 1.
        assert made["returns"]["mean"] == len(ends) / 10
        assert set(file["actions"].tolist()) == {0, 1}
    assert not load_dataset(made["file"])["action"].is_floating_point()


def test_a_second_call_finds_the_file_and_another_one_in_its_place_is_an_error(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make("pendulum-mixed", tmp_path)
    modified = Path(first["file"]).stat().st_mtime_ns
    assert make("pendulum-mixed", tmp_path) == first
    assert Path(first["file"]).stat().st_mtime_ns == modified
    monkeypatch.setattr(make_dataset, "_versions", lambda: {"numpy": "0"})
    assert "was made by something else: move it" in make("pendulum-mixed", tmp_path)["error"]
    assert Path(first["file"]).stat().st_mtime_ns == modified


def test_a_file_whose_numbers_were_changed_is_not_vouched_for(make: Make, tmp_path: Path) -> None:
    file = Path(make("pendulum-mixed", tmp_path)["file"])
    with np.load(file) as content:
        columns = dict(content)
    columns["rewards"][0] += 1.0
    np.savez_compressed(file, **columns)
    assert "was made by something else: move it" in make("pendulum-mixed", tmp_path)["error"]


def test_parts_that_a_kill_has_left_go_with_the_next_call(make: Make, tmp_path: Path) -> None:
    make("pendulum-mixed", tmp_path)
    (tmp_path / ".pendulum-mixed-0").mkdir()
    (tmp_path / ".pendulum-mixed-0" / "random-0.1.npz").write_bytes(b"")
    assert make("pendulum-mixed", tmp_path)["status"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pendulum-mixed-0.npz"]


def test_what_a_kill_amid_the_last_write_has_left_goes_with_the_next_call(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make("pendulum-mixed", tmp_path / "whole")

    def killed(temporary: Path, target: Path) -> None:
        if Path(target).parent == tmp_path / "killed":
            Path(target).with_name(f".{Path(target).name}.0123abcd.tmp").write_bytes(b"half of it")
            raise KeyboardInterrupt
        real(temporary, target)

    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert make("pendulum-mixed", tmp_path / "killed")["status"] == 130
    assert len(list((tmp_path / "killed").glob("*.tmp"))) == 1
    other = tmp_path / "killed" / ".other-0.npz.0123abcd.tmp"
    other.write_bytes(b"of another process")
    assert make("pendulum-mixed", tmp_path / "killed")["file_sha256"] == whole["file_sha256"]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [other.name, "pendulum-mixed-0.npz"]


@pytest.mark.parametrize("out", ["file", "file/folder"])
def test_a_file_is_no_folder_to_make_a_dataset_in(out: str, make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    document = make("pendulum-mixed", tmp_path / out)
    assert document["status"] == 2
    assert document["error"].startswith("--out must be a folder, or the path of a new one, got ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_part_that_cannot_be_read_is_made_again(make: Make, tmp_path: Path) -> None:
    whole = make("pendulum-mixed", tmp_path / "whole")
    work = tmp_path / "again" / ".pendulum-mixed-0"
    work.mkdir(parents=True)
    (work / "versions.json").write_text(json.dumps(make_dataset._versions()))
    (work / "random-0.1.npz").write_bytes(b"half of a part")
    assert make("pendulum-mixed", tmp_path / "again")["file_sha256"] == whole["file_sha256"]


def test_two_calls_do_not_make_one_dataset(make: Make, tmp_path: Path) -> None:
    (tmp_path / ".pendulum-mixed-0").mkdir()
    with locked(tmp_path / ".pendulum-mixed-0"):
        assert "another process is making a dataset in" in make("pendulum-mixed", tmp_path)["error"]


def test_parts_of_other_versions_are_made_anew(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make("pendulum-mixed", tmp_path / "whole")
    work = tmp_path / "again" / ".pendulum-mixed-0"
    work.mkdir(parents=True)
    (work / "versions.json").write_text("{}")
    (work / "random-0.1.npz").write_bytes(b"of another version")
    assert make("pendulum-mixed", tmp_path / "again")["file_sha256"] == whole["file_sha256"]
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["pendulum-mixed-0.npz"]


def test_the_list_names_every_recipe_and_what_it_needs(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["make-dataset", "--json"]) == 0
    recipes = json.loads(capfd.readouterr().out)["recipes"]
    assert [entry["name"] for entry in recipes] == list(RECIPES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pendulum-mixd"], "there is no recipe 'pendulum-mixd': did you mean 'pendulum-mixed'?"),
        (["pendulum-mixed", "--seed", "-1"], "--seed must be at least 0, got -1"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, make: Make, tmp_path: Path) -> None:
    name, *others = arguments
    document = make(name, tmp_path, *others)
    assert document["status"] == 2
    assert words in document["error"]


def test_a_missing_package_is_named_before_anything_is_made(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = make_dataset.importlib.util.find_spec
    monkeypatch.setattr(
        make_dataset.importlib.util, "find_spec", lambda name: None if name == "ogbench" else find(name)
    )
    document = make("ogbench-pointmaze-stitch", tmp_path / "folder")
    assert document["error"].endswith("not installed: pip install 'iql-plugins[benchmarks]'")
    assert not (tmp_path / "folder").exists()


def test_a_training_that_does_not_come_to_its_return_says_how_far_it_came(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locomotion, "_MOST_CHUNKS", 2)
    monkeypatch.setattr(locomotion, "_chunk", lambda *_: {"mean_return": np.array(7.0)})
    error = make("walker2d-replay", tmp_path)["error"]
    assert error == "SAC came to a mean return of 7 so far in 220 steps, and not to 2500: take another --seed"


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_is_gone_on_with(tmp_path: Path) -> None:
    def start(folder: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "iql_plugins.cli", "make-dataset", "pendulum-mixed", "--out", folder]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)

    assert start(str(tmp_path / "whole")).wait() == 0
    seconds = 2.0
    while (process := start(str(tmp_path / "killed"))).poll() is None:
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            break
        seconds += 1.0
    name = "pendulum-mixed-0.npz"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_way_through_a_maze_is_the_shortest() -> None:
    free = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 1]], dtype=bool)
    np.testing.assert_array_equal(mazes.distances(free, (2, 0)), [[2, 3, 4], [1, -1, 5], [0, -1, 6]])


def test_a_hallway_has_walls_on_two_opposite_sides() -> None:
    free = np.zeros((5, 5), dtype=bool)
    free[1, 1:4] = free[2, 3] = free[3, 3] = True
    assert [mazes._is_hallway(free, cell) for cell in ((1, 1), (1, 2), (1, 3), (2, 3), (3, 3))] == [
        False, True, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(("controller", "env", "least"), [
    (classic.swing_up, "Pendulum-v1", -400.0), (classic.balance, "CartPole-v1", 450.0),
])  # fmt: skip
def test_the_controllers_are_good_ones(controller: Callable[[Any], Any], env: str, least: float) -> None:
    totals = []
    with gymnasium.make(env) as made:
        for seed in range(10):
            observation, _ = made.reset(seed=seed)
            total, ended = 0.0, False
            while not ended:
                observation, reward, terminated, truncated, _ = made.step(controller(observation))
                total, ended = total + float(reward), terminated or truncated
            totals.append(total)
    assert np.mean(totals) > least


def test_a_step_that_is_terminal_is_no_time_out() -> None:
    rows = Rows()
    rows.add(np.zeros(2), 1, 0.5, np.ones(2), terminal=True, timeout=True)
    columns = rows.columns()
    assert (columns["terminals"].tolist(), columns["timeouts"].tolist()) == ([True], [False])
    assert (columns["actions"].dtype, columns["rewards"].dtype) == (np.int64, np.float32)


def test_goals_of_a_point_maze_are_reached_and_stayed_at(make: Make, tmp_path: Path) -> None:
    made = make("pointmaze-umaze", tmp_path)
    with np.load(made["file"]) as file:
        at_goal = (
            np.linalg.norm(file["next_observations/achieved_goal"] - file["observations/desired_goal"], axis=1) <= 0.45
        )
        np.testing.assert_array_equal(file["rewards"], at_goal)
        ends = np.flatnonzero(file["timeouts"])
        assert file["rewards"][ends[0] - 1 : ends[0] + 1].tolist() == [1.0, 1.0]
        assert not file["terminals"].any()
        # The goal is the same for all of an episode.
        assert (np.diff(file["observations/desired_goal"][: ends[0] + 1], axis=0) == 0).all()


def test_ogbenchs_rewards_are_those_of_the_mazes_default_task(make: Make, tmp_path: Path) -> None:
    made = make("ogbench-pointmaze-navigate", tmp_path)
    with gymnasium.make(made["env"]) as env:
        env.reset(seed=0)
        goal, tolerance = np.array(env.unwrapped.cur_goal_xy), env.unwrapped._goal_tol
    with np.load(made["file"]) as file:
        there = np.linalg.norm(file["observations"][:, :2] - goal, axis=1) <= tolerance
        np.testing.assert_array_equal(file["rewards"], there - 1.0)
        np.testing.assert_array_equal(file["terminals"], there)
        assert file["timeouts"].sum() == 2


@pytest.mark.parametrize(
    "metadata",
    [
        np.array("no JSON"),
        np.array(json.dumps("a string")),
        np.array(json.dumps({"spaces": {"observation": 1, "action": []}, "env": "Pendulum-v1"})),
        np.array("[" * 100_000),
        np.array('{"recipe": ' + "[" * 20 + "]" * 20 + "}"),
        np.array(["{}", "{}"]),
        np.arange(3),
        np.array("0" * 2**20),
    ],
)
def test_metadata_of_others_say_nothing(metadata: Any, tmp_path: Path) -> None:
    dataset = described(metadata, tmp_path)
    assert (len(dataset.tensors), dataset.spaces, dataset.env) == (3, None, None)
    assert set(dataset.provenance) <= {"spaces", "env"}


def test_metadata_are_taken_for_data_that_they_fit(tmp_path: Path) -> None:
    right = Spaces(Box((2,)), Box((1,), low=(-1.0,), high=(1.0,)))
    dataset = described(np.array(json.dumps({"spaces": right.to_json(), "env": "Any-v0"})), tmp_path)
    assert (dataset.spaces, dataset.env) == (right, "Any-v0")
    assert dataset.provenance == {"spaces": right.to_json(), "env": "Any-v0"}
    for spaces, env in ((right, ["Any-v0"]), (Spaces(Box((7,)), right.action), "Any-v0"),
                        (Spaces(right.observation, Discrete(3)), "Any-v0")):  # fmt: skip
        dataset = described(np.array(json.dumps({"spaces": spaces.to_json(), "env": env})), tmp_path)
        assert (dataset.spaces, dataset.env) == (None, None)


def described(metadata: Any, folder: Path) -> Dataset:
    rows = Rows()
    for _ in range(3):
        rows.add(np.zeros(2), [0.5], 1.0, np.ones(2), terminal=False, timeout=True)
    np.savez_compressed(folder / "data.npz", metadata=metadata, **rows.columns())  # type: ignore[arg-type]
    return read_dataset(folder / "data.npz")


@pytest.mark.parametrize(
    ("env", "package"),
    [
        ("PointMaze_Open_Diverse_GR-v3", "gymnasium_robotics"),
        ("humanoidmaze-giant-singletask-task3-v0", "ogbench"),
        # D4RL's, and nobody's.
        ("antmaze-medium-play-v2", None),
        ("pointmaze", None),
    ],
)
def test_known_ids_name_their_package(env: str, package: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(gymnasium, "registry", {})
    real = rollouts.imported

    def imported(module: str, extra: str = "cli") -> Any:
        if extra != "benchmarks":
            return real(module, extra)
        asked.append(module)
        return None

    monkeypatch.setattr(rollouts, "imported", imported)
    rollouts._register(env)
    assert asked == ([] if package is None else [package])
