"""A pendulum's policy from logged data to where there is no torch: one adapter trains it, another fine-tunes it.

1. ``--adapter`` (any; d3rlpy unless you say otherwise) trains on the dataset that ships, and the agent is saved.
2. Stable-Baselines3 loads it and goes on in the environment, with the dataset in every batch.
3. The policy is exported as ONNX, normalisation included.
4. NumPy and ONNX Runtime run it, in this process as well as where nothing else is installed.

Run it with::

    pip install 'iql-plugins[d3rlpy,sb3,onnx]'
    python examples/train_offline_then_serve.py
    python examples/train_offline_then_serve.py --serve policy.onnx  # needs numpy and onnxruntime alone
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DATASET, ENV = "pendulum-v1-sac", "Pendulum-v1"
CHECKPOINT, POLICY = "agent.safetensors", "policy.onnx"
EPISODES, EPISODE_LENGTH, SECONDS, MAX_TORQUE, MAX_SPEED = 20, 200, 0.05, 2.0, 8.0


def train_offline(adapter: str, steps: int, seed: int, path: Path) -> None:
    """Trains with an adapter, and saves the agent in the format of all of them."""
    import gymnasium as gym

    import iql_plugins
    from iql_plugins.config import preset
    from iql_plugins.data.normalizers import Normalizers
    from iql_plugins.spaces import Spaces
    from iql_plugins.training.agent import Agent

    dataset = iql_plugins.load_dataset(DATASET)
    env = gym.make(ENV)
    spaces = Spaces.from_gymnasium(env.observation_space, env.action_space)
    # The policy is to learn on when this training is over: its rate must not have gone to 0.
    config = preset("pendulum", n_steps=steps, actor_schedule="constant")
    agent = Agent(spaces, config, normalizers=Normalizers.fit(dataset, spaces, config), seed=seed)
    training = iql_plugins.load(adapter).training
    assert training is not None
    algorithm = training.from_agent(agent)
    training.fit(algorithm, dataset, steps, lambda step: None)
    training.to_agent(algorithm).save(path)


def fine_tune(path: Path, steps: int, seed: int) -> None:
    """Goes on in the environment with Stable-Baselines3, and saves the agent again."""
    import gymnasium as gym

    from iql_plugins.training.agent import Agent
    from iql_sb3 import IQL

    model = IQL.from_agent(Agent.load(path), gym.make(ENV), seed=seed)
    model.load_dataset(DATASET)
    model.learn(steps)
    model.to_agent().save(path)


def export(path: Path, policy: Path) -> None:
    """Writes the policy alone."""
    from iql_plugins.export import export_policy
    from iql_plugins.training.agent import Agent

    export_policy(Agent.load(path), policy)


def served(policy: Path) -> Callable[[Array], Array]:
    """What acts: from observations ``[B, 3]`` to torques ``[B, 1]``, in the environment's units."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(policy), providers=["CPUExecutionProvider"])

    def act(observation: Array) -> Array:
        action: Array = session.run(None, {"observation": observation})[0]
        return action

    return act


def mean_return(act: Callable[[Array], Array], seed: int = 0) -> float:
    """Over episodes of Gymnasium's Pendulum-v1, all at once."""
    random = np.random.default_rng(seed)
    angle, speed = random.uniform(-np.pi, np.pi, EPISODES), random.uniform(-1.0, 1.0, EPISODES)
    total = np.zeros(EPISODES)
    for _ in range(EPISODE_LENGTH):
        observation = np.stack([np.cos(angle), np.sin(angle), speed], axis=1).astype(np.float32)
        torque = np.clip(act(observation)[:, 0], -MAX_TORQUE, MAX_TORQUE)
        from_upright = (angle + np.pi) % (2.0 * np.pi) - np.pi
        total -= from_upright**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed = np.clip(speed + (15.0 * np.sin(angle) + 3.0 * torque) * SECONDS, -MAX_SPEED, MAX_SPEED)
        angle = angle + speed * SECONDS
    return float(total.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=Path, metavar="POLICY", help="run an exported policy, and nothing else")
    parser.add_argument("--adapter", default="d3rlpy", help="trains on the dataset (default: %(default)s)")
    parser.add_argument("--offline-steps", type=int, default=4000, help="gradient steps (default: %(default)s)")
    parser.add_argument("--online-steps", type=int, default=2000, help="steps in the environment (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the files go (default: here)")
    arguments = parser.parse_args()
    if arguments.serve is None:
        path, policy = arguments.folder / CHECKPOINT, arguments.folder / POLICY
        train_offline(arguments.adapter, arguments.offline_steps, arguments.seed, path)
        export(path, policy)
        print(f"offline    {mean_return(served(policy)):9.1f}")
        fine_tune(path, arguments.online_steps, arguments.seed)
        export(path, policy)
        print(f"fine-tuned {mean_return(served(policy)):9.1f}")
    else:
        print(f"served     {mean_return(served(arguments.serve)):9.1f}")


if __name__ == "__main__":
    main()
