"""The adapter keeps to the contract of iql-plugins."""

import torch
from iql_tiny import Batch

from iql_plugins.testing import check_adapter


def test_the_adapter_keeps_to_the_contract() -> None:
    """Its hooks, its training, its files."""
    flag = torch.zeros(4, 1, dtype=torch.bool)
    batch = Batch(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4, 1), torch.zeros(4, 3), flag, flag)
    check_adapter("tiny", batch=batch)
