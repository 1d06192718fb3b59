"""Adapters and datasets through the package itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from agents import SPACES, make_dataset
from tensordict import TensorDict
from test_registry import good, registry

import iql_plugins
from iql_plugins import host
from iql_plugins.data import DatasetError
from iql_plugins.registry import Registry

ADAPTERS = sorted(Registry().available())
FRAMEWORKS = {"sb3": "stable_baselines3", "d3rlpy": "d3rlpy", "torchrl": "torchrl"}


def fresh(code: str) -> Any:
    """What a fresh interpreter prints as JSON in its last line."""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def test_importing_makes_no_registry_and_listing_imports_no_adapter() -> None:
    seconds, before, modules = fresh(
        "import json, sys, time, iql_plugins;"
        "before = 'pluggy' in sys.modules or 'iql_plugins.registry' in sys.modules;"
        "start = time.perf_counter(); names = list(iql_plugins.available()); end = time.perf_counter();"
        "assert 'tensor' in names; print(json.dumps([end - start, before, sorted(sys.modules)]))"
    )
    assert not before
    tops = {module.split(".")[0] for module in modules}
    assert not tops & {*FRAMEWORKS.values(), "gymnasium", "matplotlib", "h5py", "torch", "tensordict", "numpy"}
    assert not {top for top in tops if top.startswith("iql_")} - {"iql_plugins"}
    # 0.06 s on an idle core.
    assert seconds < 2.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_imports_no_other_and_no_other_framework(name: str) -> None:
    pytest.importorskip(FRAMEWORKS.get(name, "iql_tensor"))
    modules = fresh(
        f"import json, sys, iql_plugins; iql_plugins.load({name!r}); print(json.dumps(sorted(sys.modules)))"
    )
    tops = {module.split(".")[0] for module in modules}
    own = iql_plugins.available()[name].value.split(".")[0]
    assert own in tops
    assert not {top for top in tops if top.startswith("iql_")} - {"iql_plugins", own}
    assert not tops & (set(FRAMEWORKS.values()) - {FRAMEWORKS.get(name)})


def test_adapters_are_loaded_and_batches_mapped() -> None:
    assert iql_plugins.load("tensor").name == "tensor"
    batch = make_dataset(SPACES["continuous"], 4)
    assert iql_plugins.map_batch(batch) is batch
    with pytest.raises(TypeError, match="no adapter knows this batch, object"):
        iql_plugins.map_batch(object())


def test_a_dataset_is_looked_for_among_the_formats_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(source: object) -> None:
        raise AssertionError(source)

    monkeypatch.setattr(host, "_registry", lambda: registry(good(iql_load_dataset=never)))
    assert len(iql_plugins.load_dataset("pendulum-v1-sac")) == 20_000


def test_a_dataset_of_an_adapter_is_loaded_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = make_dataset(SPACES["continuous"], 4).cpu()
    unsound = sound.clone()
    unsound["next", "reward"][2] = torch.nan

    def load(source: object) -> TensorDict | None:
        return {"sound": sound, "unsound": unsound}.get(str(source))

    monkeypatch.setattr(host, "_registry", lambda: registry(good(iql_load_dataset=load)))
    assert iql_plugins.load_dataset("sound") is sound
    with pytest.raises(DatasetError, match=r"unsound: \('next', 'reward'\) is not finite in row 2"):
        iql_plugins.load_dataset("unsound")


def test_a_source_that_nobody_knows_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"did you mean 'pendulum-v1-sac'\?.*no adapter knows this dataset"
    ) as caught:
        iql_plugins.load_dataset("pendulum-v1-sacc")
    assert "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match="object is no dataset"):
        iql_plugins.load_dataset(object())


def test_a_type_error_of_an_adapter_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: object) -> None:
        raise TypeError("a mistake of the adapter")

    monkeypatch.setattr(host, "_registry", lambda: registry(good(iql_load_dataset=load)))
    with pytest.raises(TypeError, match="a mistake of the adapter"):
        iql_plugins.load_dataset(object())
