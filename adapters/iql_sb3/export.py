"""The policy as one file for elsewhere."""

import io
import os
import warnings
from typing import Literal

import torch

from iql_plugins import checkpoint, export
from iql_plugins.training.agent import Agent

__all__ = ["export_policy"]

Format = Literal["onnx", "torchscript", "torch"]


def export_policy(agent: Agent, path: str | os.PathLike[str], format: Format) -> None:
    """Writes the deterministic policy: observations in, actions in the environment's units and bounds out.

    Args:
        agent: whose policy it is.
        path: replaced in one step.
        format: ``"torchscript"`` for ``torch.jit.load(path)(observation)``; the others are those of
            :func:`iql_plugins.export.export_policy`.

    Raises:
        ValueError: for another format.
        FileNotFoundError: if the folder of ``path`` does not exist.
    """
    if format in ("onnx", "torch"):
        export.export_policy(agent, path, format)
        return
    if format != "torchscript":
        raise ValueError(f"format must be 'onnx', 'torchscript' or 'torch', got {format!r}")
    policy = export.PolicyModule(agent)
    example = tuple(export.random_observations(agent, 2, seed=1))
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # torch deprecates TorchScript; whoever asks for it knows.
        warnings.simplefilter("ignore")
        # A function, of which weights are constants: TorchScript cannot look into tensordict's modules.
        other = tuple(export.random_observations(agent, 5, seed=2))
        traced = torch.jit.trace(lambda *observations: policy(*observations), example, check_inputs=[other])
        torch.jit.save(traced, file)
    checkpoint.write_bytes(path, file.getvalue())
