"""What CONTRIBUTING.md says of adding something is followed, to the letter."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents import SPACES, make_agent, make_dataset
from strangers import good, host_of
from torch.nn.functional import huber_loss

from iql_plugins import IQLLoss
from iql_plugins.config import IQLConfig, hyperparameters
from iql_plugins.data import Dataset, Options
from iql_plugins.data.arrays import Transitions
from iql_plugins.hookspecs import hookimpl
from iql_plugins.losses import objectives

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(what: str) -> str:
    """The code under a bold heading."""
    found = re.search(rf"\*\*{what}\*\*.*?```\w+\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    assert found[1].count("\n") <= 6
    return found[1]


def test_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "_TABLES", {kind: dict(table) for kind, table in objectives._TABLES.items()})

    def huber(advantage: torch.Tensor, width: float) -> torch.Tensor:
        return huber_loss(advantage, torch.zeros_like(advantage), reduction="none", delta=width)

    exec(block("An objective"), {"huber_loss": huber})
    agent = make_agent("continuous", value_objective="huber", objective_options={"width": 0.5})
    agent.fit(make_dataset(SPACES["continuous"]).cpu(), 2)
    assert agent.learner.step_count == 2


def test_a_reader(tmp_path: Path) -> None:
    names: dict[str, Any] = {"hookimpl": hookimpl, "json": json, "np": np, "Path": Path, "Transitions": Transitions}
    exec(block("A reader"), names | {"Dataset": Dataset, "Options": Options}, names)
    columns = {"observations": [[0.0], [1.0]], "actions": [[0.5], [0.25]], "rewards": [1.0, 2.0], "terminals": [0, 1]}
    (tmp_path / "d.json").write_text(json.dumps(columns | {"next_observations": [[1.0], [2.0]]}))
    host = host_of(good(iql_read_dataset=names["iql_read_dataset"]), strict=True)
    dataset = host.read_dataset(tmp_path / "d.json", Options())
    assert dataset.tensors["next", "reward"].squeeze(-1).tolist() == [1.0, 2.0]


def test_a_hyper_parameter_reaches_every_place_that_takes_it() -> None:
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("d3rlpy")
    from hyperparameter_table import D3RLPY, sb3

    from iql_d3rlpy import IQLConfig as D3rlpyConfig
    from iql_d3rlpy.algorithm import named
    from iql_plugins.cli.arguments import HelpRequest, parse
    from iql_sb3 import IQL, IQLPolicy

    with pytest.raises(HelpRequest) as help_text:
        parse(["train", "--help"])
    arguments = inspect.signature(IQL.__init__).parameters.keys()
    of_policy = inspect.signature(IQLPolicy.__init__).parameters.keys()
    for name in hyperparameters():
        assert f"--{name.replace('_', '-')}" in str(help_text.value), name
        assert name in named(D3rlpyConfig) or name in D3RLPY, name
        theirs = sb3(name).strip("`")
        inner = re.fullmatch(r'policy_kwargs\["(\w+)"\]', theirs)
        assert (inner[1] in of_policy) if inner else (theirs in arguments), name
    for name in hyperparameters("loss"):
        assert name in inspect.signature(IQLLoss.__init__).parameters, name
    assert "tests/hyperparameter_table.py" in block("A hyper-parameter")
    assert IQLConfig().of("loss").keys() == set(hyperparameters("loss"))


def test_an_adapter() -> None:
    """``test_third_party.py`` does what these lines say."""
    lines = block("An adapter").splitlines()
    tested = (ROOT / "tests" / "test_third_party.py").read_text(encoding="utf-8")
    assert lines[0] == "iql-plugins adapters --new tiny"
    assert '"adapters", "--new", "tiny"' in tested
    assert lines[1] == "pip install -e ./iql-tiny"
    assert '"pip", "install", *offline, project' in tested
    assert lines[2] == "pytest iql-tiny/test_tiny.py"
    assert '"-m", "pytest", "-q"' in tested
    assert '"iql-tiny" / "test_tiny.py"' in tested
    assert lines[3] == "iql-plugins train --adapter tiny"
    assert '"train", "--adapter", "tiny"' in tested
