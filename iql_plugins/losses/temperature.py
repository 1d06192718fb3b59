"""An inverse temperature that no reward scale, data set or stage of a training asks to be set anew."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from iql_plugins import _compat

__all__ = ["AutomaticTemperature"]

#: Of log β a step, for an effective sample size that is off by 1.
STEP = 0.01
#: Of log β: what scales of returns there are, from a millionth to a million.
LIMIT = math.log(1e6)


class AutomaticTemperature(nn.Module):
    r"""β of ``temperature="auto"``: moves until the weights of a batch have a given effective sample size.

    .. math:: \log \beta \leftarrow \operatorname{clip}\big(\log \beta + 0.01\,(\text{ESS} - \text{target}),\,
        \pm \log 10^6\big)

    The effective sample size (:func:`~iql_plugins.losses.functional.effective_sample_size`) of exp(β A), before
    ``max_weight`` clips it and ``noise_threshold`` takes small advantages for none, falls as β grows, whatever the unit
    of the advantages is: there is one β for a target. It bounds how far the weighted data are from the data, as the KL
    of REPS (Peters, Mülling and Altun 2010) and of MPO (Abdolmaleki et al. 2018, arXiv:1812.02256;
    ``acme/tf/losses/mpo.py`` of github.com/google-deepmind/acme) does, by the Rényi divergence of order 2:
    log(1 / target). As there, and as the entropy coefficient of SAC (Haarnoja et al. 2018, arXiv:1812.05905;
    ``ent_coef="auto"`` of Stable-Baselines3, ``sac.py``, lines 183 to 252), it is a small step on a logarithm at each
    step of the training, and no solution for each batch. Samplers temper by the same size (Jasra et al. 2011).

    β begins at 1, in the middle of its range on a logarithmic scale: for a target of 0.7 it reaches 0.01 in 700 steps,
    and 100 in 1,500.

    Attributes:
        log_value: ``[]`` log β, in float32 at least: in half precision it would not move at all.
    """

    log_value: Tensor

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("log_value", torch.zeros((), dtype=dtype, device=device))

    @property
    def value(self) -> Tensor:
        """``[]`` β, without gradient."""
        return self.log_value.detach().exp()

    @torch.no_grad()
    def move(self, effective_sample_size: Tensor, target: float) -> None:
        """One step, on the device. A size that is no number, or 0 because no sample counts, moves nothing.

        Raises:
            RuntimeError: in a transform of ``torch.func`` that was not given this buffer.
        """
        step = torch.where(effective_sample_size > 0.0, STEP * (effective_sample_size - target), 0.0)
        moved = (self.log_value + step).clamp(-LIMIT, LIMIT).to(self.log_value.dtype)
        try:
            self.log_value.copy_(moved)
        except RuntimeError as error:
            if not _compat.in_transform():
                raise
            raise RuntimeError(
                "temperature='auto' moves a buffer, which a transform of torch.func must be given: functional_call("
                "loss, {**dict(loss.named_parameters()), **dict(loss.named_buffers())}, ...), or loss.eval() if "
                f"nothing is trained ({error})"
            ) from error

    def reset_parameters(self) -> None:
        """β is 1 again."""
        self.log_value.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.log_value
        applied: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if torch.finfo(self.log_value.dtype).bits < 32:
            self.log_value = before.to(self.log_value.device)
        return applied
