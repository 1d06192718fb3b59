"""Private names of TorchRL, and of torch for it: nowhere else in this adapter, each with what does if it is gone."""

import torch
from torch import Tensor

__all__ = ["can_hold", "warnings_wanted"]


def warnings_wanted() -> bool:
    """Whether TorchRL warns: its ``RL_WARNINGS``, which no public name reads. Without it, it does."""
    try:
        from torchrl._utils import rl_warnings
    except ImportError:
        return True
    return bool(rl_warnings())


def can_hold(kept: Tensor, tensor: Tensor) -> bool:
    """Whether ``kept.data = tensor`` is possible: between devices it is not always, and nothing public tells."""
    compatible = getattr(torch, "_has_compatible_shallow_copy_type", None)
    if compatible is None:
        return kept.device.type == tensor.device.type and kept.layout == tensor.layout
    return bool(compatible(kept, tensor))
