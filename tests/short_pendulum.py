"""Pendulum with episodes of ten steps, so that tests of evaluations take no time."""

import gymnasium

gymnasium.register(
    "ShortPendulum-v0", entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=10
)
