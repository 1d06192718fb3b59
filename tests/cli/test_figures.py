"""What people look at: a dataset on one page, a film of an episode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from tensordict import TensorDict

from iql_plugins import read_dataset
from iql_plugins.cli import figures, main, policies
from iql_plugins.config import IQLConfig
from iql_plugins.data import Dataset
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process; status and document."""

    def call(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        capfd.readouterr()
        status = main([*map(str, arguments), "--json"])
        return status, json.loads(capfd.readouterr().out)

    return call


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Axes]]:
    """The axes of a dataset's page, which is written, too."""

    def draw(source: Dataset, spaces: Spaces | None = None) -> list[Axes]:
        pages: list[Any] = []
        write = figures._write
        monkeypatch.setattr(figures, "_write", lambda figure, path: (pages.append(figure), write(figure, path)))
        figures.dataset_page(source, spaces, tmp_path / "page.png")
        assert imageio.imread(tmp_path / "page.png").shape[:2] == (975, 1650)
        return list(pages[0].axes)

    return draw


def dataset(action: torch.Tensor, observation: Any) -> Dataset:
    count = len(action)
    ends = torch.arange(count).reshape(-1, 1) % 10 == 9
    following = {"observation": observation, "reward": torch.arange(count).reshape(-1, 1) / 10.0, "done": ends,
                 "terminated": torch.zeros_like(ends)}  # fmt: skip
    return Dataset(TensorDict({"observation": observation, "action": action, "next": following}, [count]), "made")


def test_inspect_draws_what_it_reads(run: Run, tmp_path: Path) -> None:
    status, document = run("inspect", "--plot", tmp_path / "page.png")
    assert (status, document["transitions"]) == (0, 20_000)
    assert imageio.imread(tmp_path / "page.png").std() > 1.0


def test_a_page_shows_returns_lengths_rewards_actions_and_coverage(drawn: Callable[..., list[Axes]]) -> None:
    source = read_dataset("pendulum-v1-sac")
    returns, order, lengths, rewards, actions, coverage = drawn(source, source.spaces)
    assert sum(bar.get_height() for bar in returns.patches) == 100
    assert len(order.lines[0].get_xdata()) == 100
    assert sum(bar.get_height() for bar in lengths.patches) == 100
    assert sum(bar.get_height() for bar in rewards.patches) == pytest.approx(1.0)
    # The bounds are drawn, and the extremes, which are the same here.
    bounds = [line.get_ydata()[0] for line in actions.lines if line.get_color() == "r"]
    assert bounds == [-2.0, 2.0]
    assert coverage.collections[0].get_offsets().shape == (20_000, 2)
    shares = [int(label.split("(")[1].split("%")[0]) for label in (coverage.get_xlabel(), coverage.get_ylabel())]
    assert 100 >= shares[0] >= shares[1] > 0


@pytest.mark.parametrize("spaces", [None, Spaces(Box((2,)), Discrete(5))])
def test_discrete_actions_are_counted(spaces: Spaces | None, drawn: Callable[..., list[Axes]]) -> None:
    action = torch.tensor([0, 1, 1, 3] * 10).reshape(-1, 1)
    axes = drawn(dataset(action, torch.randn(40, 2)), spaces)
    assert {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in axes[4].patches} == {
        0: 0.25,
        1: 0.5,
        3: 0.25,
    }
    assert all(tick == int(tick) for tick in axes[4].get_xticks())
    assert axes[4].get_xlim()[1] > 4 or spaces is None


