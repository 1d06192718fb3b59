"""JSON documents for people and programs."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["finite_json"]


def finite_json(value: Any) -> Any:
    """JSON values; None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
