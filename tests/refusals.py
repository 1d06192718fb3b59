"""Datasets that are refused."""

from typing import Any

import pytest

from iql_plugins.data import DatasetError, load_dataset


def error(source: object, **options: Any) -> str:
    """What is said of a dataset that cannot be used, which is one line."""
    with pytest.raises(DatasetError) as raised:
        load_dataset(source, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message
