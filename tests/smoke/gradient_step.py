"""The check that every framework's smoke test ends with."""

import torch
from tensordict import TensorDictBase

from iql_plugins import IQLLoss, SoftUpdate
from iql_plugins.networks import critic, gaussian_actor, value_function


def check_gradient_step(batch: TensorDictBase) -> None:
    """One step on a batch of Pendulum-v1: all losses finite, every network and the targets changed."""
    torch.manual_seed(0)
    loss = IQLLoss(gaussian_actor(3, 1), critic(3, 1), value_function(3))
    updater = SoftUpdate(loss, tau=0.5)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
    before = {name: tensor.clone() for name, tensor in loss.named_parameters()}
    before_targets = loss.target_qvalue_network_params.data.clone()

    losses = loss(batch)
    (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
    optimizer.step()
    updater.step()

    for name, value in losses.items():
        assert value.isfinite(), f"{name} is {value}"
    for name, tensor in loss.named_parameters():
        assert tensor.isfinite().all(), f"{name} is not finite"
        assert not torch.equal(tensor, before[name]), f"{name} did not change"
    assert (loss.target_qvalue_network_params.data != before_targets).any(), "the targets did not change"
    print(", ".join(f"{name} {value.item():.4f}" for name, value in losses.items()))
