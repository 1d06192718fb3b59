"""What `iql-plugins train` says against its result, and when it says nothing."""

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import short_pendulum  # noqa: F401 - registers the environment
import torch

from iql_plugins import data
from iql_plugins.cli import health, main, train, training
from iql_plugins.cli.arguments import Train, option, parse
from iql_plugins.cli.health import run_warnings
from iql_plugins.cli.settings import Settings
from iql_plugins.cli.statistics import Estimate
from iql_plugins.config import IQLConfig
from iql_plugins.data import Dataset
from iql_plugins.data.dataset import REWARD

OPTIONS = {option(field.name) for kind in (Train, IQLConfig) for field in fields(kind)}
DATA = Estimate(-300.0, -350.0, -250.0)
#: Of IQL's last policy: what is healthy beside the data.
FINE = {"data": DATA, "IQL final": Estimate(-150.0, -170.0, -130.0), "IQL best": Estimate(-150.0, -170.0, -130.0)}
ENV = "short_pendulum:ShortPendulum-v0"
RUN = [
    *("--n-steps", "40", "--hidden-sizes", "8", "--batch-size", "16", "--evaluate-every", "20", "--log-every", "2"),
    *("--episodes", "2", "--evaluation-episodes", "2", "--workers", "1", "--baseline", "none", "--env", ENV),
]

Warnings = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def plain() -> tuple[Settings, Dataset]:
    """The settings of a run, and its dataset."""
    arguments = parse(["train", "--seeds", "2", "--env", "Pendulum-v1"])
    assert isinstance(arguments, Train)
    return train.new_settings(arguments)


@pytest.fixture
def warnings(plain: tuple[Settings, Dataset], tmp_path: Path) -> Warnings:
    """The warnings of a run with these estimates, rewards, metrics by seed, and changes of its settings."""

    def of(
        estimates: dict[str, Estimate] = FINE,
        rewards: torch.Tensor | None = None,
        scales: tuple[float, ...] = (1.0, 1.0, 1.0),
        metrics: dict[int, dict[str, float]] | None = None,
        **changes: Any,
    ) -> list[dict[str, Any]]:
        settings, source = plain
        config = settings.hyperparameters.replace(**changes.pop("hyperparameters", {}))
        settings = replace(settings, hyperparameters=config, **changes)
        tensors = source.tensors.clone()
        tensors["observation"] = tensors["observation"] * torch.tensor(scales)
        source = replace(source, tensors=tensors)
        if rewards is not None:
            tensors[REWARD] = rewards.expand(len(tensors)).reshape(-1, 1).clone()
        for seed, row in (metrics or {}).items():
            (tmp_path / f"seed-{seed}").mkdir(exist_ok=True)
            steps = range(10, 1010, 10)
            lines = [",".join(["step", *row]), *(",".join(map(str, [step, *row.values()])) for step in steps)]
            (tmp_path / f"seed-{seed}" / "metrics.csv").write_text("\n".join(lines) + "\n")
        return run_warnings(settings, source, tmp_path, estimates)

    return of


def codes(found: list[dict[str, Any]]) -> list[str]:
    return [warning["code"] for warning in found]


def around(mean: float, half_width: float = 20.0) -> Estimate:
    return Estimate(mean, mean - half_width, mean + half_width)


def goals(count: int, share: float) -> torch.Tensor:
    return (torch.arange(count) % round(1 / share) == 0).float()


def test_a_healthy_run_has_no_warning(warnings: Warnings) -> None:
    assert warnings() == []
    assert warnings(FINE | {"behaviour cloning": DATA}) == []
    assert warnings({"data": DATA}, env=None) == []


TRIPPED: dict[str, dict[str, Any]] = {
    "below-data": {"estimates": FINE | {"IQL final": around(-350.0), "IQL best": around(-350.0)}},
    "below-behaviour-cloning": {"estimates": FINE | {"behaviour cloning": around(-100.0)}},
    "best-before-last": {"estimates": FINE | {"IQL best": around(-100.0)}},
    "shifted-rewards": {"preset": "antmaze", "hyperparameters": {"reward_shift": -1.0}},
    "scaled-goals": {"rewards": goals(20_000, 0.01), "hyperparameters": {"reward_scale": "return_range"}},
    # The data's own are 0.6, 0.7 and 3.
    "uneven-scales": {"scales": (1.0, 1.0, 10.0), "hyperparameters": {"normalize_observations": False}},
}


