"""Networks and batches of TorchRL's kind, and the comparison of two losses."""

from typing import Any

import torch
from conftest import ACTION, ACTIONS, OBSERVATION, gradients, make_batch
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
)
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import (
    MultiAgentMLP,
    OneHotCategorical,
    ProbabilisticActor,
    SafeModule,
    TanhNormal,
    ValueOperator,
)

FEATURES = 3


AGENTS = 2


KINDS = ["continuous", "one-hot", "categorical"]


class JoinedSequential(nn.Sequential):
    """Layers over the concatenation of the inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(torch.cat(inputs, -1))


def torchrl_networks(
    kind: str,
    *,
    shared: bool = False,
    prefix: tuple[str, ...] = (),
    value: NestedKey = "state_value",
    state_action_value: NestedKey = "state_action_value",
    action: NestedKey = "action",
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Actor, critic and V of TorchRL's modules; ``shared``: one trunk for actor and V."""
    observation = (*prefix, "observation") if prefix else "observation"
    first, second = nn.Linear(OBSERVATION, FEATURES), nn.Linear(OBSERVATION, FEATURES)
    body = nn.Sequential(first, nn.Tanh(), nn.Linear(FEATURES, 2 * ACTION if kind == "continuous" else ACTIONS))
    if kind == "continuous":
        parameter_keys: list[NestedKey] = [(*prefix, "loc"), (*prefix, "scale")] if prefix else ["loc", "scale"]
        body = nn.Sequential(body, NormalParamExtractor())
        distribution: type = TanhNormal
        critic_keys, critic_sizes = [observation, action], (OBSERVATION + ACTION, 1)
    else:
        parameter_keys = [(*prefix, "logits") if prefix else "logits"]
        distribution = OneHotCategorical if kind == "one-hot" else torch.distributions.Categorical
        critic_keys, critic_sizes = [observation], (OBSERVATION, ACTIONS)
    return (
        ProbabilisticActor(
            SafeModule(body, in_keys=[observation], out_keys=parameter_keys),
            in_keys=dict(zip(["loc", "scale"] if kind == "continuous" else ["logits"], parameter_keys, strict=True)),
            out_keys=[action],
            distribution_class=distribution,
        ),
        SafeModule(
            JoinedSequential(nn.Linear(critic_sizes[0], FEATURES), nn.Tanh(), nn.Linear(FEATURES, critic_sizes[1])),
            in_keys=critic_keys,
            out_keys=[state_action_value],
        ),
        ValueOperator(
            nn.Sequential(first if shared else second, nn.Tanh(), nn.Linear(FEATURES, 1)),
            in_keys=[observation],
            out_keys=[value],
        ),
    )


class MultiAgentCritic(nn.Module):
    """Q of each agent, from the observations and actions of its own, or of all."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.mlp(torch.cat([observation, action], -1))


def multi_agent_networks(*, shared: bool, centralised: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Actor, critic and V of ``AGENTS`` agents that share their parameters, or have each its own."""

    def mlp(features: int, outputs: int, *, centralised: bool = centralised) -> nn.Module:
        return MultiAgentMLP(
            n_agent_inputs=features,
            n_agent_outputs=outputs,
            n_agents=AGENTS,
            centralised=centralised,
            share_params=shared,
            depth=1,
            num_cells=FEATURES,
        )

    body = nn.Sequential(mlp(OBSERVATION, 2 * ACTION, centralised=False), NormalParamExtractor())
    return (
        ProbabilisticActor(
            SafeModule(body, in_keys=["observation"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=TanhNormal,
        ),
        SafeModule(
            MultiAgentCritic(mlp(OBSERVATION + ACTION, 1)),
            in_keys=["observation", "action"],
            out_keys=["state_action_value"],
        ),
        ValueOperator(mlp(OBSERVATION, 1), in_keys=["observation"]),
    )


def multi_agent_batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> TensorDict:
    """A batch of size ``shape`` with an entry for each agent: rewards are ``[*shape, agents, 1]``."""
    batch = batch_of("continuous", (*shape, AGENTS), dtype)
    batch.batch_size = batch["next"].batch_size = shape
    return batch


def batch_of(kind: str, shape: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float32) -> TensorDict:
    """A batch in which steps were terminated, truncated and neither."""
    batch = make_batch("continuous" if kind == "continuous" else "discrete", shape, dtype=dtype)
    if kind == "continuous":
        # Far from the bounds, so that rounding in float32 stays far below 1e-6.
        batch["action"] = batch["action"] / 2
    elif kind == "one-hot":
        batch["action"] = torch.nn.functional.one_hot(batch["action"], ACTIONS)
    terminated = torch.zeros(batch.numel(), dtype=torch.bool)
    done = terminated.clone()
    terminated[1] = done[1] = done[2] = True
    batch["next", "terminated"], batch["next", "done"] = terminated.view(*shape, 1), done.view(*shape, 1)
    return batch


def weighted(outputs: TensorDict) -> Tensor:
    """A sum in which the three losses, and the entries of unreduced ones, weigh differently."""
    total = torch.zeros(())
    for weight, key in ((0.5, "loss_actor"), (0.25, "loss_qvalue"), (1.0, "loss_value")):
        loss = outputs[key].flatten()
        total = total + weight * (loss * torch.linspace(0.5, 1, len(loss), dtype=loss.dtype)).sum()
    return total


def results(loss: nn.Module, batch: TensorDict) -> dict[str, Any]:
    """Everything that a call returns, writes, and gives to a backward pass."""
    batch = batch.copy()
    outputs = loss(batch)
    return {
        "outputs": dict(outputs.items()),
        "gradients": gradients(loss, outputs, weighted),
        "written": {key: batch[key] for key in (loss.tensor_keys.priority, loss.tensor_keys.log_prob)},
    }


def assert_equal_results(losses: tuple[Any, Any], batch: TensorDict, tolerance: float = 1e-6) -> None:
    ours, theirs = (results(loss, batch) for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


RENAMED: dict[str, NestedKey] = {
    "value": "v",
    "action": "act",
    "log_prob": "lp",
    "priority": "prio",
    "state_action_value": "q",
    "reward": "rew",
    "done": "over",
    "terminated": "dead",
}


NESTED: dict[str, NestedKey] = {name: ("agent", f"its_{name}") for name in RENAMED}
