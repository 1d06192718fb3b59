"""Inspection finds what is wrong with a dataset, and nothing where nothing is; episodes and their returns."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from requirements import data_of_others
from tensordict import TensorDict

from iql_plugins.data import DatasetError, dataset, inspection, load_dataset
from iql_plugins.data.episodes import episode_ends, episode_lengths, episode_numbers, episode_returns
from iql_plugins.data.inspection import SEVERITIES, Finding, inspect
from iql_plugins.spaces import Box, Discrete, Spaces


def healthy(lengths: tuple[int, ...] = (5, 9, 20, 20), ends: str = "TTcc", seed: int = 0) -> TensorDict:
    """Episodes that end terminated (T) or cut (c), of which nothing is to be said."""
    random = torch.Generator("cpu").manual_seed(seed)
    rows = sum(lengths)
    last = torch.tensor(lengths, device="cpu").cumsum(0) - 1
    done = torch.zeros(rows, 1, dtype=torch.bool, device="cpu")
    done[last] = True
    terminated = done.clone()
    terminated[last] = torch.tensor([end == "T" for end in ends], device="cpu").unsqueeze(-1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device="cpu")

    observation, following = normal(rows, 3), normal(rows, 3)
    inside = (~done[:-1, 0]).nonzero().squeeze(-1)
    following[inside] = observation[inside + 1]
    return TensorDict(
        {
            "observation": observation,
            "action": normal(rows, 2).tanh() * 0.9,
            "next": {
                "observation": following,
                "reward": normal(rows, 1) + 50,
                "done": done,
                "terminated": terminated,
            },
        },
        [rows],
    )


def findings(source: Any, **options: Any) -> dict[str, Finding]:
    report = inspect(source, **options)
    for finding in report.findings:
        assert finding.message
        assert finding.suggestion
        assert "\n" not in finding.message + finding.suggestion
    return {finding.code: finding for finding in report.findings}


def test_nothing_is_found_in_a_healthy_dataset() -> None:
    assert findings(healthy()) == {}


def test_the_report_counts_and_is_json() -> None:
    data = healthy()
    report = inspect(data)
    assert (report.transitions, report.episodes) == (54, 4)
    assert (report.lengths.mean, report.lengths.min, report.lengths.max) == (13.5, 5, 20)
    sums = [float(part.sum()) for part in data["next", "reward"].double().split([5, 9, 20, 20])]
    assert report.returns.mean == pytest.approx(np.mean(sums))
    assert (report.returns.min, report.returns.max) == pytest.approx((min(sums), max(sums)))
    assert report.shapes["next.observation"] == (3,)
    assert report.dtypes["next.done"] == "bool"
    document = report.as_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document | {"shapes": document["shapes"]}
    assert document["episodes"] == 4


def test_values_that_are_not_finite() -> None:
    data = healthy()
    data["observation"][7, 1] = torch.nan
    data["observation"][30] = torch.inf
    data["next", "reward"][3] = torch.nan
    report = inspect(data)
    found = [finding for finding in report.findings if finding.code == "non-finite"]
    assert [(finding.row, finding.count) for finding in found] == [(7, 2), (3, 1)]
    assert "('next', 'reward')" in found[1].message
    assert json.dumps(report.as_dict(), allow_nan=False)
    with pytest.raises(DatasetError, match="row 7"):
        load_dataset(data)


@pytest.mark.parametrize(
    ("lengths", "ends", "found"),
    [
        ((5, 20, 20, 20), "TTTT", True),
        ((20, 20, 20), "TTT", True),
        ((5, 9, 20), "TTT", False),
        ((5, 20, 20, 20), "TTcc", False),
        ((18, 18, 19, 19, 20, 20), "TTTTTT", False),
        ((1, 1, 1, 1), "TTTT", False),
    ],
)
def test_timeouts_that_are_marked_as_terminals(lengths: tuple[int, ...], ends: str, found: bool) -> None:
    finding = findings(healthy(lengths, ends)).get("timeouts-as-terminals")
    assert (finding is not None) == found
    if finding is not None:
        assert finding.count == 3
        assert finding.row == (24 if lengths[0] == 5 else 19)
        assert "OGBench's files mark the last steps of trajectories: read its 'masks'" in finding.suggestion


def test_terminals_that_are_never_set() -> None:
    assert "no-terminals" in findings(healthy(ends="cccc"))


def test_timeouts_before_the_time_limit() -> None:
    found = findings(healthy((5, 9, 20, 20), "Tccc"))["early-timeouts"]
    assert (found.row, found.count) == (13, 1)


def test_returns_of_parts_of_episodes_are_no_range_to_scale_by() -> None:
    for lengths, advised in (((5, 9, 20, 20), True), ((5, 9, 14, 20), False)):
        data = healthy(lengths, "cccc")
        data["next", "reward"] /= 1000
        assert ("return_range" in findings(data)["reward-scale"].suggestion) == advised


def test_steps_that_are_terminal_and_timed_out(tmp_path: Path) -> None:
    data = healthy()
    arrays = {
        "observations": data["observation"].numpy(),
        "next_observations": data["next", "observation"].numpy(),
        "actions": data["action"].numpy(),
        "rewards": data["next", "reward"].numpy(),
        "terminals": data["next", "terminated"].numpy(),
        "timeouts": (data["next", "done"] & ~data["next", "terminated"]).numpy(),
    }
    np.savez(tmp_path / "d.npz", **arrays)
    assert findings(tmp_path / "d.npz") == {}
    arrays["timeouts"][13] = True
    np.savez(tmp_path / "d.npz", **arrays)
    found = findings(tmp_path / "d.npz")
    assert set(found) == {"terminal-and-timeout"}
    assert (found["terminal-and-timeout"].row, found["terminal-and-timeout"].count) == (13, 1)
    arrays["timeouts"][13] = False
    del arrays["next_observations"]
    np.savez(tmp_path / "d.npz", **arrays)
    assert findings(tmp_path / "d.npz")["missing-final-observations"].count == 2


def test_actions_outside_and_on_the_bounds() -> None:
    data = healthy()
    data["action"][4, 0] = 1.5
    data["action"][6, 1] = -1.25
    data["action"][11, 0] = 1.0
    found = findings(data)
    outside, on = found["actions-outside-bounds"], found["actions-on-bounds"]
    assert (outside.row, outside.count) == (4, 2)
    assert "by up to 0.5" in outside.message
    assert "assumed" in outside.message
    assert (on.row, on.count) == (11, 1)
    assert findings(data, action_low=-2, action_high=[2.0, 2.0]) == {}
    assert "assumed" not in findings(data, action_low=-1, action_high=1)["actions-on-bounds"].message


def test_bounds_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="both or neither"):
        inspect(healthy(), action_low=-1)
    with pytest.raises(ValueError, match=r"action_low must be a number or of shape \[2\]"):
        inspect(healthy(), action_low=[-1, -1, -1], action_high=1)
    with pytest.raises(ValueError, match="below"):
        inspect(healthy(), action_low=1, action_high=-1)


def test_bounds_say_nothing_of_discrete_actions() -> None:
    data = healthy()
    data["action"] = torch.full((54, 1), 7, device="cpu")
    assert findings(data) == {}


def test_what_the_environments_spaces_do_not_have() -> None:
    data = load_dataset("pendulum-v1-sac")
    spaces = Spaces(Box((3,), low=(-1, -1, -8), high=(1, 1, 8)), Box((1,), low=(-2,), high=(2,)))
    assert set(findings(data, spaces=spaces)) == {"no-terminals"}
    for observation in (data["observation"], data["next", "observation"]):
        observation[:, 1] *= 57.3
    found = findings(data, spaces=spaces)
    assert set(found) == {"no-terminals", "observations-outside-bounds", "uneven-scales"}
    assert "feature 1 of 'observation'" in found["observations-outside-bounds"].message
    assert "observations-outside-bounds" not in findings(data)
    data["action"] = (data["action"] > 0).long() + 1
    found = findings(data, spaces=Spaces(spaces.observation, Discrete(2)))
    assert found["actions-outside-bounds"].count == int((data["action"] == 2).sum())
    assert {"actions-outside-bounds", "unused-actions"} <= set(found)


def test_one_value_that_is_far_out() -> None:
    data = load_dataset("pendulum-v1-sac")
    data["next", "reward"][777] = -1e6
    data["action"][[30, 40]] = 1e6
    report = inspect(data)
    found = [(finding.row, finding.count) for finding in report.findings if finding.code == "outliers"]
    assert found == [(30, 2), (777, 1)]


def test_ends_after_which_the_episode_goes_on() -> None:
    data = load_dataset("pendulum-v1-sac")
    data["next", "done"][[50, 450]] = True
    data["next", "terminated"][450] = True
    found = findings(data)["continued-episodes"]
    assert (found.row, found.count) == (50, 2)
    assert "1 of them terminated" in found.message


def trajectories(parts: int = 10, steps: int = 1000, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A point that is pushed from goal to goal, by the columns of a file; ``goals`` are those of each step."""
    random = np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    for _ in range(parts):
        place, velocity, goal = random.uniform(-2, 2, 2), np.zeros(2), random.uniform(-2, 2, 2)
        for step in range(steps):
            action = (goal - place - velocity + 0.5 * random.standard_normal(2)).clip(-1, 1)
            state = np.concatenate([place, velocity])
            velocity = 0.9 * velocity + 0.1 * action
            place = place + 0.3 * velocity
            reached = bool(np.linalg.norm(goal - place) < 0.2)
            rows.append((state, np.concatenate([place, velocity]), goal, action, reached, step == steps - 1))
            if reached:
                goal = random.uniform(-2, 2, 2)
    names = ("observations", "next_observations", "goals", "actions", "reached", "last")
    return {name: np.array(column, np.float32) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize(("late", "found"), [(0, False), (1, True), (-1, True)])
def test_features_across_goals_that_change_are_shifted_only_if_they_jump(late: int, found: bool) -> None:
    """An episode that goes on from where the one before stopped, with a velocity that is noisy, but for its goal."""
    columns = trajectories()
    goals = np.roll(columns["goals"], late, 0)
    done = columns["reached"] + columns["last"] > 0
    columns = {
        "observations": np.concatenate([columns["observations"], goals], 1),
        "next_observations": np.concatenate(
            [columns["next_observations"], np.where(done[:, None] & (late >= 0), goals, np.roll(goals, -1, 0))], 1
        ),
        "actions": columns["actions"],
        "rewards": columns["reached"],
        "terminals": np.zeros_like(done),
        "timeouts": done,
    }
    data = load_dataset(columns)
    assert ("shifted-features" in findings(data)) == found
    if found:
        assert findings(data)["shifted-features"].count == 2
        assert ("late" in findings(data)["shifted-features"].message) == (late > 0)


@pytest.mark.parametrize(
    ("rewards", "found"), [("of goals", False), ("a row late", True), ("all the same", True), ("of distances", True)]
)
def test_terminals_amid_trajectories_are_those_of_goals_or_too_many(rewards: str, found: bool) -> None:
    """OGBench's masks end the bootstrap wherever a trajectory passes the task's goal."""
    columns = trajectories()
    distance = np.linalg.norm(columns["next_observations"][:, :2], axis=1)
    reached = distance < 0.5
    columns = {
        "observations": columns["observations"],
        "next_observations": columns["next_observations"],
        "actions": columns["actions"],
        "rewards": {
            "of goals": reached - 1.0,
            "a row late": np.roll(reached, 1) - 1.0,
            "all the same": np.ones(len(reached)),
            "of distances": -distance,
        }[rewards],
        "terminals": reached,
        "timeouts": (columns["last"] > 0) & ~reached,
    }
    codes = findings(load_dataset(columns)).keys() & {"continued-episodes", "continued-at-goals"}
    assert codes == {"continued-episodes" if found else "continued-at-goals"}


@pytest.mark.parametrize("late", [0, 1])
def test_what_neighbouring_episodes_share_hides_no_shift(late: int) -> None:
    columns = trajectories(parts=60, steps=40)
    task = (np.arange(2400, dtype=np.float32) // 400)[:, None]
    columns = {
        **{name: np.concatenate([columns[name], task], 1) for name in ("observations", "next_observations")},
        "actions": columns["actions"],
        "rewards": np.roll(-np.linalg.norm(columns["next_observations"][:, :2], axis=1), late),
        "terminals": np.zeros(2400),
        "timeouts": columns["last"],
    }
    assert ("shifted-rewards" in findings(load_dataset(columns))) == bool(late)


def test_data_that_end_within_an_episode() -> None:
    found = findings(healthy()[:-3])["unfinished-episode"]
    assert (found.row, found.count) == (50, 1)


def test_steps_that_are_there_twice() -> None:
    data = load_dataset("pendulum-v1-sac")
    found = findings(torch.cat([data, data[250:300]]))["repeated-rows"]
    assert (found.row, found.count) == (20_000, 1)


def test_features_that_never_change() -> None:
    data = healthy()
    data["observation"][:, 1] = data["next", "observation"][:, 1] = 3.0
    found = findings(data)
    assert set(found) == {"constant-features"}
    assert found["constant-features"].count == 1
    assert found["constant-features"].message.endswith("never change: 1")


@pytest.mark.parametrize(("scale", "found"), [(1.0, False), (100.0, True), (0.01, True), (0.0, True)])
def test_rewards_on_another_scale(scale: float, found: bool) -> None:
    data = healthy()
    data["next", "reward"] *= scale
    finding = findings(data).get("reward-scale")
    assert (finding is not None) == found
    if finding is not None and scale:
        returns = episode_returns(data)
        factor = float(finding.suggestion.split()[3])
        assert factor * float(returns.max() - returns.min()) == pytest.approx(1000, rel=1e-4)


@pytest.mark.parametrize("substitute", ["own", "zeros", "reset"])
def test_final_observations_that_are_missing(substitute: str) -> None:
    data = healthy((5, 20, 20, 9), "TccT")
    cut = [24, 44]
    values = {"own": data["observation"][cut], "zeros": 0.0, "reset": data["observation"][[25, 45]]}
    data["next", "observation"][cut] = values[substitute]
    found = findings(data)
    assert set(found) == {"missing-final-observations"}
    assert (found["missing-final-observations"].row, found["missing-final-observations"].count) == (24, 2)


def test_terminal_states_need_no_final_observation() -> None:
    data = healthy()
    data["next", "observation"][[4, 13]] = 0.0
    assert findings(data) == {}


def test_next_observations_that_are_not_the_next() -> None:
    data = healthy()
    data["next", "observation"][[2, 40]] += 1
    found = findings(data)
    assert set(found) == {"inconsistent-observations"}
    assert (found["inconsistent-observations"].row, found["inconsistent-observations"].count) == (2, 2)


def test_episodes_that_are_there_twice() -> None:
    data = healthy()
    again = torch.cat([data, data[5:14], data[:5], healthy((20,), "c", seed=1)])
    found = findings(again)
    assert set(found) == {"duplicate-episodes"}
    assert (found["duplicate-episodes"].row, found["duplicate-episodes"].count) == (54, 2)
    again["action"][54, 0] += 0.01
    assert findings(again)["duplicate-episodes"].row == 63
    reversed_steps = torch.cat([data, data[:5].clone()])
    reversed_steps["observation"][54:] = data["observation"][:5].flip(0)
    assert "duplicate-episodes" not in findings(reversed_steps)


def test_dict_and_image_observations() -> None:
    data = healthy()
    image = torch.zeros(54, 3, 4, 4, dtype=torch.uint8, device="cpu")
    data["observation"] = TensorDict({"place": data["observation"], "image": image}, [54])
    data["next", "observation"] = TensorDict({"place": data["next", "observation"], "image": image.clone()}, [54])
    assert findings(data) == {}
    data["next", "observation", "image"][7] = 1
    assert findings(data)["inconsistent-observations"].row == 7


def test_a_chunk_at_a_time_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.cat([healthy((5, 20, 20, 9), "TccT"), healthy((5, 20, 20, 9), "TccT")])
    data["observation"][70] = torch.nan
    data["action"][50] = 2.0
    data["next", "observation"][[24, 44]] = 0.0
    expected = inspect(data)
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 30)
    assert inspect(data).findings == expected.findings
    assert len(expected.findings) >= 4


def test_a_buffer_that_does_not_record_timeouts() -> None:
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    spaces = pytest.importorskip("gymnasium").spaces
    box = spaces.Box(-1, 1, (1,), np.float32)
    for records in (True, False):
        buffer = buffers.ReplayBuffer(10, box, box, "cpu", handle_timeout_termination=records)
        for step in range(6):
            observation = np.full((1, 1), step / 10)
            infos = [{"TimeLimit.truncated": step == 3}]
            done = np.array([step == 3])
            buffer.add(observation, observation + 0.1, np.zeros((1, 1)), np.ones(1), done, infos)
        found = findings(buffer)
        assert ("timeouts-as-terminals" in found) == (not records)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_dataset_of_hardly_a_step(rows: int) -> None:
    assert inspect(healthy()[:rows]).episodes == 1


def test_unknown_sources_are_named() -> None:
    with pytest.raises(DatasetError, match="there is no dataset, file or folder 'nothing'"):
        inspect("nothing")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("reagent_pendulum_mixed", {"action_low": -2, "action_high": 2}, {"no-terminals", "actions-outside-bounds"}),
        ("reagent_cartpole_mixed", {}, set()),
        ("tianshou_cartpole_qrdqn", {}, {"early-timeouts"}),
        ("d4rl_regen_door-human-v1", {}, {"no-terminals", "early-timeouts", "actions-on-bounds"}),
    ],
)
def test_what_is_known_to_be_wrong_with_real_datasets(name: str, options: Any, expected: set[str]) -> None:
    found = findings(data_of_others(name), **options)
    assert set(found) == expected
    if name == "reagent_pendulum_mixed":
        assert found["actions-outside-bounds"].count == 5933
        assert "by up to 1.39" in found["actions-outside-bounds"].message