@pytest.mark.parametrize("code", TRIPPED)
def test_each_sign_is_found_alone_and_names_options_that_there_are(code: str, warnings: Warnings) -> None:
    (warning,) = warnings(**TRIPPED[code])
    assert warning["code"] == code
    assert warning["seeds"] == [0, 1]
    named = re.findall(r"--[a-z-]+", warning["suggestion"])
    assert named
    assert set(named) <= OPTIONS
    assert re.match(r"try .*, because ", warning["suggestion"])
    assert "`" not in str(warning)


@pytest.mark.parametrize(
    ("temperature", "suggestion"),
    [
        (3.0, "try a lower --temperature, or auto, because"),
        ("auto_0.5", "try a higher target than --temperature auto_0.5 has, because"),
        (0.0, "try more --n-steps, because with a --temperature of 0"),
    ],
)
def test_a_policy_below_behaviour_cloning_is_told_what_its_temperature_leaves_to_try(
    temperature: float | str, suggestion: str, warnings: Warnings
) -> None:
    (warning,) = warnings(**TRIPPED["below-behaviour-cloning"], hyperparameters={"temperature": temperature})
    assert warning["suggestion"].startswith(suggestion)


def test_the_signs_are_those_of_the_documentation() -> None:
    documented = re.findall(r"^``([a-z-]+)`` ", inspect.getdoc(run_warnings) or "", re.MULTILINE)
    assert documented[: len(TRIPPED)] == list(TRIPPED)


@pytest.mark.parametrize(
    "estimates",
    [
        {"IQL final": around(-310.0), "IQL best": around(-310.0)},  # its interval has the data's mean
        {"behaviour cloning": around(-120.0)},  # intervals overlap
        {"IQL best": around(-120.0)},
        {"IQL final": Estimate(-900.0, math.nan, math.nan), "IQL best": around(-900.0)},  # of one episode
    ],
)
def test_a_difference_within_the_intervals_is_no_sign(estimates: dict[str, Estimate], warnings: Warnings) -> None:
    assert warnings(FINE | estimates) == []


@pytest.mark.parametrize(
    "near",
    [
        # What the preset is for, a preset without a shift, and a shift of one's own.
        {
            "rewards": goals(20_000, 0.01),
            "preset": "antmaze",
            "hyperparameters": {"reward_scale": 1.0, "reward_shift": -1.0},
        },
        {"preset": "locomotion"},
        {"hyperparameters": {"reward_shift": -1.0}},
        {"preset": "antmaze", "hyperparameters": {"reward_shift": 0.0}},
        # A reward of 1 at each step, at most of them, and goals that nothing multiplies.
        {"rewards": torch.ones(1)},
        {"rewards": goals(20_000, 0.5)},
        {"rewards": goals(20_000, 0.01), "hyperparameters": {"reward_scale": 1.0}},
        {"rewards": goals(20_000, 0.01) * 2.0},
    ],
)
def test_rewards_that_the_scale_is_for_are_no_sign(near: dict[str, Any], warnings: Warnings) -> None:
    assert warnings(**near) == []


STILL = {"mean_value": -10.0, "mean_qvalue": -10.0, "effective_sample_size": 0.3, "share_at_max_weight": 0.0}


def test_a_sign_in_the_metrics_is_told_once_with_the_seeds_that_have_it(warnings: Warnings) -> None:
    few = STILL | {"effective_sample_size": 0.01}
    (warning,) = warnings(metrics={0: STILL, 1: few})
    assert (warning["code"], warning["seeds"]) == ("few-effective-samples", [1])
    assert warning["message"].endswith("(seed 1 of 2)")
    assert set(re.findall(r"--[a-z-]+", warning["suggestion"])) == {"--temperature", "--reward-scale"}
    (warning,) = warnings(metrics={0: few, 1: few})
    assert warning["seeds"] == [0, 1]
    assert "seed" not in warning["message"]


