"""A hundred ways to spoil real datasets: what inspection finds of them, and why nobody finds the others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from requirements import data_of_others
from spoiled import SPOILINGS, Columns

from iql_plugins import data
from iql_plugins.data.inspection import Finding, inspect
from iql_plugins.spaces import Box, Discrete, Spaces

FOLDERS = {"pendulum-v1-sac": Path(data.__file__).parent / "datasets"}

PENDULUM = Spaces(Box((3,), low=(-1.0, -1.0, -8.0), high=(1.0, 1.0, 8.0)), Box((1,), low=(-2.0,), high=(2.0,)))
CARTPOLE = Spaces(Box((4,)), Discrete(2))
DOOR = Spaces(Box((39,)), Box((28,), low=(-1.0,) * 28, high=(1.0,) * 28))

#: By dataset: the spaces that its environment has, and what is true of it as it is.
DATASETS: dict[str, tuple[Spaces, set[str]]] = {
    "pendulum-v1-sac": (PENDULUM, {"no-terminals"}),
    "reagent_pendulum_mixed": (PENDULUM, {"no-terminals", "actions-outside-bounds"}),
    "reagent_cartpole_mixed": (CARTPOLE, set()),
    "tianshou_cartpole_qrdqn": (CARTPOLE, {"early-timeouts"}),
    "d4rl_regen_door-human-v1": (DOOR, {"no-terminals", "early-timeouts", "actions-on-bounds"}),
}

RELABELLED = "a relabelling: these are the data of another environment, {}, in which all of them are right"
#: What is not found in any dataset.
NOWHERE = {
    "time_runs_backwards": "mechanics run backwards as well as forwards: each step is one, and a reward of a state "
    "stays one",
    "the_last_row_of_episodes_is_lost_and_the_one_before_is_the_end": "an episode that ends a step earlier is one; "
    "whether its last state is terminal is for the rules to say",
    "the_first_row_of_episodes_is_lost": "an episode that begins a step later is one",
    "a_feature_is_measured_a_step_late": RELABELLED.format("whose sensor is a step late"),
    "actions_are_the_opposite": RELABELLED.format("whose motor turns the other way"),
    "rewards_are_those_of_the_opposite_task": "any sign of a reward is a task's",
    "rewards_are_paid_at_the_end": "a task may pay for everything at its end; the returns are the same",
}
UNBOUNDED = {
    "a_feature_is_in_degrees": RELABELLED.format("whose units are others")
    + "; only bounds of the observation space, which is unbounded here, would tell",
    "columns_are_in_another_order": RELABELLED.format("which lists them so")
    + "; only bounds of the observation space, which is unbounded here, would tell",
}
#: What else is not found, by dataset, and why.
MISSED: dict[str, dict[str, str]] = {
    "pendulum-v1-sac": {},
    "reagent_pendulum_mixed": {},
    "reagent_cartpole_mixed": UNBOUNDED,
    "tianshou_cartpole_qrdqn": UNBOUNDED,
    "d4rl_regen_door-human-v1": UNBOUNDED
    | {
        "every_second_timeout_is_terminal": "three ends at step 300, of 25: three tasks may well take as long",
        "a_feature_is_in_degrees_from_the_half_on": "without velocities, steps explain less than half of what a joint "
        "does; and a hand may well move it further in later episodes",
        "the_second_agents_actions_are_a_row_late": "they are the fingers', which follow their commands in the course "
        "of ten steps: the row before explains a command as well as its own, to 5%, also in the original",
    },
}


def original(name: str) -> Columns:
    path = FOLDERS[name] / f"{name}.npz" if name in FOLDERS else data_of_others(name)
    return {key: column.astype(np.float32) for key, column in np.load(path).items()}


def differ(one: Columns, other: Columns) -> bool:
    return one.keys() != other.keys() or not all(np.array_equal(one[key], other[key], equal_nan=True) for key in one)


def codes(columns: Columns, spaces: Spaces, folder: Path) -> set[str]:
    np.savez(folder / "data.npz", **columns)
    return {finding.code for finding in described(folder / "data.npz", spaces)}


def described(source: Any, spaces: Spaces | None = None) -> tuple[Finding, ...]:
    found = inspect(source, spaces=spaces, discrete=None if spaces is None else spaces.discrete).findings
    for finding in found:
        assert finding.message
        assert finding.suggestion
        assert "\n" not in finding.message + finding.suggestion
    return found


def test_there_are_more_than_sixty_ways() -> None:
    assert len(SPOILINGS) >= 60
    assert not set().union(*MISSED.values(), NOWHERE) - SPOILINGS.keys()


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.slow
def test_of_what_was_spoiled_all_is_found_but_what_nobody_can_find(name: str, tmp_path: Path) -> None:
    """Found is what gets a finding that says what is wrong, under a code that the original has no finding of.

    What changes nothing in a dataset (it has no terminals to lose, all of its rewards are equal) is not counted.
    """
    spaces, known = DATASETS[name]
    columns = original(name)
    assert codes(columns, spaces, tmp_path) == known
    applied, missed = 0, set()
    for way, spoiling in SPOILINGS.items():
        copy = {key: column.copy() for key, column in columns.items()}
        spoiled = spoiling.spoil(copy, np.random.default_rng(0))
        if differ(spoiled, columns):
            applied += 1
            if not (codes(spoiled, spaces, tmp_path) - known) & set(spoiling.codes):
                missed.add(way)
    assert missed == NOWHERE.keys() | MISSED[name].keys()
    assert applied >= 60
    assert len(missed) <= 0.15 * applied
