"""Records the dataset that ships as ``pendulum-v1-sac``: the replay of an SAC agent learning from scratch.

Stable-Baselines3's SAC with its own defaults learns ``Pendulum-v1`` for 20,000 steps; every transition
it saw is kept, from the first random ones to the last good ones. Run it with::

    pip install 'iql-plugins[sb3]'
    python examples/make_pendulum_dataset.py pendulum-v1-sac.npz
"""

import argparse

import gymnasium
import numpy as np
from stable_baselines3 import SAC

SEED = 0
STEPS = 20_000


def replay(steps: int, seed: int) -> dict[str, np.ndarray]:
    """The replay buffer of one SAC run, actions in environment units, one row a transition."""
    env = gymnasium.make("Pendulum-v1")
    model = SAC("MlpPolicy", env, seed=seed, buffer_size=steps, device="cpu")
    model.learn(steps)
    buffer = model.replay_buffer
    assert buffer is not None and buffer.full
    # Stable-Baselines3 stores actions scaled to [-1, 1].
    actions = model.policy.unscale_action(buffer.actions[:, 0])
    timeouts = buffer.timeouts[:, 0]
    return {
        "observations": buffer.observations[:, 0].astype(np.float32),
        "actions": actions.astype(np.float32),
        "rewards": buffer.rewards[:, 0].astype(np.float32),
        "next_observations": buffer.next_observations[:, 0].astype(np.float32),
        "terminals": (buffer.dones[:, 0] * (1 - timeouts)).astype(np.float32),
        "timeouts": timeouts.astype(np.float32),
    }


def episode_returns(data: dict[str, np.ndarray]) -> np.ndarray:
    """``[n_episodes]`` undiscounted returns of the complete episodes."""
    ends = np.flatnonzero(data["terminals"] + data["timeouts"]) + 1
    return np.array([part.sum() for part in np.split(data["rewards"], ends)[: len(ends)]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    data = replay(arguments.steps, arguments.seed)
    np.savez_compressed(arguments.path, **data)  # type: ignore[arg-type]
    returns = episode_returns(data)
    print(
        f"{len(data['rewards'])} transitions, {len(returns)} episodes, "
        f"mean return {returns.mean():.0f} ({returns.min():.0f} to {returns.max():.0f})"
    )
