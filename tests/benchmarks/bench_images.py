"""Gradient steps on images, of ours through three adapters, of d3rlpy's IQL and of Stable-Baselines3's SAC.

``python tests/benchmarks/bench_images.py``: frames of 4 by 84 by 84 bytes, batch 64, two actions. Every network has the
encoder of Mnih et al. 2015 with 512 features, and a linear layer behind it: both frameworks' default for images. Behind
each name is how many evaluations of encoders a step takes. ``compiled`` has losses and gradients of ours compiled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import d3rlpy
import gymnasium
import numpy as np
import structlog
import torch
import tyro
from contestants import (
    Size,
    config_of,
    d3rlpy_fit,
    d3rlpy_iql,
    dataset_of,
    fit,
    mdp_dataset,
    sac,
    sb3_environment,
    sb3_train,
)
from interleaved import Options, Steps, report
from stable_baselines3.common.logger import configure
from tensordict import TensorDict
from torch import nn

import iql_d3rlpy
from iql_plugins.cli.training import adapter_training
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent
from iql_sb3 import IQL

SIZE = Size(action=2, batch=64, transitions=400)
FRAME = (4, 84, 84)
Compiles = Literal["yes", "no"]


def frames() -> TensorDict:
    """Random transitions of images."""
    data, generator = dataset_of(SIZE), torch.Generator().manual_seed(0)
    observation = torch.randint(0, 256, (SIZE.transitions, *FRAME), dtype=torch.uint8, generator=generator)
    data["observation"], data["next", "observation"] = observation, observation.roll(-1, 0)
    return data


def environment() -> Any:
    """Of such images, never stepped."""
    return sb3_environment(SIZE, gymnasium.spaces.Box(0, 255, FRAME, np.uint8))


def tensor(compile: Compiles) -> Steps:
    """Ours on plain tensors."""
    spaces = Spaces(Box(FRAME, "uint8"), Box((SIZE.action,), "float32", (-1.0,) * SIZE.action, (1.0,) * SIZE.action))
    agent = Agent(spaces, config_of(SIZE, compile).replace(hidden_sizes=()), seed=0)
    return fit(adapter_training("tensor"), agent, frames())


def sb3(compile: Compiles, *, share: bool) -> Steps:
    """Ours through Stable-Baselines3."""
    policy_kwargs = {"net_arch": [], "share_features_extractor": share}
    model = IQL(
        "CnnPolicy",
        environment(),
        dataset=frames(),
        buffer_size=1,
        batch_size=SIZE.batch,
        policy_kwargs=policy_kwargs,
        compile=compile,
        device="cpu",
    )
    model.set_logger(configure(None, []))
    return sb3_train(model, SIZE)


def through_d3rlpy(compile: Compiles) -> Steps:
    """Ours through d3rlpy."""
    scaler = d3rlpy.preprocessing.PixelObservationScaler()
    config = iql_d3rlpy.IQLConfig(batch_size=SIZE.batch, observation_scaler=scaler, compile_graph=compile == "yes")
    return d3rlpy_fit(config.create(device="cpu:0"), mdp_dataset(frames()))


def d3rlpys(compile: Compiles) -> Steps:
    """d3rlpy's own, which compiles on GPUs alone."""
    scaler = d3rlpy.preprocessing.PixelObservationScaler()
    return d3rlpy_fit(d3rlpy_iql(SIZE, "cpu:0", observation_scaler=scaler), mdp_dataset(frames()))


def sb3s(compile: Compiles) -> Steps:
    """SAC, which does not compile."""
    model = sac(SIZE, frames(), environment(), policy="CnnPolicy", policy_kwargs={"net_arch": []}, device="cpu")
    return sb3_train(model, SIZE)


CONTESTANTS: dict[str, Callable[[Compiles], Steps]] = {
    "tensor": tensor,
    "sb3": partial(sb3, share=False),
    "sb3, shared": partial(sb3, share=True),
    "d3rlpy": through_d3rlpy,
    "d3rlpy's IQL": d3rlpys,
    "SB3's SAC": sb3s,
}


def evaluations(run: Steps) -> int:
    """How often a step evaluates an encoder, told by their first layers."""
    run(1)
    counts: list[int] = []

    def count(module: nn.Module, *_: Any) -> None:
        counts[-1] += isinstance(module, nn.Conv2d) and module.in_channels == FRAME[0]

    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        # What is done once a call is in both.
        for steps in (1, 2):
            counts.append(0)
            run(steps)
    finally:
        handle.remove()
    return counts[-1] - counts[-2]


def contestants(compile: Compiles) -> dict[str, Steps]:
    """All of them, ours first."""
    found = {}
    for name, make in CONTESTANTS.items():
        run = make("no")
        found[f"{name} ({evaluations(run)})"] = run if compile == "no" else make(compile)
    return found


if __name__ == "__main__":
    with structlog.testing.capture_logs():
        report({"eager": partial(contestants, "no"), "compiled": partial(contestants, "yes")}, tyro.cli(Options))