def test_values_that_no_rewards_explain_are_told_once(warnings: Warnings) -> None:
    # Rewards from -16.3 to 0, of which the preset makes 0.56 times as much; a hundred of them count.
    for value, found in ((-800.0, []), (50.0, []), (-1200.0, ["diverged-values"]), (300.0, ["diverged-values"])):
        assert codes(warnings(metrics={seed: STILL | {"mean_value": value} for seed in (0, 1)})) == found
    assert codes(warnings(metrics={0: STILL | {"mean_value": 300.0}}, hyperparameters={"discount": 1.0})) == []


def test_values_on_their_way_say_nothing_against_a_policy_that_is_above_all(
    warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"step": step, **STILL, "mean_value": -0.1 * step} for step in range(100)]
    monkeypatch.setattr(health, "metrics_rows", lambda path: rows)
    cloned = {"behaviour cloning": around(-300.0)}
    assert warnings(FINE | cloned) == []
    for estimates in (
        {"data": DATA},
        FINE | {"IQL final": around(-250.0), "IQL best": around(-250.0)},
        FINE | {"behaviour cloning": around(-180.0)},
    ):
        assert codes(warnings(estimates)) == ["unsettled-values"]


# Whole runs


def train_json(capfd: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capfd.readouterr()
    assert main(["train", *options, "--json"]) == 0
    document: dict[str, Any] = json.loads(capfd.readouterr().out)
    return document


def test_a_run_that_nothing_speaks_against_says_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Begun by the authors' initialisation, critics disagree for longer than these few steps.
    assert main(["train", *RUN, "--initialization", "torch", "--run-dir", "run"]) == 0
    assert "trusted" not in capfd.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["warnings"] == []


@pytest.mark.parametrize("normalized", [False, True])
def test_scales_that_are_uneven_are_told_before_the_first_step(
    normalized: bool, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with np.load(Path(data.__file__).parent / "datasets" / "pendulum-v1-sac.npz") as content:
        columns = dict(content)
    for name in ("observations", "next_observations"):
        columns[name] = columns[name] * np.array([1.0, 1.0, 10.0], np.float32)
    np.savez("uneven.npz", **columns)
    train_all: Callable[..., Any] = train.train_all
    said: list[str] = []

    def after_what_was_said(*arguments: Any, **options: Any) -> Any:
        said.append(capfd.readouterr().err)
        return train_all(*arguments, **options)

    monkeypatch.setattr(train, "train_all", after_what_was_said)
    options = ["--dataset", "uneven.npz", *(["--normalize-observations"] if normalized else []), "--seeds", "2"]
    assert main(["train", *RUN, *options, "--run-dir", "run"]) == 0
    told = "uneven-scales: standard deviations of observations are from"
    assert said[0].count(told) == (0 if normalized else 1)
    assert ("try --normalize-observations" in said[0]) == (not normalized)
    assert told not in capfd.readouterr().err


def test_a_temperature_beyond_reason_is_told_whether_or_not_the_run_was_interrupted(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*RUN, "--temperature", "100000"]
    whole = train_json(capfd, *options, "--run-dir", "whole")
    assert codes(whole["warnings"]) == ["clipped-weights"]
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["warnings"] == whole["warnings"]
    # A run that is over is measured again, and says it again; people read it between the table and the files.
    assert train_json(capfd, "--resume", "whole", "--env", ENV)["warnings"] == whole["warnings"]
    assert main(["train", "--resume", "whole", "--env", ENV]) == 0
    out = capfd.readouterr().out
    told = (
        r"before this result is trusted:\n +clipped-weights: \d+% of the weights .*\n +try a --temperature below 100000"
    )
    assert re.search(rf"IQL best .*{told}.*policy: ", out, re.DOTALL)
    after_step = training._Trainer.after_step

    def interrupted(self: Any, step: int) -> None:
        after_step(self, step)
        if step == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "after_step", interrupted)
        assert main(["train", *options, "--run-dir", "stopped"]) == 130
    assert train_json(capfd, "--resume", "stopped", "--env", ENV)["warnings"] == whole["warnings"]
