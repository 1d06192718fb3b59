"""Trains a policy for ``Pendulum-v1`` from logged transitions alone, by IQL and by behaviour cloning.

The plain loop to copy: scale the data, sample a batch, one backward pass of the summed losses, one
optimiser step, one step of the target critics. Behaviour cloning is the same loss with a temperature
of 0, which weighs every logged action alike. Run it with::

    pip install 'iql-plugins[cli]'
    python examples/train_pendulum.py --output pendulum
"""

import argparse
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from iql_plugins import IQLLoss, SoftUpdate
from iql_plugins.networks import critic, gaussian_actor, value_function

DATASET = files("iql_plugins") / "data/datasets/pendulum-v1-sac.npz"
MAX_TORQUE = 2.0
EXPECTILE, TEMPERATURE = 0.7, 3.0  # the paper's for locomotion
HIDDEN_SIZES = (128, 128)
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
TARGET_RATE = 0.005
EVALUATIONS = 10
EPISODES = 20


@dataclass
class Dataset:
    """Transitions by the key layout, in the units that the networks see, and what undoes the scaling.

    Attributes:
        transitions: batch size ``[N]``; observations standardised, actions in [-1, 1], rewards scaled.
        mean: of the observations.
        std: of the observations.
        mean_return: of the recorded episodes, in the environment's units.
    """

    transitions: TensorDict
    mean: Tensor
    std: Tensor
    mean_return: float


def load(path: Path) -> Dataset:
    """Reads ``observations``, ``actions``, ``rewards``, ``next_observations``, ``terminals`` and ``timeouts``."""
    with np.load(path) as file:
        data = {key: torch.from_numpy(file[key]).float() for key in file.files}
    mean, std = data["observations"].mean(0), data["observations"].std(0)
    terminated = data["terminals"].bool()
    # An episode that the time limit cut is done but not terminated: its last state has a future.
    done = terminated | data["timeouts"].bool()
    lengths = torch.diff(done.nonzero().flatten(), prepend=torch.tensor([-1]))
    returns = torch.stack([episode.sum() for episode in data["rewards"][: lengths.sum()].split(lengths.tolist())])
    # The temperature is relative to the scale of returns: the paper's locomotion tasks have theirs span 1000.
    reward_scale = 1000.0 / (returns.max() - returns.min())
    transitions = TensorDict(
        {
            "observation": (data["observations"] - mean) / std,
            "action": (data["actions"] / MAX_TORQUE).clamp(-1.0, 1.0),
            "next": {
                "observation": (data["next_observations"] - mean) / std,
                "reward": reward_scale * data["rewards"].unsqueeze(-1),
                "done": done.unsqueeze(-1),
                "terminated": terminated.unsqueeze(-1),
            },
        },
        batch_size=[len(done)],
    )
    return Dataset(transitions, mean, std, float(returns.mean()))


def train(data: Dataset, temperature: float, steps: int, seed: int) -> tuple[nn.Module, list[tuple[int, float]]]:
    """The policy after ``steps`` gradient steps, and its mean return along the way."""
    torch.manual_seed(seed)
    loss = IQLLoss(
        gaussian_actor(3, 1, hidden_sizes=HIDDEN_SIZES),
        critic(3, 1, hidden_sizes=HIDDEN_SIZES),
        value_function(3, hidden_sizes=HIDDEN_SIZES),
        loss_function="l2",
        expectile=EXPECTILE,
        temperature=temperature,
    )
    actor = loss.actor_network
    target_updater = SoftUpdate(loss, tau=TARGET_RATE)
    actor_optimizer = Adam(actor.parameters(), LEARNING_RATE, fused=True)
    critic_optimizer = Adam(
        [*loss.qvalue_network.parameters(), *loss.value_network.parameters()], LEARNING_RATE, fused=True
    )
    # Only the actor's rate decays, to 0 at the last step; a longer loop would have to hold it there.
    schedule = CosineAnnealingLR(actor_optimizer, T_max=steps)
    curve = []
    for step in range(1, steps + 1):
        batch = data.transitions[torch.randint(len(data.transitions), (BATCH_SIZE,))]
        losses = loss(batch)
        actor_optimizer.zero_grad()
        critic_optimizer.zero_grad()
        # Each loss reaches its own network alone, so that one backward pass trains all three.
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        actor_optimizer.step()
        critic_optimizer.step()
        schedule.step()
        target_updater.step()
        if step % max(steps // EVALUATIONS, 1) == 0 or step == steps:
            curve.append((step, evaluate(actor, data)))
    return actor, curve


@torch.no_grad()
def evaluate(actor: nn.Module, data: Dataset) -> float:
    """Mean return of ``EPISODES`` episodes, the same ones in each call, by the deterministic policy."""
    envs = gymnasium.make_vec("Pendulum-v1", num_envs=EPISODES)
    observations, _ = envs.reset(seed=0)
    returns, ended = np.zeros(EPISODES), False
    while not ended:
        batch = TensorDict({"observation": (torch.as_tensor(observations) - data.mean) / data.std}, [EPISODES])
        actions = MAX_TORQUE * actor(batch)["action"]
        observations, rewards, _, truncations, _ = envs.step(actions.numpy())
        returns += rewards
        ended = truncations.all()  # Pendulum has no terminal state: all episodes take 200 steps
    envs.close()
    return float(returns.mean())


def plot(curves: dict[str, list[tuple[int, float]]], mean_return: float, path: Path) -> None:
    """Writes the learning curves as an image."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", label=name)
    axes.axhline(mean_return, color="gray", linestyle="--", label="data")
    axes.set(xlabel="gradient steps", ylabel="mean return", title="Pendulum-v1 from logged data")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains both, prints a table, and writes ``policy.safetensors`` and ``learning_curve.png``."""
    parser = argparse.ArgumentParser(description="Train on logged Pendulum-v1 data by IQL and behaviour cloning.")
    parser.add_argument("--steps", type=int, default=4000, help="gradient steps of each method (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--data", type=Path, help=".npz file of transitions (default: the one that ships)")
    parser.add_argument("--output", type=Path, default=Path("pendulum"), help="directory (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # networks this small run slower on several cores

    if arguments.data is None:
        with as_file(DATASET) as path:
            data = load(path)
    else:
        data = load(arguments.data)
    curves = {}
    for name, temperature in (("behaviour cloning", 0.0), ("IQL", TEMPERATURE)):
        start = time.perf_counter()
        actor, curves[name] = train(data, temperature, arguments.steps, arguments.seed)
        print(f"{name}: {arguments.steps} steps in {time.perf_counter() - start:.0f} s")
    print(f"\n{'':20}mean return")
    print(f"{'data':20}{data.mean_return:11.1f}")
    for name, curve in curves.items():
        print(f"{name:20}{curve[-1][1]:11.1f}")

    arguments.output.mkdir(parents=True, exist_ok=True)
    # Whoever loads the policy has to scale observations as its training did.
    scaling = {"observation_mean": data.mean, "observation_std": data.std}
    save_file(actor.state_dict() | scaling, arguments.output / "policy.safetensors")
    plot(curves, data.mean_return, arguments.output / "learning_curve.png")
    print(f"\nwrote policy.safetensors and learning_curve.png to {arguments.output}")


if __name__ == "__main__":
    main()
