"""Forward and backward of our loss against TorchRL's: same networks, same batch.

``python tests/benchmarks/bench_loss.py``, at the headline's sizes (``contestants.Size``).

``eager`` and ``wrapped`` call both classes alike, the latter through ``torch.compile(loss)``. ``compiled`` is the
fastest compiled route that each class has: ours makes one graph of losses and gradients
(``iql_plugins.training.gradients.LossGradients``), TorchRL's is ``torch.compile(loss)`` and a backward pass.
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torchrl.objectives
import tyro
from contestants import Size, dataset_of
from interleaved import Options, Steps, report

import iql_plugins
from iql_plugins.keys import flat_name
from iql_plugins.networks import critic, gaussian_actor, value_function
from iql_plugins.training.gradients import LossGradients

SIZE = Size(transitions=256)


def loss_of(loss_class: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """A loss over the paper's networks, with the paper's hyper-parameters."""
    torch.manual_seed(0)
    return loss_class(
        gaussian_actor(SIZE.observation, SIZE.action),
        critic(SIZE.observation, SIZE.action),
        value_function(SIZE.observation),
        expectile=0.7,
        temperature=3.0,
        loss_function="l2",
    )


def steps_of(loss: torch.nn.Module, *, wrapped: bool) -> Steps:
    """Forward and backward passes through the public TensorDict call."""
    call, data = torch.compile(loss) if wrapped else loss, dataset_of(SIZE)

    def steps(count: int) -> None:
        for _ in range(count):
            losses = call(data.copy())
            (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
            for parameter in loss.parameters():
                parameter.grad = None

    return steps


def one_graph(loss: iql_plugins.IQLLoss) -> Steps:
    """Losses and gradients as one compiled graph."""
    loss.target_updater_attached()
    gradients, data = LossGradients(loss, compile=True), dataset_of(SIZE)

    def steps(count: int) -> None:
        for _ in range(count):
            gradients({flat_name(key): tensor for key, tensor in data.copy().items(True, True)})
            for parameter in loss.parameters():
                parameter.grad = None

    return steps


def contestants(mode: str) -> dict[str, Steps]:
    """Ours and TorchRL's."""
    ours = loss_of(iql_plugins.IQLLoss)
    return {
        "ours": one_graph(ours) if mode == "compiled" else steps_of(ours, wrapped=mode == "wrapped"),
        "torchrl": steps_of(loss_of(torchrl.objectives.IQLLoss), wrapped=mode != "eager"),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    report({mode: partial(contestants, mode) for mode in ("eager", "wrapped", "compiled")}, tyro.cli(Options))
