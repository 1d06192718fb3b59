"""Ways to spoil a dataset: a table, by name, of what was done to its columns and of the findings that would be right.

Each function takes the columns of a file as D4RL names them, and a generator, and returns spoiled columns. It may
change what it is given, which is a copy. Where a way changes nothing (there are no terminals to lose, all rewards are
equal), it does not apply.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Columns = dict[str, Array]
Function = Callable[[Columns, np.random.Generator], Columns]

FLAGS = ("terminals", "timeouts")


@dataclass(frozen=True)
class Spoiling:
    """One way.

    Attributes:
        spoil: does it.
        codes: of findings any of which says what is wrong.
    """

    spoil: Function
    codes: tuple[str, ...]


SPOILINGS: dict[str, Spoiling] = {}


def found_as(*codes: str) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        SPOILINGS[function.__name__] = Spoiling(function, codes)
        return function

    return add


def take(columns: Columns, rows: Array) -> Columns:
    return {key: column[rows] for key, column in columns.items()}


def done(columns: Columns) -> Array:
    return (columns["terminals"] + columns["timeouts"]).astype(bool)


def ends(columns: Columns) -> Array:
    return np.flatnonzero(done(columns))


def starts(columns: Columns) -> Array:
    return np.concatenate([[0], ends(columns)[:-1] + 1])


def episodes(columns: Columns) -> list[Array]:
    return [np.arange(start, end + 1) for start, end in zip(starts(columns), ends(columns), strict=True)]


def half(columns: Columns) -> slice:
    return slice(len(columns["rewards"]) // 2, None)


def a_feature(columns: Columns) -> int:
    return columns["observations"].shape[1] // 2


def both(columns: Columns, change: Callable[[Array], Array]) -> Columns:
    """The same change of observations and next observations."""
    for key in ("observations", "next_observations"):
        columns[key] = change(columns[key])
    return columns


def of_states(columns: Columns, feature: int, values: Array, final: Array) -> Columns:
    """One feature with other values, in next observations as well; ``final`` are those after the last step."""
    columns["observations"][:, feature] = values
    columns["next_observations"][:, feature] = np.append(values[1:], 0)
    columns["next_observations"][ends(columns), feature] = final
    return columns


def continuous(columns: Columns) -> bool:
    return columns["actions"].ndim > 1 and not bool((columns["actions"] == columns["actions"].round()).all())


# Rows


@found_as("inconsistent-observations")
def rows_are_shuffled(columns: Columns, random: np.random.Generator) -> Columns:
    return take(columns, random.permutation(len(columns["rewards"])))


@found_as("inconsistent-observations")
def rows_are_shuffled_within_episodes(columns: Columns, random: np.random.Generator) -> Columns:
    rows = np.concatenate([random.permutation(rows) for rows in episodes(columns)])
    return take(columns, rows) | {key: columns[key] for key in FLAGS}


@found_as("inconsistent-observations")
def blocks_of_rows_are_shuffled(columns: Columns, random: np.random.Generator) -> Columns:
    blocks = np.array_split(np.arange(len(columns["rewards"])), len(columns["rewards"]) // 32)
    return take(columns, np.concatenate([blocks[index] for index in random.permutation(len(blocks))]))


@found_as("inconsistent-observations")
def rows_are_in_reverse(columns: Columns, random: np.random.Generator) -> Columns:
    return take(columns, np.arange(len(columns["rewards"]))[::-1])


@found_as("shifted-actions", "shifted-rewards")
def time_runs_backwards(columns: Columns, random: np.random.Generator) -> Columns:
    backwards = take(columns, np.concatenate([rows[::-1] for rows in episodes(columns)]))
    swapped = {"observations": "next_observations", "next_observations": "observations"}
    return backwards | {key: backwards[other] for key, other in swapped.items()} | {key: columns[key] for key in FLAGS}


@found_as("inconsistent-observations")
def two_collectors_are_interleaved(columns: Columns, random: np.random.Generator) -> Columns:
    return take(columns, np.arange(len(columns["rewards"]) // 2 * 2).reshape(2, -1).T.reshape(-1))


@found_as("inconsistent-observations")
def time_and_collectors_are_transposed(columns: Columns, random: np.random.Generator) -> Columns:
    return take(columns, np.arange(len(columns["rewards"]) // 8 * 8).reshape(-1, 8).T.reshape(-1))


@found_as("inconsistent-observations")
def every_row_is_there_twice(columns: Columns, random: np.random.Generator) -> Columns:
    return take(columns, np.repeat(np.arange(len(columns["rewards"])), 2))


@found_as("inconsistent-observations")
def one_row_in_a_hundred_is_there_twice(columns: Columns, random: np.random.Generator) -> Columns:
    times = np.ones(len(columns["rewards"]), int)
    times[5::100] = 2
    return take(columns, np.repeat(np.arange(len(times)), times))


@found_as("duplicate-episodes")
def the_whole_dataset_is_there_twice(columns: Columns, random: np.random.Generator) -> Columns:
    return {key: np.concatenate([column, column]) for key, column in columns.items()}


@found_as("duplicate-episodes")
def an_episode_is_there_twice(columns: Columns, random: np.random.Generator) -> Columns:
    rows = [*episodes(columns), episodes(columns)[3]]
    return take(columns, np.concatenate(rows))


@found_as("repeated-rows")
def a_part_of_an_episode_is_there_twice(columns: Columns, random: np.random.Generator) -> Columns:
    longest = max(episodes(columns), key=len)
    part = take(columns, longest[len(longest) // 3 : len(longest) // 2])
    part["timeouts"][-1] = 1
    return {key: np.concatenate([column, part[key]]) for key, column in columns.items()}


@found_as("repeated-rows")
def the_last_row_of_episodes_is_there_twice(columns: Columns, random: np.random.Generator) -> Columns:
    return take(columns, np.repeat(np.arange(len(columns["rewards"])), 1 + done(columns)))


@found_as("inconsistent-observations")
def the_last_row_of_episodes_is_lost(columns: Columns, random: np.random.Generator) -> Columns:
    return take(columns, np.flatnonzero(~done(columns)))


@found_as("terminals-as-timeouts", "timeouts-as-terminals", "early-timeouts")
def the_last_row_of_episodes_is_lost_and_the_one_before_is_the_end(
    columns: Columns, random: np.random.Generator
) -> Columns:
    last = ends(columns)
    for key in FLAGS:
        columns[key][last - 1] = columns[key][last]
    return take(columns, np.setdiff1d(np.arange(len(columns["rewards"])), last))


@found_as("shifted-features", "repeated-rows")
def the_first_row_of_episodes_is_lost(columns: Columns, random: np.random.Generator) -> Columns:
    return take(columns, np.setdiff1d(np.arange(len(columns["rewards"])), starts(columns)))


@found_as("inconsistent-observations")
def every_second_row_is_lost(columns: Columns, random: np.random.Generator) -> Columns:
    return take(columns, np.arange(0, len(columns["rewards"]), 2))


@found_as("inconsistent-observations")
def a_row_is_lost(columns: Columns, random: np.random.Generator) -> Columns:
    return take(columns, np.delete(np.arange(len(columns["rewards"])), ends(columns)[3] - 3))


@found_as("inconsistent-observations")
def two_rows_are_swapped(columns: Columns, random: np.random.Generator) -> Columns:
    rows = np.arange(len(columns["rewards"]))
    row = ends(columns)[3] - 4
    rows[[row, row + 1]] = rows[[row + 1, row]]
    return take(columns, rows)


@found_as("unfinished-episode")
def the_file_is_cut_short(columns: Columns, random: np.random.Generator) -> Columns:
    longest = max(episodes(columns), key=len)
    return take(columns, np.arange(longest[len(longest) // 2]))


# Ends of episodes


@found_as("inconsistent-observations")
def all_ends_are_lost(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {key: np.zeros_like(columns[key]) for key in FLAGS}


@found_as("inconsistent-observations")
def one_end_is_lost(columns: Columns, random: np.random.Generator) -> Columns:
    for key in FLAGS:
        columns[key][ends(columns)[3]] = 0
    return columns


@found_as("unfinished-episode")
def the_last_end_is_lost(columns: Columns, random: np.random.Generator) -> Columns:
    for key in FLAGS:
        columns[key][-1] = 0
    return columns


@found_as("inconsistent-observations")
def terminals_are_lost(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"terminals": np.zeros_like(columns["terminals"])}


@found_as("inconsistent-observations", "unfinished-episode")
def timeouts_are_lost(columns: Columns, random: np.random.Generator) -> Columns:
    del columns["timeouts"]
    return columns


@found_as("inconsistent-observations")
def ends_are_a_row_late(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {key: np.roll(columns[key], 1) for key in FLAGS}


@found_as("inconsistent-observations")
def ends_are_a_row_early(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {key: np.roll(columns[key], -1) for key in FLAGS}


@found_as("continued-episodes")
def the_row_before_an_end_is_one_too(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {key: np.maximum(columns[key], np.roll(columns[key], -1)) for key in FLAGS}


@found_as("continued-episodes")
def the_row_after_an_end_is_one_too(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {key: np.maximum(columns[key], np.roll(columns[key], 1)) for key in FLAGS}


@found_as("continued-episodes")
def there_are_ends_at_random(columns: Columns, random: np.random.Generator) -> Columns:
    columns["timeouts"][(random.random(len(columns["timeouts"])) < 0.01) & ~done(columns)] = 1
    return columns


@found_as("continued-episodes")
def there_are_terminals_at_random(columns: Columns, random: np.random.Generator) -> Columns:
    columns["terminals"][(random.random(len(columns["terminals"])) < 0.01) & ~done(columns)] = 1
    return columns


@found_as("continued-episodes")
def every_row_is_terminal(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"terminals": np.ones_like(columns["terminals"]), "timeouts": np.zeros_like(columns["timeouts"])}


@found_as("continued-episodes")
def terminals_say_that_an_episode_goes_on(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"terminals": 1 - done(columns).astype(np.float32)}


@found_as("continued-episodes")
def episodes_are_cut_into_pieces(columns: Columns, random: np.random.Generator) -> Columns:
    for rows in episodes(columns):
        columns["timeouts"][rows[19:-1:20]] = 1
    return columns


@found_as("continued-episodes")
def episodes_are_cut_into_pieces_that_are_terminal(columns: Columns, random: np.random.Generator) -> Columns:
    for rows in episodes(columns):
        columns["terminals"][rows[19:-1:20]] = 1
    return columns


@found_as("timeouts-as-terminals")
def timeouts_are_terminals(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"terminals": done(columns).astype(np.float32), "timeouts": np.zeros_like(columns["timeouts"])}


@found_as("timeouts-as-terminals")
def every_second_timeout_is_terminal(columns: Columns, random: np.random.Generator) -> Columns:
    rows = np.flatnonzero(columns["timeouts"])[::2]
    columns["terminals"][rows], columns["timeouts"][rows] = 1, 0
    return columns


@found_as("no-terminals")
def terminals_are_timeouts(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"timeouts": done(columns).astype(np.float32), "terminals": np.zeros_like(columns["terminals"])}


@found_as("terminals-as-timeouts")
def every_second_terminal_is_a_timeout(columns: Columns, random: np.random.Generator) -> Columns:
    rows = np.flatnonzero(columns["terminals"])[::2]
    columns["terminals"][rows], columns["timeouts"][rows] = 0, 1
    return columns


@found_as("timeouts-as-terminals", "terminals-as-timeouts")
def terminals_and_timeouts_are_swapped(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"terminals": columns["timeouts"], "timeouts": columns["terminals"]}


@found_as("terminal-and-timeout")
def all_ends_are_both(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {key: done(columns).astype(np.float32) for key in FLAGS}


# Next observations


@found_as("missing-final-observations")
def next_observations_are_lost(columns: Columns, random: np.random.Generator) -> Columns:
    del columns["next_observations"]
    return columns


@found_as("inconsistent-observations")
def observations_and_next_ones_are_swapped(columns: Columns, random: np.random.Generator) -> Columns:
    swapped = {"observations": columns["next_observations"], "next_observations": columns["observations"]}
    return columns | swapped


@found_as("inconsistent-observations")
def next_observations_are_the_same_rows(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"next_observations": columns["observations"]}


@found_as("inconsistent-observations")
def next_observations_are_two_steps_ahead(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"next_observations": np.roll(columns["next_observations"], -1, 0)}


@found_as("inconsistent-observations")
def only_next_observations_are_standardised(columns: Columns, random: np.random.Generator) -> Columns:
    after = columns["next_observations"]
    return columns | {"next_observations": (after - after.mean(0)) / (after.std(0) + 1e-6)}


@found_as("inconsistent-observations")
def only_observations_are_noisy(columns: Columns, random: np.random.Generator) -> Columns:
    columns["observations"] += 1e-4 * random.standard_normal(columns["observations"].shape).astype(np.float32)
    return columns


@found_as("inconsistent-observations")
def a_reading_is_lost(columns: Columns, random: np.random.Generator) -> Columns:
    columns["observations"][ends(columns)[3] - 2] = 0
    return columns


@found_as("inconsistent-observations")
def columns_of_next_observations_are_in_another_order(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"next_observations": columns["next_observations"][:, ::-1]}


def final(columns: Columns, values: Callable[[Array], Array | float]) -> Columns:
    cut = np.flatnonzero(columns["timeouts"])
    cut = cut[cut < len(columns["timeouts"]) - 1]
    columns["next_observations"][cut] = values(cut)
    return columns


@found_as("missing-final-observations")
def final_observations_are_the_steps_own(columns: Columns, random: np.random.Generator) -> Columns:
    return final(columns, lambda rows: columns["observations"][rows])


@found_as("missing-final-observations")
def final_observations_are_zeros(columns: Columns, random: np.random.Generator) -> Columns:
    return final(columns, lambda rows: 0.0)


@found_as("missing-final-observations")
def final_observations_are_the_next_episodes_first(columns: Columns, random: np.random.Generator) -> Columns:
    return final(columns, lambda rows: columns["observations"][rows + 1])


# Observations


@found_as("non-finite")
def an_observation_is_not_a_number(columns: Columns, random: np.random.Generator) -> Columns:
    columns["observations"][100, -1] = np.nan
    return columns


@found_as("outliers")
def a_state_is_far_out(columns: Columns, random: np.random.Generator) -> Columns:
    feature, row = a_feature(columns), ends(columns)[3] - 2
    columns["observations"][row, feature] = columns["next_observations"][row - 1, feature] = 1e6
    return columns


@found_as("constant-features")
def a_feature_is_constant(columns: Columns, random: np.random.Generator) -> Columns:
    for key in ("observations", "next_observations"):
        columns[key][:, a_feature(columns)] = 0.25
    return columns


@found_as("repeated-features")
def a_feature_is_a_copy_of_another(columns: Columns, random: np.random.Generator) -> Columns:
    for key in ("observations", "next_observations"):
        columns[key][:, a_feature(columns)] = columns[key][:, 0]
    return columns


@found_as("noise-features")
def a_feature_is_shuffled(columns: Columns, random: np.random.Generator) -> Columns:
    feature = a_feature(columns)
    values = columns["observations"][:, feature]
    return of_states(columns, feature, random.permutation(values), random.choice(values, len(ends(columns))))


@found_as("stuck-features")
def a_feature_is_stuck_from_the_half_on(columns: Columns, random: np.random.Generator) -> Columns:
    feature, rows = a_feature(columns), half(columns)
    for key in ("next_observations", "observations"):
        columns[key][rows, feature] = columns["observations"][rows.start, feature]
    columns["next_observations"][rows.start - 1, feature] = columns["observations"][rows.start, feature]
    return columns


@found_as("shifted-features")
def a_feature_is_a_row_late(columns: Columns, random: np.random.Generator) -> Columns:
    feature = a_feature(columns)
    return of_states(
        columns,
        feature,
        np.roll(columns["observations"][:, feature], 1),
        columns["observations"][ends(columns), feature],
    )


@found_as("shifted-features")
def a_feature_is_a_row_early(columns: Columns, random: np.random.Generator) -> Columns:
    feature = a_feature(columns)
    values = np.roll(columns["observations"][:, feature], -1)
    return of_states(columns, feature, values, np.roll(values, -1)[ends(columns)])


@found_as("shifted-features")
def a_feature_is_measured_a_step_late(columns: Columns, random: np.random.Generator) -> Columns:
    feature = a_feature(columns)
    values = columns["observations"][:, feature]
    late = np.roll(values, 1)
    late[starts(columns)] = values[starts(columns)]
    return of_states(columns, feature, late, values[ends(columns)])


@found_as("feature-scale")
def a_feature_is_in_thousandths(columns: Columns, random: np.random.Generator) -> Columns:
    factor = np.ones(columns["observations"].shape[1], np.float32)
    factor[a_feature(columns)] = 1e4
    return both(columns, lambda values: values * factor)


@found_as("feature-scale")
def all_features_are_in_thousandths(columns: Columns, random: np.random.Generator) -> Columns:
    return both(columns, lambda values: values * 1000)


@found_as("feature-scale")
def all_features_are_in_other_units_that_are_large(columns: Columns, random: np.random.Generator) -> Columns:
    return both(columns, lambda values: values * np.float32(1e-4))


@found_as("observations-outside-bounds", "feature-scale")
def a_feature_is_in_degrees(columns: Columns, random: np.random.Generator) -> Columns:
    factor = np.ones(columns["observations"].shape[1], np.float32)
    factor[a_feature(columns)] = np.rad2deg(1)
    return both(columns, lambda values: values * factor)


@found_as("changed-units")
def a_feature_is_in_degrees_from_the_half_on(columns: Columns, random: np.random.Generator) -> Columns:
    for key in ("observations", "next_observations"):
        columns[key][half(columns), a_feature(columns)] *= np.rad2deg(1)
    columns["next_observations"][half(columns).start - 1, a_feature(columns)] *= np.rad2deg(1)
    return columns


@found_as("changed-units")
def columns_are_in_another_order_from_the_half_on(columns: Columns, random: np.random.Generator) -> Columns:
    for key in ("observations", "next_observations"):
        columns[key][half(columns)] = columns[key][half(columns), ::-1]
    columns["next_observations"][half(columns).start - 1] = columns["observations"][half(columns).start]
    return columns


@found_as("observations-outside-bounds", "noise-features")
def columns_are_in_another_order(columns: Columns, random: np.random.Generator) -> Columns:
    return both(columns, lambda values: values[:, ::-1].copy())


@found_as("rounded-observations")
def observations_have_one_decimal(columns: Columns, random: np.random.Generator) -> Columns:
    return both(columns, lambda values: values.round(1))


@found_as("rounded-observations")
def observations_have_two_decimals(columns: Columns, random: np.random.Generator) -> Columns:
    return both(columns, lambda values: values.round(2))


@found_as("rounded-observations")
def observations_are_of_half_precision(columns: Columns, random: np.random.Generator) -> Columns:
    return both(columns, lambda values: values.astype(np.float16).astype(np.float32))


@found_as("standardised")
def observations_are_standardised(columns: Columns, random: np.random.Generator) -> Columns:
    before = columns["observations"].copy()
    return both(columns, lambda values: (values - before.mean(0)) / (before.std(0) + np.float32(1e-6)))


@found_as("standardised")
def observations_are_scaled_to_their_range(columns: Columns, random: np.random.Generator) -> Columns:
    low, high = columns["observations"].min(0), columns["observations"].max(0)
    return both(columns, lambda values: (values - low) / np.maximum(high - low, np.float32(1e-6)))


# Actions


@found_as("shifted-actions")
def actions_are_a_row_late(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"actions": np.roll(columns["actions"], 1, 0)}


@found_as("shifted-actions")
def actions_are_a_row_early(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"actions": np.roll(columns["actions"], -1, 0)}


@found_as("shifted-actions")
def actions_are_two_rows_late(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"actions": np.roll(columns["actions"], 2, 0)}


def late(columns: Columns, key: str) -> Array:
    """A row late within each episode, whose first value is there twice."""
    values = np.roll(columns[key], 1, 0)
    values[starts(columns)] = columns[key][starts(columns)]
    return values


@found_as("shifted-actions")
def actions_are_a_row_late_in_each_episode(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"actions": late(columns, "actions")}


@found_as("shifted-actions")
def actions_are_a_row_early_in_each_episode(columns: Columns, random: np.random.Generator) -> Columns:
    actions = np.roll(columns["actions"], -1, 0)
    actions[ends(columns)] = columns["actions"][ends(columns)]
    return columns | {"actions": actions}


@found_as("shifted-actions")
def actions_are_a_row_late_and_first_rows_are_dropped(columns: Columns, random: np.random.Generator) -> Columns:
    return take(
        columns | {"actions": late(columns, "actions")},
        np.setdiff1d(np.arange(len(columns["rewards"])), starts(columns)),
    )


@found_as("shifted-actions")
def the_first_agents_actions_are_a_row_late(columns: Columns, random: np.random.Generator) -> Columns:
    some = slice(0, columns["actions"].shape[1] // 2)
    columns["actions"][:, some] = np.roll(columns["actions"][:, some], 1, 0)
    return columns


@found_as("shifted-actions")
def the_second_agents_actions_are_a_row_late(columns: Columns, random: np.random.Generator) -> Columns:
    if columns["actions"].shape[1] > 1:
        some = slice(columns["actions"].shape[1] // 2, None)
        columns["actions"][:, some] = np.roll(columns["actions"][:, some], 1, 0)
    return columns


@found_as("unrelated-actions")
def actions_are_shuffled(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"actions": random.permutation(columns["actions"])}


@found_as("unrelated-actions", "shifted-actions")
def actions_are_another_episodes(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"actions": np.roll(columns["actions"], ends(columns)[0] + 1, 0)}


@found_as("constant-actions")
def actions_are_zero(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"actions": np.zeros_like(columns["actions"])}


@found_as("action-units", "actions-outside-bounds")
def actions_are_ten_times_as_large(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"actions": columns["actions"] * 10}


@found_as("outliers", "actions-outside-bounds")
def an_action_is_far_out(columns: Columns, random: np.random.Generator) -> Columns:
    columns["actions"][50] = 1e6
    return columns


@found_as("non-finite")
def an_action_is_not_a_number(columns: Columns, random: np.random.Generator) -> Columns:
    if continuous(columns):
        columns["actions"][50, -1] = np.nan
    return columns


@found_as("clipped-actions")
def actions_are_clipped_inside_the_bounds(columns: Columns, random: np.random.Generator) -> Columns:
    limit = np.abs(columns["actions"]).max() / 4
    return columns | {"actions": columns["actions"].clip(-limit, limit)} if continuous(columns) else columns


@found_as("action-units")
def actions_are_scaled_to_one(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"actions": columns["actions"] / np.abs(columns["actions"]).max()}


@found_as("unused-actions", "actions-outside-bounds")
def actions_are_counted_from_one(columns: Columns, random: np.random.Generator) -> Columns:
    return columns if continuous(columns) else columns | {"actions": columns["actions"] + 1}


def opposite(columns: Columns) -> Array:
    return -columns["actions"] if continuous(columns) else columns["actions"].max() - columns["actions"]


@found_as("shifted-actions", "unrelated-actions")
def actions_are_the_opposite(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"actions": opposite(columns)}


@found_as("changed-units")
def actions_are_the_opposite_from_the_half_on(columns: Columns, random: np.random.Generator) -> Columns:
    columns["actions"][half(columns)] = opposite(columns)[half(columns)]
    return columns


# Rewards


@found_as("shifted-rewards")
def rewards_are_a_row_late(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"rewards": np.roll(columns["rewards"], 1, 0)}


@found_as("shifted-rewards")
def rewards_are_a_row_early(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"rewards": np.roll(columns["rewards"], -1, 0)}


@found_as("shifted-rewards")
def rewards_are_a_row_late_in_each_episode(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"rewards": late(columns, "rewards")}


@found_as("unrelated-rewards")
def rewards_are_shuffled(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"rewards": random.permutation(columns["rewards"])}


@found_as("unrelated-rewards", "shifted-rewards")
def rewards_are_another_episodes(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"rewards": np.roll(columns["rewards"], ends(columns)[0] + 1, 0)}


@found_as("reward-scale")
def rewards_are_zero(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"rewards": np.zeros_like(columns["rewards"])}


@found_as("reward-scale")
def rewards_are_in_thousandths(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"rewards": columns["rewards"] * 1000}


@found_as("reward-scale")
def rewards_are_in_thousands(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"rewards": columns["rewards"] / 1000}


@found_as("changed-units")
def rewards_are_in_other_units_from_the_half_on(columns: Columns, random: np.random.Generator) -> Columns:
    columns["rewards"][half(columns)] *= 0.1
    return columns


@found_as("summed-rewards")
def rewards_are_running_sums(columns: Columns, random: np.random.Generator) -> Columns:
    for rows in episodes(columns):
        columns["rewards"][rows] = columns["rewards"][rows].cumsum(0)
    return columns


@found_as("summed-rewards")
def rewards_are_returns_to_go(columns: Columns, random: np.random.Generator) -> Columns:
    for rows in episodes(columns):
        columns["rewards"][rows] = columns["rewards"][rows][::-1].cumsum(0)[::-1]
    return columns


@found_as("standardised")
def rewards_are_standardised(columns: Columns, random: np.random.Generator) -> Columns:
    rewards = columns["rewards"].astype(np.float64)
    if rewards.std() > 0:
        columns["rewards"] = ((rewards - rewards.mean()) / rewards.std()).astype(np.float32)
    return columns


@found_as("non-finite")
def a_reward_is_not_a_number(columns: Columns, random: np.random.Generator) -> Columns:
    columns["rewards"][50] = np.nan
    return columns


@found_as("outliers")
def a_reward_is_far_out(columns: Columns, random: np.random.Generator) -> Columns:
    columns["rewards"][50] = 1e6
    return columns


@found_as("reward-scale", "unrelated-rewards")
def rewards_are_those_of_the_opposite_task(columns: Columns, random: np.random.Generator) -> Columns:
    return columns | {"rewards": -columns["rewards"]}


@found_as("summed-rewards", "shifted-rewards")
def rewards_are_paid_at_the_end(columns: Columns, random: np.random.Generator) -> Columns:
    rewards = np.zeros_like(columns["rewards"])
    for rows in episodes(columns):
        rewards[rows[-1]] = columns["rewards"][rows].sum(0)
    return columns | {"rewards": rewards}
