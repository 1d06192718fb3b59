"""Private names of d3rlpy's objects: each with what happens if it is gone."""

from collections.abc import Sequence
from typing import Any

from d3rlpy.dataset import (
    BufferProtocol,
    FrameStackTransitionPicker,
    MixedReplayBuffer,
    MultiStepTransitionPicker,
    ReplayBufferBase,
    TransitionPickerProtocol,
)

__all__ = ["device_name", "held_transitions", "picker_settings", "writer_preprocessor"]


def picker_settings(picker: TransitionPickerProtocol) -> tuple[int | None, int, float | None]:
    """Frames of a stack, None for none; steps of a transition; the discount of their sum, None for single steps.

    Raises:
        AttributeError: if d3rlpy does not keep them any more: other transitions would be made.
    """
    if isinstance(picker, FrameStackTransitionPicker):
        return picker._n_frames, 1, None
    if isinstance(picker, MultiStepTransitionPicker):
        return None, picker._n_steps, picker._gamma
    return None, 1, None


def writer_preprocessor(buffer: ReplayBufferBase) -> Any:
    """The preprocessor of what a buffer's writer writes, None for a buffer without a writer, as a mixture is.

    Raises:
        AttributeError: if d3rlpy does not keep it any more: a copy without it would write other rewards.
    """
    return None if isinstance(buffer, MixedReplayBuffer) else buffer._writer._preprocessor


def device_name(device: Any) -> str:
    """What d3rlpy makes of its ``device``: True, an index or a name; False and None are the CPU."""
    if isinstance(device, bool):
        return "cuda:0" if device else "cpu"
    if isinstance(device, int):
        return f"cuda:{device}"
    return str(device) if device else "cpu"


def held_transitions(buffer: BufferProtocol) -> Sequence[tuple[Any, int]]:
    """An episode and a step for each transition, in the order of their coming: to index them takes a queue's time."""
    held: Sequence[tuple[Any, int]] = buffer._transitions
    return held
