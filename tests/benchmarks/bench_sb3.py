"""Gradient steps a second: IQL in Stable-Baselines3 against its own SAC, same sizes, interleaved in one process.

``python tests/benchmarks/bench_sb3.py`` prints the medians of each and the median of the ratios. The sizes are those
of the other benchmarks: observations 17, actions 6, batch 256, two critics, two hidden layers of 256.

``replay`` draws the batches of both from equal replay buffers, as ``learn`` does; ``offline`` draws ours from the
packed dataset, as ``learn_offline`` does; ``compiled`` is ``offline`` with losses and gradients compiled.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from iql_sb3 import IQL
from iql_sb3.spaces import stand_in

MODES = ("replay", "offline", "compiled")
OBSERVATION, ACTION, BATCH, TRANSITIONS = 17, 6, 256, 20_000
OBSERVATION_SPACE = gym.spaces.Box(-np.inf, np.inf, (OBSERVATION,))
ACTION_SPACE = gym.spaces.Box(-1.0, 1.0, (ACTION,))


def replay_buffer() -> ReplayBuffer:
    """Random transitions."""
    random = np.random.default_rng(0)
    buffer = ReplayBuffer(TRANSITIONS, OBSERVATION_SPACE, ACTION_SPACE, "cpu")
    buffer.observations[:] = random.normal(size=buffer.observations.shape)
    buffer.next_observations[:] = random.normal(size=buffer.observations.shape)
    buffer.actions[:] = random.uniform(-1.0, 1.0, size=buffer.actions.shape)
    buffer.rewards[:] = random.normal(size=buffer.rewards.shape)
    buffer.full = True
    return buffer


def model_of(mode: str) -> OffPolicyAlgorithm:
    """A model with its data."""
    buffer = replay_buffer()
    options = {"buffer_size": 1, "batch_size": BATCH, "seed": 0, "device": "cpu"}
    env = stand_in(OBSERVATION_SPACE, ACTION_SPACE)
    if mode == "sac":
        model: OffPolicyAlgorithm = SAC("MlpPolicy", env, **options)
        model.replay_buffer = buffer
    elif mode == "replay":
        model = IQL("MlpPolicy", env, **options)
        model.replay_buffer = buffer
    else:
        model = IQL("MlpPolicy", env, dataset=buffer, compile="yes" if mode == "compiled" else "no", **options)
    model.set_logger(configure(None, []))
    return model


def step_of(model: OffPolicyAlgorithm) -> Callable[[int], None]:
    """Takes that many gradient steps, one for each call of ``train``, as online learning does."""

    def steps(count: int) -> None:
        for _ in range(count):
            model.train(gradient_steps=1, batch_size=BATCH)

    return steps


def seconds(steps: Callable[[int], None], count: int) -> float:
    """Duration of one step."""
    start = time.perf_counter()
    steps(count)
    return (time.perf_counter() - start) / count


def measure(mode: str, rounds: int, repeats: int) -> dict[str, float]:
    """Medians over interleaved rounds."""
    steps = {"ours": step_of(model_of(mode)), "sac": step_of(model_of("sac"))}
    for step in steps.values():
        seconds(step, 10)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, repeats))
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["sac"], strict=True)]
    return {
        "ours_per_second": 1.0 / statistics.median(times["ours"]),
        "sac_per_second": 1.0 / statistics.median(times["sac"]),
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
    results = {mode: measure(mode, arguments.rounds, arguments.repeats) for mode in arguments.modes}
    if arguments.json:
        print(json.dumps({"threads": torch.get_num_threads(), "machine": platform.machine(), **results}))
    else:
        for mode, result in results.items():
            print(
                f"{mode:9} ours {result['ours_per_second']:6.1f}/s   SAC {result['sac_per_second']:6.1f}/s   "
                f"{result['ratio']:.2f} times as fast"
            )
