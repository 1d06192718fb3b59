"""Datasets as rows of few matrices, and those that stay on disk."""

from pathlib import Path

import pytest
import torch
from agents import ROWS, SPACES, make_dataset
from tensordict import TensorDict

from iql_plugins.config import IQLConfig
from iql_plugins.data import packed as module
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.data.packed import MappedDataset, PackedDataset, batch_source
from iql_plugins.keys import flat_name


def everything(dataset: TensorDict) -> dict[str, torch.Tensor]:
    return {flat_name(key): tensor for key, tensor in dataset.items(True, True)}


def assert_rows(batch: dict[str, torch.Tensor], dataset: TensorDict, index: torch.Tensor) -> None:
    expected = everything(dataset[index])
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype, name
        assert torch.equal(batch[name], tensor), name


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("chunk", [7, 65_536])
def test_a_batch_is_the_rows_that_were_asked_for(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    dataset = make_dataset(SPACES[kind])
    # Integers beyond what a float can hold, and entries without a trailing dimension.
    dataset["steps_to_next_obs"] = torch.full((ROWS, 1), 2**24 + 1)
    dataset["priority_weight"] = torch.rand(ROWS)
    index = torch.randint(ROWS, (33,))
    assert_rows(PackedDataset(dataset).batch(index), dataset, index)


@pytest.mark.parametrize("kind", SPACES)
def test_a_batch_is_transformed_as_its_rows_would_be(kind: str) -> None:
    dataset = make_dataset(SPACES[kind])
    transform = Normalizers.fit(dataset, SPACES[kind], IQLConfig(normalize_observations=True, reward_scale=2.0))
    index = torch.randint(ROWS, (33,))
    assert_rows(batch_source(dataset, transform).batch(index), transform(dataset), index)


def test_a_packed_dataset_takes_its_size_once() -> None:
    dataset = make_dataset(SPACES["image"], 50)
    source = PackedDataset(dataset)
    pixels, floats, integers = 2 * 36 * 36 * 3, (2 * 2 + 1 + 2) * 4, 8
    assert source.nbytes == 50 * (pixels + floats + integers)
    # They are its own: the caller's can go.
    dataset.zero_()
    assert source.batch(torch.arange(50))["observation_camera"].any()


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="the dataset is empty"):
        PackedDataset(make_dataset(SPACES["continuous"])[:0])


def test_a_mapped_dataset_stays_on_disk(tmp_path: Path) -> None:
    dataset = make_dataset(SPACES["continuous"])
    mapped = dataset.memmap(tmp_path)
    transform = Normalizers.fit(mapped, SPACES["continuous"], IQLConfig(normalize_observations=True))
    source = batch_source(mapped, transform, "cpu")
    assert isinstance(source, MappedDataset)
    assert len(source) == ROWS
    index = torch.randint(ROWS, (33,), device="cpu")
    assert_rows(source.batch(index), transform(dataset), index)
    held = vars(source)["_tensors"]
    assert held.keys() == set(mapped.keys(True, True))
    assert all(tensor.data_ptr() == mapped.get(key).data_ptr() for key, tensor in held.items())


def test_a_selection_of_a_mapped_dataset_is_mapped(tmp_path: Path) -> None:
    mapped = make_dataset(SPACES["continuous"]).memmap(tmp_path)
    assert isinstance(batch_source(mapped.select("observation", ("next", "reward"))), MappedDataset)


def test_batches_are_where_they_are_asked_for(device: torch.device, tmp_path: Path) -> None:
    dataset = make_dataset(SPACES["continuous"]).cpu()
    transform = Normalizers.fit(dataset, SPACES["continuous"], IQLConfig(normalize_observations=True)).to(device)
    index = torch.randint(ROWS, (4,), device=device)
    for source in (dataset, dataset.memmap(tmp_path)):
        batch = batch_source(source, transform, device).batch(index)
        assert {tensor.device.type for tensor in batch.values()} == {device.type}
