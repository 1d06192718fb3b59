"""Forward and backward of our loss against TorchRL's: same networks, same batch, interleaved in one process.

``python tests/benchmarks/bench_loss.py`` prints the median of each and the median of the ratios. The sizes
are the headline's: observations 17, actions 6, batch 256, two critics, two hidden layers of 256.

``eager`` and ``wrapped`` call both classes alike, the latter through ``torch.compile(loss)``. ``compiled`` is the
fastest compiled route that each class has: ours makes one graph of losses and gradients
(``iql_plugins.gradients.LossGradients``), TorchRL's is ``torch.compile(loss)`` and a backward pass.
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torchrl.objectives
from tensordict import TensorDict

import iql_plugins
from iql_plugins.gradients import LossGradients
from iql_plugins.keys import flat_name
from iql_plugins.networks import critic, gaussian_actor, value_function

MODES = ("eager", "wrapped", "compiled")
OBSERVATION, ACTION, BATCH = 17, 6, 256


def batch(size: int) -> TensorDict:
    """A random batch by the key layout."""
    return TensorDict(
        {
            "observation": torch.randn(size, OBSERVATION),
            "action": torch.rand(size, ACTION) * 2 - 1,
            "next": {
                "observation": torch.randn(size, OBSERVATION),
                "reward": torch.randn(size, 1),
                "done": torch.zeros(size, 1, dtype=torch.bool),
                "terminated": torch.zeros(size, 1, dtype=torch.bool),
            },
        },
        [size],
    )


def loss_of(loss_class: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """A loss over the paper's networks, with the paper's hyper-parameters."""
    torch.manual_seed(0)
    return loss_class(
        gaussian_actor(OBSERVATION, ACTION),
        critic(OBSERVATION, ACTION),
        value_function(OBSERVATION),
        expectile=0.7,
        temperature=3.0,
        loss_function="l2",
    )


def step_of(loss: torch.nn.Module, compiled: bool) -> Callable[[TensorDict], None]:
    """One forward and backward pass through the public TensorDict call."""
    call = torch.compile(loss) if compiled else loss

    def step(data: TensorDict) -> None:
        losses = call(data)
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        for parameter in loss.parameters():
            parameter.grad = None

    return step


def one_graph(loss: iql_plugins.IQLLoss) -> Callable[[TensorDict], None]:
    """Losses and gradients as one compiled graph."""
    loss.target_updater_attached()
    gradients = LossGradients(loss, compile=True)

    def step(data: TensorDict) -> None:
        gradients({flat_name(key): tensor for key, tensor in data.items(True, True)})
        for parameter in loss.parameters():
            parameter.grad = None

    return step


def seconds(step: Callable[[TensorDict], None], data: TensorDict, repeats: int) -> float:
    """Mean duration of one step."""
    start = time.perf_counter()
    for _ in range(repeats):
        step(data.copy())
    return (time.perf_counter() - start) / repeats


def measure(mode: str, rounds: int, repeats: int) -> dict[str, float]:
    """Medians over interleaved rounds."""
    ours = loss_of(iql_plugins.IQLLoss)
    steps = {
        "ours": one_graph(ours) if mode == "compiled" else step_of(ours, mode == "wrapped"),
        "torchrl": step_of(loss_of(torchrl.objectives.IQLLoss), mode != "eager"),
    }
    data = batch(BATCH)
    for step in steps.values():
        seconds(step, data, 10)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, data, repeats))
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["torchrl"], strict=True)]
    return {
        "ours_ms": 1e3 * statistics.median(times["ours"]),
        "torchrl_ms": 1e3 * statistics.median(times["torchrl"]),
        "ratio": statistics.median(ratios),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    results = {mode: measure(mode, arguments.rounds, arguments.repeats) for mode in arguments.modes}
    if arguments.json:
        print(json.dumps({"threads": torch.get_num_threads(), "machine": platform.machine(), **results}))
    else:
        for mode, result in results.items():
            print(
                f"{mode:9} ours {result['ours_ms']:6.2f} ms   torchrl {result['torchrl_ms']:6.2f} ms   "
                f"{result['ratio']:.2f} times as fast"
            )
