"""What TorchRL's loss leaves out (n-step discounts, masks, importance weights), against the paper in NumPy."""

import math

import numpy as np
import pytest
import torch
from conftest import make_batch, make_loss
from tensordict import TensorDict

from iql_plugins import IQLLoss
from iql_plugins.networks.parameters import call_critics, leaves

GAMMA, EXPECTILE, TEMPERATURE = 0.9, 0.7, 3.0


@pytest.fixture(autouse=True)
def float64() -> None:
    """The reference is in float64; so is everything here."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def predictions(loss: IQLLoss, batch: TensorDict) -> dict[str, np.ndarray]:
    """What the networks say about a batch, from the networks themselves."""

    def q(module: torch.nn.Module, tied: frozenset[str]) -> torch.Tensor:
        def call(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
            out = torch.func.functional_call(module, tensors, (batch.select("observation", "action"),))
            values = out["state_action_value"]
            return values if values.shape[-1] == 1 else values.gather(-1, batch["action"].unsqueeze(-1))

        return call_critics(call, leaves(module), 2, tied, vmap=False, randomness="different").squeeze(-1)

    with torch.no_grad():
        action = batch["action"]
        return {
            "q": q(loss.qvalue_network, frozenset()).numpy(force=True),
            "target_q": q(loss.get_stateful_net("target_qvalue_network", copy=False), frozenset()).numpy(force=True),
            "v": loss.value_network(batch.select("observation"))["state_value"].squeeze(-1).numpy(force=True),
            "next_v": loss.value_network(batch["next"].select("observation"))["state_value"]
            .squeeze(-1)
            .numpy(force=True),
            "log_prob": loss.actor_network.get_dist(batch.select("observation")).log_prob(action).numpy(force=True),
        }


def reference(
    loss: IQLLoss, batch: TensorDict, discount: np.ndarray, weight: np.ndarray, mask: np.ndarray
) -> dict[str, float]:
    """The paper's losses, one sample after the other."""
    p = predictions(loss, batch)
    reward, terminated = (batch["next", key].squeeze(-1).numpy(force=True) for key in ("reward", "terminated"))
    actor = critics = value = entropy = total = 0.0
    for i in np.ndindex(*batch.batch_size):
        if not mask[i]:
            continue
        advantage = min(p["target_q"][:, *i]) - p["v"][i]
        target = reward[i] + discount[i] * (0.0 if terminated[i] else p["next_v"][i])
        side = EXPECTILE if advantage > 0 else 1 - EXPECTILE
        actor += weight[i] * -min(math.exp(TEMPERATURE * advantage), 100.0) * p["log_prob"][i]
        critics += weight[i] * sum((q - target) ** 2 for q in p["q"][:, *i])
        value += weight[i] * side * advantage**2
        entropy += -p["log_prob"][i]
        total += weight[i]
    return {
        "loss_actor": actor / total,
        "loss_qvalue": critics / total,
        "loss_value": value / total,
        "entropy": entropy / mask.sum(),
    }


@pytest.mark.parametrize("steps", [None, "steps", "discount", "both"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(8,), (3, 4)])
def test_the_losses_equal_the_paper_in_numpy(
    kind: str, steps: str | None, weighted: bool, masked: bool, shape: tuple[int, ...]
) -> None:
    loss = make_loss(kind, expectile=EXPECTILE, temperature=TEMPERATURE, loss_function="l2")
    loss.make_value_estimator(gamma=GAMMA)
    with torch.no_grad():
        for target in loss.target_qvalue_network_params.values(True, True):
            target.add_(0.1 * torch.randn_like(target))
    batch = make_batch(kind, shape, dtype=torch.float64)
    n, discount = torch.randint(1, 5, (*shape, 1)), torch.rand(*shape, 1)
    weight, mask = torch.rand(shape) + 0.1, torch.rand(shape) < 0.7
    full = batch.clone()
    gammas = np.full(shape, GAMMA)
    if steps in ("steps", "both"):
        full["steps_to_next_obs"] = n
        gammas = GAMMA ** n.squeeze(-1).numpy(force=True)
    if steps in ("discount", "both"):
        full["next", "discount"] = discount
        gammas = discount.squeeze(-1).numpy(force=True)
    if weighted:
        full["priority_weight"] = weight
    if masked:
        full["collector", "mask"] = mask.unsqueeze(-1)
    outputs = loss(full)
    ones = np.ones(shape)
    expected = reference(
        loss,
        batch,
        gammas,
        weight.numpy(force=True) if weighted else ones,
        mask.numpy(force=True) if masked else ones.astype(bool),
    )
    for name, value in expected.items():
        assert outputs[name].item() == pytest.approx(value, rel=1e-10), name
