"""A policy with its scalers as one file, for elsewhere."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iql_d3rlpy.impl import IQLImpl
from iql_plugins import checkpoint
from iql_plugins.export import exporters_quiet, onnx_content, torchscript_content

__all__ = ["export_policy"]


def export_policy(impl: IQLImpl, config: Any, path: str | os.PathLike[str]) -> None:
    """Writes what ``predict`` does, see :meth:`iql_d3rlpy.algorithm.BaseIQL.save_policy`.

    Args:
        impl: has the policy.
        config: has the scalers.
        path: ``.onnx`` or ``.pt``; replaced in one step.
    """
    write: Any = {".onnx": _onnx, ".pt": torchscript_content}.get(Path(path).suffix)
    if write is None:
        raise ValueError(f"a policy is saved as .onnx or .pt, got {os.fspath(path)!r}")
    policy = _Policy(impl, config)
    shapes = impl.observation_shape if len(impl.keys) > 1 else [impl.observation_shape]
    example = tuple(torch.rand(2, *shape, device="cpu") for shape in shapes)
    with exporters_quiet(), torch.no_grad():
        # Scalers make their tensors when they are first used, which must not be a part of the graph.
        policy(*example)
        content = write(policy, example)
    checkpoint.write_bytes(path, content)


class _Policy(nn.Module):
    """A frozen copy, on the CPU."""

    def __init__(self, impl: IQLImpl, config: Any) -> None:
        super().__init__()
        self.impl = copy.copy(impl)
        self.actor = copy.deepcopy(impl.policy).cpu().requires_grad_(False).eval()
        self.observation_scaler, self.action_scaler = (
            # Anew: a scaler keeps tensors on the device where it was used.
            scaler and type(scaler).deserialize_from_dict(scaler.serialize_to_dict())
            for scaler in (config.observation_scaler, config.action_scaler)
        )

    def forward(self, *observations: Tensor) -> Tensor:
        """Actions in the environment's units from observations."""
        x: Any = list(observations) if len(observations) > 1 else observations[0]
        if self.observation_scaler is not None:
            x = self.observation_scaler.transform(x)
        action = self.impl.greedy_action(x, self.actor)
        return action if self.action_scaler is None else self.action_scaler.reverse_transform(action)


def _onnx(policy: _Policy, example: tuple[Tensor, ...]) -> bytes:
    inputs = [f"input_{index}" for index in range(len(example))]
    return onnx_content(policy, example, inputs=inputs, output="output_0", packages=("onnx", "onnxscript"))