def test_the_dataset_that_ships_is_healthy() -> None:
    assert set(findings("pendulum-v1-sac")) == {"no-terminals"}


def test_episodes_end_where_done_is_set_and_at_the_end() -> None:
    data = healthy((2, 3, 1), "TcT")
    data["next", "done"][5] = data["next", "terminated"][5] = False
    data["next", "reward"][:] = torch.tensor([1.0, 2, 3, 4, 5, 6], device="cpu").unsqueeze(-1)
    assert episode_ends(data).tolist() == [1, 4, 5]
    assert episode_lengths(data).tolist() == [2, 3, 1]
    assert episode_numbers(data).tolist() == [0, 0, 1, 1, 1, 2]
    assert episode_returns(data).tolist() == [3.0, 12.0, 6.0]
    assert not data["next", "done"][5]


@pytest.mark.parametrize(("factor", "found"), [(29.0, False), (31.0, True), (1 / 31, True), (0.0, False)])
def test_scales_are_uneven_from_a_factor_of_30_on(factor: float, found: bool) -> None:
    data = healthy((50, 50, 50, 50))
    for tensors in (data, data["next"]):
        tensors["observation"] = tensors["observation"] - data["observation"].mean(0)
    deviation = data["observation"].double().std(0, unbiased=False)
    for tensors in (data, data["next"]):
        tensors["observation"] = tensors["observation"] / deviation.float() * torch.tensor([1.0, 1.0, factor])
    [*findings] = (finding for finding in inspect(data).findings if finding.code == "uneven-scales")
    assert bool(findings) == found
    if found:
        assert findings[0].message.endswith("a factor of 31")
        assert "--normalize-observations" in findings[0].suggestion


