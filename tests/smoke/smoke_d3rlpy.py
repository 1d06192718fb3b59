"""A gradient step on a mini-batch of a d3rlpy dataset; our IQL trained, saved and loaded by d3rlpy."""

import tempfile
from pathlib import Path

import d3rlpy
import gymnasium
import numpy as np
from d3rlpy.logging import NoopAdapterFactory
from gradient_step import check_gradient_step

from iql_d3rlpy import IQLConfig, as_fast_buffer, plugin

MAX_TORQUE = 2.0


def random_dataset(steps: int) -> d3rlpy.dataset.MDPDataset:
    """Transitions of ``Pendulum-v1`` under random actions."""
    env = gymnasium.make("Pendulum-v1")
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    rows = []
    for _ in range(steps):
        action = env.action_space.sample()
        next_observation, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action / MAX_TORQUE, reward, terminated, truncated))
        observation = env.reset()[0] if terminated or truncated else next_observation
    # d3rlpy wants the last episode to end as well.
    rows[-1] = (*rows[-1][:-1], True)
    observations, actions, rewards, terminals, timeouts = map(np.array, zip(*rows, strict=True))
    return d3rlpy.dataset.MDPDataset(observations, actions, rewards, terminals.astype(float), timeouts.astype(float))


if __name__ == "__main__":
    dataset = random_dataset(400)
    batch = plugin.iql_map_batch(as_fast_buffer(dataset).sample_transition_batch(64))
    assert batch is not None
    check_gradient_step(batch)

    algorithm = IQLConfig(batch_size=64).create()
    algorithm.fit(dataset, n_steps=20, n_steps_per_epoch=20, logger_adapter=NoopAdapterFactory(), show_progress=False)
    observations = dataset.episodes[0].observations[:5]
    with tempfile.TemporaryDirectory() as folder:
        algorithm.save(Path(folder) / "iql.d3")
        loaded = d3rlpy.load_learnable(str(Path(folder) / "iql.d3"))
    assert (loaded.predict(observations) == algorithm.predict(observations)).all()
    print(f"20 steps of fit, saved and loaded: actions {loaded.predict(observations).reshape(-1).round(3).tolist()}")
