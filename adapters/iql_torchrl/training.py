"""An agent in TorchRL's hands: its loss a ``LossModule``, batches from TorchRL's replay buffer, files of torch."""

import io
import os
from collections.abc import Callable
from typing import Any, Self

import torch
from tensordict import MemoryMappedTensor, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import RandomSampler, TensorDictReplayBuffer, TensorStorage

from iql_plugins import checkpoint
from iql_plugins.checkpoint import CheckpointError
from iql_plugins.limits import load_torch
from iql_plugins.training.agent import Agent
from iql_plugins.training.algorithm import Algorithm
from iql_torchrl.batches import map_batch
from iql_torchrl.losses import IQLLoss

__all__ = ["IQL"]

_CONTAINER = "file of torch"


class IQL(Algorithm):
    """Implicit Q-Learning for who has an environment's data, and TorchRL's parts around the loss.

    Args:
        agent: the parts.

    Attributes:
        agent: the loss, its learner, the normalisers and the random state.
        loss: the agent's loss as TorchRL's ``LossModule``, over the very same networks, for TorchRL's trainers and
            loops of one's own. It takes batches of :meth:`replay_buffer`.

    >>> from iql_plugins import load_dataset
    >>> from iql_plugins.config import IQLConfig
    >>> from iql_plugins.spaces import Spaces
    >>> dataset = load_dataset("pendulum-v1-sac")
    >>> iql = IQL(Agent(Spaces.from_dataset(dataset), IQLConfig(n_steps=2), seed=0)).fit(dataset, n_steps=2)
    >>> sorted(iql.loss(iql.replay_buffer(dataset).sample()).keys())
    ['entropy', 'loss_actor', 'loss_qvalue', 'loss_value']
    """

    def __init__(self, agent: Agent) -> None:
        super().__init__(agent)
        self.loss = IQLLoss.from_core(agent.loss)

    def replay_buffer(self, dataset: TensorDictBase) -> TensorDictReplayBuffer:
        """TorchRL's replay buffer of a dataset; what it samples is in the networks' units.

        Transitions are drawn uniformly with replacement, by the agent's generator. A memory-mapped dataset stays on
        disk.

        Args:
            dataset: transitions by the key layout, batch size ``[N]``, in the environment's units. What the loss does
                not read is left out.

        Raises:
            ValueError: if the dataset is empty, or as :meth:`iql_plugins.training.agent.Agent.check`.
        """
        agent = self.agent
        agent.check(dataset)
        read = dataset.select(*agent.loss.accepted_keys, strict=False)
        if len(read) == 0:
            raise ValueError("the dataset is empty: it has no transition to draw")

        def transform(transitions: TensorDictBase) -> TensorDictBase:
            # First there, then normalised: the normalisers' numbers are where the networks are.
            return agent.normalizers(transitions.to(agent.device))

        mapped = any(isinstance(tensor, MemoryMappedTensor) for tensor in read.values(True, True))
        return TensorDictReplayBuffer(
            storage=_Mapped(read, device="cpu") if mapped else TensorStorage(transform(read), device=agent.device),
            sampler=_Sampler(agent, on_disk=mapped),
            transform=transform if mapped else None,
            batch_size=agent.config.batch_size,
        )

    def fit(self, dataset: TensorDictBase, n_steps: int, callback: Callable[[int], None] | None = None) -> Self:
        """Trains on batches of :meth:`replay_buffer`.

        Args:
            dataset: see there.
            n_steps: gradient steps, further ones if some were taken already.
            callback: called with the number of all steps after each of them.

        Returns:
            Itself.

        Raises:
            ValueError: as :meth:`replay_buffer`.
            DivergenceError: if losses or weights are no longer finite.
        """
        buffer = self.replay_buffer(dataset)

        def draw() -> TensorDictBase:
            batch = map_batch(buffer.sample())
            assert batch is not None
            return batch

        self.agent.train(draw, n_steps, callback)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it into one file, atomically, that ``torch.load(path, weights_only=True)`` reads.

        It is a dictionary: ``"loss"`` is the ``state_dict()`` of the loss, for ``loss.load_state_dict``; the others are
        those of the common checkpoint.
        """
        metadata, tensors = checkpoint.seal(*self.agent.state())
        names = {name: name.removeprefix("loss.") for name in tensors if name.startswith("loss.")}
        content = {
            **metadata,
            "loss": {short: tensors.pop(name) for name, short in names.items()},
            "tensors": tensors,
        }
        file = io.BytesIO()
        torch.save(content, file)
        checkpoint.write_bytes(path, file.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str], **arguments: Any) -> Self:
        """What :meth:`save` wrote.

        Args:
            path: the file.
            **arguments: those of :meth:`iql_plugins.training.agent.Agent.load`.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it is no such file, or holds no agent that fits the arguments.
        """
        name = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {name!r}")
        try:
            content = load_torch(path)
        except Exception as error:
            # Whatever torch raises for a file that is none of its own.
            raise CheckpointError(f"{name!r} is no {_CONTAINER}, or damaged: {error}") from error
        entries = content if isinstance(content, dict) else {}
        metadata = {key: value for key, value in entries.items() if isinstance(value, str)}
        tensors = _tensors(entries.get("loss"), "loss.") | _tensors(entries.get("tensors"), "")
        document = checkpoint.unseal(metadata, tensors, name, _CONTAINER)
        return cls(Agent.from_state(document, tensors, name=name, **arguments))


class _Mapped(TensorStorage):  # type: ignore[misc]
    """Transitions on disk, whose rows are read in half of the time."""

    def get(self, index: Any) -> TensorDictBase:
        drawn = isinstance(index, Tensor) and index.ndim == 1 and index.dtype is torch.int64 and index.is_cpu
        if not (drawn and bool((index >= 0).all())):
            return super().get(index)
        # Plain tensors of the same memory: those that know of their file take longer.
        rows = {
            key: tensor.as_subclass(Tensor).index_select(0, index) for key, tensor in self._storage.items(True, True)
        }
        return TensorDict(rows, batch_size=index.shape, device=self.device)


class _Sampler(RandomSampler):  # type: ignore[misc]
    """Draws as the agent does, with a generator that need not be where the storage is."""

    def __init__(self, agent: Agent, *, on_disk: bool) -> None:
        super().__init__()
        self._agent, self._on_disk = agent, on_disk

    def sample(self, storage: Any, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        agent = self._agent
        index = agent.learner.draw(len(storage), batch_size, agent.generator, on_disk=self._on_disk)
        return index.to(storage.device), {}


def _tensors(given: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors among whatever a file has, under the names of the common checkpoint."""
    entries = given.items() if isinstance(given, dict) else ()
    return {f"{prefix}{name}": tensor for name, tensor in entries if isinstance(tensor, Tensor)}