def test_rounding_and_pixels_have_no_scale() -> None:
    data = healthy((50, 50, 50, 50))
    for tensors in (data, data["next"]):
        tensors["observation"][:, 2] = 1.0 + 1e-7 * (torch.arange(len(data), device="cpu") % 2)
    assert "uneven-scales" not in findings(data)
    for tensors in (data, data["next"]):
        tensors["observation"] = torch.rand(200, 2, 2, 1, device="cpu") * torch.tensor([1.0, 1e-3]).reshape(1, 2, 1, 1)
    assert "uneven-scales" not in findings(data)


def test_one_bad_reward_spoils_one_return() -> None:
    data = healthy((2, 3), "Tc")
    data["next", "reward"][1] = torch.nan
    assert episode_returns(data).isfinite().tolist() == [False, True]


def test_every_code_has_one_severity_and_is_in_the_documentation() -> None:
    sources = "".join(path.read_text() for path in Path(inspection.__file__).parent.glob("*.py"))
    used = set(re.findall(r'Finding\(\s*"([a-z-]+)"', sources)) | set(re.findall(r'code = "([a-z-]+)"', sources))
    documented = set(re.findall(r"``([a-z-]+)`` ", inspect.__doc__ or ""))
    declared = [code for codes in SEVERITIES.values() for code in codes]
    assert len(declared) == len(set(declared))
    assert documented == set(declared)
    assert used <= set(declared)
    assert len(used) > 25


def test_findings_are_told_by_how_much_they_matter() -> None:
    data = healthy(ends="cccc")
    data["next", "reward"][2] = torch.nan
    report = inspect(data)
    severities = {finding.code: finding.severity for finding in report.findings}
    assert severities["no-terminals"] == "note"
    assert severities["non-finite"] == "error"
    assert [finding.code for finding in report.findings_from("error")] == ["non-finite"]
    assert set(report.findings_from("note")) == set(report.findings)
    assert {entry["code"]: entry["severity"] for entry in report.as_dict()["findings"]} == severities
