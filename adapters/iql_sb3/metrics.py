"""A model's metrics in Stable-Baselines3's log."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.logger import KVWriter, Logger

if TYPE_CHECKING:
    from iql_sb3.iql import IQL

__all__ = ["Metrics"]


class Metrics(KVWriter):
    """Comes before a logger's other outputs, and adds a model's metrics to what they are about to write.

    Attributes:
        model: the one that has trained last with this logger, as long as there is one.
    """

    def __init__(self) -> None:
        self.model: Callable[[], IQL | None] = _nobody

    def __getstate__(self) -> dict[str, Any]:
        return {"model": _nobody}

    @classmethod
    def of(cls, logger: Logger) -> "Metrics":
        """A logger's own."""
        own = next((writer for writer in logger.output_formats if isinstance(writer, cls)), None)
        if own is None:
            own = cls()
            logger.output_formats.insert(0, own)
        return own

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Adds them; ``DivergenceError`` if losses or weights are no longer finite."""
        if (model := self.model()) is None:
            return
        metrics = {f"train/{name}": value for name, value in model.metrics().items()}
        key_values.update(metrics)
        key_excluded.update(dict.fromkeys(metrics, ("",)))

    def close(self) -> None:
        """Nothing is open."""


def _nobody() -> None:
    return None
