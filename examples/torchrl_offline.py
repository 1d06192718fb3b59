"""Trains a policy for the pendulum from logged transitions, with TorchRL's modules, buffer, updater and environment.

It is a script for ``torchrl.objectives.IQLLoss`` with one line changed, the import of the loss. Run it with::

    pip install 'iql-plugins[torchrl]'
    python examples/torchrl_offline.py
"""

import argparse
from importlib.resources import as_file, files

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import ExplorationType, PendulumEnv, set_exploration_type
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import SoftUpdate, ValueEstimators

# Before: from torchrl.objectives import IQLLoss
from iql_torchrl import IQLLoss

OBSERVATION, ACTION, MAX_TORQUE = 3, 1, 2.0
HIDDEN = {"num_cells": [128, 128], "activation_class": nn.ReLU}
BATCH_SIZE = 256
OBSERVATION_SCALE = torch.tensor([1.0, 1.0, 8.0])  # cosine, sine, velocity
REWARD_SCALE, TEMPERATURE = 0.1, 10.0  # the temperature is relative to the scale of rewards
EPISODES, EPISODE_LENGTH = 20, 200


def transitions() -> TensorDict:
    """The dataset that ships, in TorchRL's layout."""
    with as_file(files("iql_plugins") / "data/datasets/pendulum-v1-sac.npz") as path, np.load(path) as file:
        data = {key: torch.from_numpy(file[key]) for key in file.files}
    terminated = data["terminals"].bool().unsqueeze(-1)
    return TensorDict(
        {
            "observation": data["observations"] / OBSERVATION_SCALE,
            "action": data["actions"],
            "next": {
                "observation": data["next_observations"] / OBSERVATION_SCALE,
                "reward": REWARD_SCALE * data["rewards"].unsqueeze(-1),
                "done": terminated | data["timeouts"].bool().unsqueeze(-1),
                "terminated": terminated,
            },
        },
        batch_size=[len(terminated)],
    )


def make_actor() -> ProbabilisticActor:
    """The policy: a Gaussian whose mean is within the bounds."""
    network = nn.Sequential(MLP(OBSERVATION, 2 * ACTION, **HIDDEN), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        distribution_kwargs={"tanh_loc": True, "upscale": MAX_TORQUE},
    )


def make_critic() -> ValueOperator:
    """Q(s, a)."""
    return ValueOperator(MLP(OBSERVATION + ACTION, 1, **HIDDEN), in_keys=["observation", "action"])


def train(steps: int, seed: int) -> tuple[nn.Module, list[dict[str, float]]]:
    """The policy after ``steps`` gradient steps, and the losses of each."""
    torch.manual_seed(seed)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(20_000), sampler=SamplerWithoutReplacement(), batch_size=BATCH_SIZE
    )
    buffer.extend(transitions())
    actor = make_actor()
    value = ValueOperator(MLP(OBSERVATION, 1, **HIDDEN), in_keys=["observation"])
    loss = IQLLoss(
        actor, [make_critic(), make_critic()], value, loss_function="l2", temperature=TEMPERATURE, expectile=0.7
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    updater = SoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(
        [
            *loss.actor_network_params.values(True, True),
            *loss.qvalue_network_params.values(True, True),
            *loss.value_network_params.values(True, True),
        ],
        lr=1e-3,
    )
    history = []
    for _ in range(steps):
        losses = loss(buffer.sample())
        optimizer.zero_grad()
        sum(tensor for key, tensor in losses.items() if key.startswith("loss_")).backward()
        optimizer.step()
        updater.step()
        history.append({key: tensor.item() for key, tensor in losses.items()})
    return actor, history


def angles_to_observation(angle: Tensor, velocity: Tensor) -> Tensor:
    """TorchRL's environment has the angle, the dataset its cosine and sine."""
    return torch.stack([angle.cos(), angle.sin(), velocity], -1) / OBSERVATION_SCALE


@torch.no_grad()
def evaluate(actor: nn.Module, seed: int = 0) -> float:
    """Mean return of the deterministic policy."""
    torch.manual_seed(seed)
    env = PendulumEnv()
    observe = TensorDictModule(angles_to_observation, in_keys=["th", "thdot"], out_keys=["observation"])
    start = env.reset(env.gen_params(batch_size=[EPISODES]), set_state=True)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        episodes = env.rollout(EPISODE_LENGTH, TensorDictSequential(observe, actor), auto_reset=False, tensordict=start)
    return float(episodes["next", "reward"].sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on logged pendulum data with TorchRL.")
    parser.add_argument("--steps", type=int, default=4000, help="gradient steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # networks this small run slower on several cores

    actor, history = train(arguments.steps, arguments.seed)
    for key, value in history[-1].items():
        print(f"{key:12}{value:10.4f}")
    print(f"mean return {evaluate(actor):9.1f}")


if __name__ == "__main__":
    main()
