"""Small agents of every kind of space, and datasets for them."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from iql_plugins.config import IQLConfig
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.losses import objectives
from iql_plugins.spaces import Box, Discrete, Space, Spaces
from iql_plugins.training.agent import Agent

BOUNDS = Box((2,), low=(-1.0, 0.0), high=(2.0, 5.0))
SPACES = {
    "continuous": Spaces(Box((3,)), BOUNDS),
    "discrete": Spaces(Box((3,)), Discrete(4, start=1)),
    "dict": Spaces({"speed": Box((2,)), "gear": Discrete(3, start=-1)}, BOUNDS),
    "image": Spaces({"camera": Box((36, 36, 3), "uint8"), "speed": Box((2,))}, Discrete(3)),
}
ROWS = 80
#: Each value objective that ships with each policy extraction, IQL's own two left out: what every training takes.
OBJECTIVES: dict[str, dict[str, Any]] = {
    f"{value.name}-{policy.name}": {"value_objective": value.name, "policy_extraction": policy.name}
    for value in objectives.SHIPPED
    for policy in objectives.SHIPPED
    if isinstance(value, objectives.ValueObjective) and isinstance(policy, objectives.PolicyExtraction)
    if (value.name, policy.name) != ("expectile", "awr")
}
#: What has a state, and what is of the critics' disagreement.
OBJECTIVES["automatic"] = {"temperature": "auto_0.5", "objective_options": {"noise_threshold": 1.0}}

#: Each hyper-parameter of the networks alone in another value than its default, and all of them.
NETWORKS: dict[str, dict[str, Any]] = {
    name: {name: value}
    for name, value in {
        "actor_hidden_sizes": (6, 5),
        "critic_hidden_sizes": (7,),
        "activation": "gelu",
        "actor_layer_norm": True,
        "critic_layer_norm": True,
        "value_layer_norm": True,
        "value_dropout": 0.5,
        "initialization": "torch",
    }.items()
}
NETWORKS["all"] = {name: value for options in NETWORKS.values() for name, value in options.items()}


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes whoever draws orthogonal weights fail."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are drawn")

    monkeypatch.setattr(nn.init, "orthogonal_", fail)
    monkeypatch.setattr(torch.linalg, "qr", fail)


def draw(space: Space, rows: int = ROWS) -> Tensor:
    """Random observations or actions of a space, ``[rows, ...]``, by the layout."""
    if isinstance(space, Discrete):
        return torch.randint(space.start, space.start + space.n, (rows, 1))
    if space.dtype == "uint8":
        return torch.randint(0, 256, (rows, *space.shape), dtype=torch.uint8)
    if space.low is None or space.high is None:
        return torch.randn(rows, *space.shape)
    low, high = torch.tensor(space.low), torch.tensor(space.high)
    return low + (high - low) * torch.rand(rows, *space.shape)


def observations(spaces: Spaces, rows: int = ROWS) -> Any:
    """Random observations, nested for Dict spaces."""
    if isinstance(spaces.observation, Box | Discrete):
        return draw(spaces.observation, rows)
    return {name: draw(space, rows) for name, space in spaces.observation.items()}


def make_dataset(spaces: Spaces, rows: int = ROWS) -> TensorDict:
    """Random transitions by the key layout; every tenth ends an episode, every other one of these is terminal."""
    number = torch.arange(rows).unsqueeze(-1)
    return TensorDict(
        {
            "observation": observations(spaces, rows),
            "action": draw(spaces.action, rows),
            "next": {
                "observation": observations(spaces, rows),
                "reward": torch.randn(rows, 1),
                "done": number % 10 == 9,
                "terminated": number % 20 == 19,
            },
        },
        batch_size=[rows],
    )


def make_agent(kind: str, dataset: TensorDict | None = None, **hyperparameters: Any) -> Agent:
    """An agent with small networks that does not compile; with normalisers of a dataset, if there is one."""
    spaces, device = SPACES[kind], torch.empty(0).device
    config = IQLConfig(n_steps=20, batch_size=8, hidden_sizes=(8,), compile="no").replace(**hyperparameters)
    normalizers = None if dataset is None else Normalizers.fit(dataset, spaces, config)
    return Agent(spaces, config, normalizers=normalizers, seed=0, device=device)


def weights(agent: Agent) -> dict[str, Tensor]:
    """A copy of everything that training changes in the loss."""
    return {name: tensor.clone() for name, tensor in agent.loss.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two copies are equal, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
