"""TorchRL's replay buffers as datasets. Imports no TorchRL, so that any source can be looked at."""

from typing import Any

import torch
from tensordict import TensorDictBase

from iql_plugins.data.dataset import Dataset, DatasetError, Options, is_of, reading, require_space, row_bytes
from iql_plugins.data.readers import tensordicts

__all__ = ["read_dataset"]


def read_dataset(source: object, options: Options) -> Dataset | None:
    """The dataset in a replay buffer's storage, oldest first, as of a TensorDict; None for anything else.

    The buffer's transforms, which act when it is sampled, are not applied.

    Raises:
        DatasetError: if it is empty or does not hold TensorDicts, or its writer does not keep the order of time.
    """
    if not is_of(source, "torchrl", "ReplayBuffer"):
        return None
    buffer: Any = source
    name = options.name or f"the TorchRL {type(buffer).__name__}"
    with reading(name):
        if len(buffer) == 0:
            raise DatasetError(f"{name} is empty: it has no transition")
        writer = buffer.writer
        writers = {base.__name__ for base in type(writer).__mro__}
        if "TensorDictMaxValueWriter" in writers:
            raise DatasetError(f"{name}: its {type(writer).__name__} keeps the best entries, not the order of time")
        data = buffer.storage[:]
        if isinstance(data, list | tuple):
            if not all(isinstance(item, TensorDictBase) for item in data):
                raise DatasetError(f"{name} must hold TensorDicts, got {type(data[0]).__name__}")
            data = torch.stack(list(data))
        if not isinstance(data, TensorDictBase):
            raise DatasetError(f"{name} must hold a TensorDict, got {type(data).__name__}")
        oldest = int(writer._cursor) if "RoundRobinWriter" in writers and len(buffer) == buffer.storage.max_size else 0
        if oldest % len(data):
            require_space(sum(len(data) * row_bytes(tensor) for tensor in data.values(True, True)), name, Options())
            data = torch.cat([data[oldest:], data[:oldest]])
        if buffer.dim_extend:
            data = data.transpose(0, buffer.dim_extend)
    return tensordicts.load(data, options, name)