def test_a_part_of_the_rows_is_not_counted_as_all_of_them(
    drawn: Callable[..., list[Axes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dataset(torch.tensor([0, 1, 1, 1, 1] * 8).reshape(-1, 1), torch.randn(40, 2))
    whole = drawn(source)
    monkeypatch.setattr(figures, "MOST_DRAWN", 20)
    part = drawn(source)
    for axes in (whole, part):
        assert axes[3].get_ylabel() == axes[4].get_ylabel() == "share of transitions"
        assert [bar.get_height() for bar in axes[4].patches] == pytest.approx([0.2, 0.8], abs=0.05)
    assert "4 episodes, 40 transitions" in whole[0].figure.get_suptitle()
    assert whole[0].figure.get_suptitle().endswith("transitions")
    assert part[0].figure.get_suptitle().endswith("20 of them, at equal distances")


@pytest.mark.parametrize(
    ("values", "edges"),
    [
        ([0, 1] * 20, [-0.5, 0.5, 1.5]),
        ([1] * 5, [0.5, 1.5]),
        (range(100), [*np.arange(-0.5, 100, 10)]),
        ([*range(24), 25], [*np.arange(-0.5, 27, 3)]),
    ],
)
def test_each_bin_holds_as_many_whole_numbers(values: Any, edges: list[float]) -> None:
    assert figures._bins(np.array(values, float)).tolist() == pytest.approx(edges)
    assert figures._bins(np.array(values) + 0.25) == figures.FEWEST_BINS


def test_actions_at_the_bounds_alone_are_continuous(drawn: Callable[..., list[Axes]]) -> None:
    actions = drawn(dataset(torch.tensor([[-1.0, 1.0]] * 40), torch.randn(40, 2)))[4]
    assert actions.get_xlabel() == "component of the action; bounds are not known"
    assert [text.get_text() for text in actions.get_legend().get_texts()] == ["extremes"]


@pytest.mark.parametrize(
    "observation",
    [torch.zeros(40, 3, 4, 4, dtype=torch.uint8), torch.ones(40, 2), torch.arange(40.0).reshape(-1, 1)],
)
def test_observations_without_two_numbers_that_change_have_no_coverage(
    observation: torch.Tensor, drawn: Callable[..., list[Axes]]
) -> None:
    axes = drawn(dataset(torch.rand(40, 2), observation))
    assert axes[5].texts[0].get_text() == "fewer than two features that are numbers"


def test_numbers_that_are_not_finite_are_left_out(run: Run, tmp_path: Path, drawn: Callable[..., list[Axes]]) -> None:
    source = dataset(torch.rand(40, 2), torch.randn(40, 2))
    for key in ("observation", "action", ("next", "reward")):
        source.tensors[key][3] = torch.nan
    axes = drawn(source)
    assert sum(bar.get_height() for bar in axes[3].patches) == pytest.approx(1.0)
    assert axes[5].collections[0].get_offsets().shape == (39, 2)


def test_columns_and_numbers_that_cannot_be_drawn_do_not_end_it(drawn: Callable[..., list[Axes]]) -> None:
    source = dataset(torch.rand(40, 2), torch.full((40, 2), torch.nan))
    source.tensors["action"][:, 1] = torch.nan
    source.tensors["next", "reward"][:] = torch.tensor([1e17, 1e17 + 2**34]).repeat(20).reshape(-1, 1)
    axes = drawn(source)
    assert "fewer than two features" in axes[5].texts[0].get_text()
    assert len(axes[4].lines) > 0


@pytest.mark.parametrize("count", [1, 2, 20_001, 2**24 + 4, 100_000_000])
def test_rows_that_are_drawn_are_of_the_dataset(count: int) -> None:
    rows = figures._spread(count, figures.MOST_DRAWN)
    assert (int(rows[0]), int(rows[-1])) == (0, count - 1)
    assert len(rows.unique()) == len(rows) == min(count, figures.MOST_DRAWN)


class Painted(gymnasium.Env[Any, Any]):
    """Shows how many steps were taken; its length is what its seed says."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - gymnasium's own
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,))
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,))

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.left, self.taken = 5 + (seed or 0), 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        self.left, self.taken = self.left - 1, self.taken + 1
        return np.zeros(3, np.float32), 1.0, self.left == 0, False, {}

    def render(self) -> Any:
        return np.full((64, 64, 3), 12 * self.taken, np.uint8)


class Invisible(Painted):
    """Cannot be drawn."""

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own

    def __init__(self) -> None:
        super().__init__()


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    for name, kind in (("Painted-v0", Painted), ("Invisible-v0", Invisible)):
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point=kind, max_episode_steps=50)
    path = tmp_path / "agent.safetensors"
    spaces = Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,)))
    Agent(spaces, IQLConfig(n_steps=10, hidden_sizes=(8,), compile="no"), seed=0).save(path)
    return path


# The library that encodes leaves its pipes to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_evaluate_films_the_first_episode(run: Run, policy: Path, tmp_path: Path) -> None:
    video = tmp_path / "out.mp4"
    video.write_bytes(b"an older one")
    status, document = run("evaluate", policy, "--env", "Painted-v0", "--episodes", 2, "--seed", 3, "--video", video)
    assert status == 0
    assert (document["video"], document["lengths"]) == (str(video), [8, 9])
    frames = imageio.imread(video)
    # The start, and what each of its 8 steps came to.
    brightness = frames.mean(axis=(1, 2, 3))
    assert len(brightness) == 9
    np.testing.assert_allclose(brightness, 12 * np.arange(9), atol=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent.safetensors", "out.mp4"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--env", "Invisible-v0", "--video", "out.mp4"), "rgb_array"),
        (("--env", "Painted-v0", "--video", "out.gif"), "--video must be a .mp4 file, got 'out.gif'"),
        (("--env", "Painted-v0", "--video", "nowhere/out.mp4"), "--video: there is no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_filmed_is_one_line(
    arguments: tuple[str, ...], words: str, run: Run, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, document = run("evaluate", policy, "--episodes", 1, *arguments)
    assert words in document["error"]
    assert status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["agent.safetensors"]


def test_what_cannot_be_filmed_is_found_before_episodes_are_played(
    run: Run, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "rollouts", lambda *arguments: pytest.fail("episodes were played"))
    status, _ = run("evaluate", policy, "--env", "Invisible-v0", "--video", tmp_path / "out.mp4")
    assert status == 2


def test_a_plot_is_a_png(run: Run, tmp_path: Path) -> None:
    assert "--plot must be a .png file" in run("inspect", "--plot", tmp_path / "page.pdf")[1]["error"]
