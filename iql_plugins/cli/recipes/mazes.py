"""Point mazes: gymnasium-robotics' under D4RL's waypoint controller, OGBench's under its oracle."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np

from iql_plugins.cli.errors import imported
from iql_plugins.cli.recipes.recipe import Array, Columns, Parts, Recipe, Rows

__all__ = ["RECIPES"]

Cell = tuple[int, int]
#: Of the actions, in both recipes; actions are clipped to their bounds behind it.
_NOISE = 0.5

#: D4RL's controller (d4rl/pointmaze/waypoint_controller.py).
_P_GAIN, _D_GAIN, _CLOSE = 10.0, -1.0, 0.1
#: Steps at a goal before the next one comes: without them, no row would show what is worth staying for.
_STAY = 25
_POINTMAZE_PARTS, _POINTMAZE_ROWS = 20, 10_000

_OGBENCH_PARTS = 20
#: Episodes of each part, and their steps; the sum is that of a fifth of OGBench's own.
_OGBENCH_SIZES = {"navigate": (10, 1000), "stitch": (50, 200)}
#: Cells from the start to the goal of a stitch episode.
_STITCH_CELLS = 4


def distances(free: Array, goal: Cell) -> Array:
    """``[H, W]`` steps from each free cell of a maze to a goal, by breadth-first search; -1 where it cannot be reached.

    >>> distances(np.array([[True, True, False], [False, True, True]]), (0, 0))
    array([[ 0,  1, -1],
           [-1,  2,  3]])

    Args:
        free: ``[H, W]`` whether a cell is no wall.
        goal: row and column.
    """
    result = np.full(free.shape, -1)
    result[goal] = 0
    waiting = deque([goal])
    while waiting:
        cell = waiting.popleft()
        for neighbour in _neighbours(free, cell):
            if result[neighbour] < 0:
                result[neighbour] = result[cell] + 1
                waiting.append(neighbour)
    return result


def _neighbours(free: Array, cell: Cell) -> Iterator[Cell]:
    row, column = cell
    for near in ((row - 1, column), (row, column - 1), (row + 1, column), (row, column + 1)):
        if 0 <= near[0] < free.shape[0] and 0 <= near[1] < free.shape[1] and free[near]:
            yield near


class _WaypointController:
    """Leads a ball from the middle of one cell to that of the next, and then to the goal."""

    def __init__(self, maze: Any) -> None:
        self._maze = maze
        self._free = np.array([[cell != 1 for cell in row] for row in maze.maze_map])
        self._waypoints: deque[Array] = deque()

    def start(self, position: Array, goal: Array) -> None:
        """Looks for the way to a new goal."""
        cell, last = (self._cell(place) for place in (position, goal))
        steps = distances(self._free, last)
        self._waypoints = deque()
        while steps[cell] > 1:
            cell = next(near for near in _neighbours(self._free, cell) if steps[near] == steps[cell] - 1)
            self._waypoints.append(self._maze.cell_rowcol_to_xy(np.array(cell)))
        self._waypoints.append(goal)

    def action(self, position: Array, velocity: Array) -> Array:
        """A force towards the next waypoint, before noise and bounds."""
        if len(self._waypoints) > 1 and np.linalg.norm(self._waypoints[0] - position) <= _CLOSE:
            self._waypoints.popleft()
        force: Array = _P_GAIN * (self._waypoints[0] - position) + _D_GAIN * velocity
        return force

    def _cell(self, place: Array) -> Cell:
        row, column = self._maze.cell_xy_to_rowcol(place)
        return int(row), int(column)


def _pointmaze(env_id: str) -> Callable[[int, Parts], Columns]:
    """Goals that change: each episode has one, and begins where the last one ended."""

    def trajectories(seed: int, number: int) -> Columns:
        imported("gymnasium_robotics", "benchmarks")
        draw = np.random.default_rng([seed, number])
        # The time limit is not the task's: the reward is that of being where the goal is.
        env: Any = gymnasium.make(
            env_id, continuing_task=True, reset_target=False, max_episode_steps=_POINTMAZE_ROWS + 1
        )
        maze: Any = env.unwrapped
        controller = _WaypointController(maze.maze)
        observation, _ = env.reset(seed=int(draw.integers(2**31)))
        rows = Rows()
        while len(rows) < _POINTMAZE_ROWS:
            controller.start(observation["achieved_goal"], observation["desired_goal"])
            stayed = 0
            while stayed < _STAY and len(rows) < _POINTMAZE_ROWS:
                force = controller.action(observation["achieved_goal"], observation["observation"][2:])
                action = np.clip(force + _NOISE * draw.standard_normal(2), -1.0, 1.0).astype(np.float32)
                following, reward, _, _, info = env.step(action)
                stayed += bool(info["success"])
                ends = stayed == _STAY or len(rows) == _POINTMAZE_ROWS - 1
                rows.add(observation, action, float(reward), following, False, ends)
                observation = following
            maze.goal = maze.add_xy_position_noise(maze.generate_target_goal())
            maze.update_target_site_pos()
            observation = {**observation, "desired_goal": maze.goal.copy()}
        env.close()
        return rows.columns()

    def make(seed: int, parts: Parts) -> Columns:
        names = [f"{number:02}" for number in range(_POINTMAZE_PARTS)]
        return parts.columns(names, lambda number: trajectories(seed, number), f"{_POINTMAZE_ROWS} transitions each")

    return make


def _ogbench(maze_id: str, kind: str) -> Callable[[int, Parts], Columns]:
    """OGBench's ``generate_locomaze.py``: the oracle's direction plus noise, rewards of the maze's default task."""

    def trajectories(seed: int, number: int) -> Columns:
        imported("ogbench", "benchmarks")
        episodes, steps = _OGBENCH_SIZES[kind]
        draw = np.random.default_rng([seed, number])
        # Its task tells the goal that rewards are of.
        task: Any = gymnasium.make(f"{maze_id}-singletask-v0")
        env: Any = gymnasium.make(f"{maze_id}-v0", terminate_at_goal=False, max_episode_steps=steps)
        maze: Any = env.unwrapped
        rows = Rows()
        with _numpy_drawing_from(int(draw.integers(2**31))):
            task.reset(seed=0)
            scored: Any = task.unwrapped
            goal, tolerance = np.array(scored.cur_goal_xy), scored._goal_tol
            env.action_space.seed(int(draw.integers(2**31)))
            for _ in range(episodes):
                _episode(env, maze, kind, draw, rows, lambda place: np.linalg.norm(place - goal) <= tolerance)
        for made in (task, env):
            made.close()
        return rows.columns()

    def make(seed: int, parts: Parts) -> Columns:
        names = [f"{number:02}" for number in range(_OGBENCH_PARTS)]
        episodes, steps = _OGBENCH_SIZES[kind]
        return parts.columns(names, lambda number: trajectories(seed, number), f"{episodes} times {steps} steps each")

    return make


