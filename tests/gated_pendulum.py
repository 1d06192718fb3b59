"""Pendulum with episodes of ten steps that wait at a gate, so that tests can kill who plays them; rewards are alike.

``SWEEP_GATE`` is a file that names files beside it: while both are there, no episode begins.
``SWEEP_WORSE`` is a folder: the more folders are in it, the lower are rewards.
"""

import os
import time
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.envs.classic_control.pendulum import PendulumEnv


class GatedPendulum(PendulumEnv):
    def reset(self, **options: Any) -> Any:
        gate = Path(os.environ.get("SWEEP_GATE", "none"))
        while gate.exists() and any(gate.parent.glob(gate.read_text())):
            time.sleep(0.1)
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        observation, _, *rest = super().step(action)
        worse = os.environ.get("SWEEP_WORSE")
        return observation, -float(len(os.listdir(worse)) if worse else 0), *rest


gymnasium.register("GatedPendulum-v0", entry_point=GatedPendulum, max_episode_steps=10)