def _episode(env: Any, maze: Any, kind: str, draw: Any, rows: Rows, succeeds: Callable[[Array], Any]) -> None:
    free = np.asarray(maze.maze_map) == 0
    cells = [(int(row), int(column)) for row, column in np.argwhere(free)]
    start = cells[draw.integers(len(cells))]
    if kind == "navigate":
        goals = [cell for cell in cells if not _is_hallway(free, cell)]
    else:
        goals = [cell for cell in cells if distances(free, start)[cell] == _STITCH_CELLS] or [start]

    def goal() -> Cell:
        return goals[int(draw.integers(len(goals)))]

    task = {"init_ij": start, "goal_ij": goal()}
    observation, _ = env.reset(seed=int(draw.integers(2**31)), options={"task_info": task})
    ended = False
    while not ended:
        place = np.array(maze.get_xy())
        subgoal, _ = maze.get_oracle_subgoal(place, maze.cur_goal_xy)
        direction = (subgoal - place) / (np.linalg.norm(subgoal - place) + 1e-6)
        action = np.clip(direction + _NOISE * draw.standard_normal(2), -1.0, 1.0).astype(np.float32)
        following, _, _, ended, info = env.step(action)
        # The reward is that of where the action was taken, as in OGBench's relabel_utils.py.
        success = bool(succeeds(place))
        rows.add(observation, action, float(success) - 1.0, following, success, ended)
        observation = following
        if info["success"] and kind == "navigate":
            maze.set_goal(goal())


def _is_hallway(free: Array, cell: Cell) -> bool:
    """Whether a cell has walls on two opposite sides and none on the others."""
    row, column = cell
    above, below = free[row - 1, column], free[row + 1, column]
    left, right = free[row, column - 1], free[row, column + 1]
    return bool((above and below and not left and not right) or (left and right and not above and not below))


@contextlib.contextmanager
def _numpy_drawing_from(seed: int) -> Iterator[None]:
    """OGBench's mazes draw from NumPy's global random state, which is the caller's again behind it."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


RECIPES: Sequence[Recipe] = (
    *(
        Recipe(
            f"pointmaze-{size.lower()}{reward.lower() and '-' + reward.lower()}",
            f"PointMaze_{size}{reward}-v3",
            f"goal after goal under D4RL's controller, {reward.lower() or 'sparse'} rewards, 200,000 transitions",
            _pointmaze(f"PointMaze_{size}{reward}-v3"),
            packages=("gymnasium_robotics",),
        )
        for size in ("UMaze", "Medium")
        for reward in ("", "Dense")
    ),
    *(
        Recipe(
            f"ogbench-pointmaze-{kind}",
            "pointmaze-medium-singletask-v0",
            f"OGBench's pointmaze-medium-{kind} with the rewards of its default task, 200,000 transitions",
            _ogbench("pointmaze-medium", kind),
            packages=("ogbench",),
        )
        for kind in ("navigate", "stitch")
    ),
)
