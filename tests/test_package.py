"""What importing the package does, and what it ships."""

import json
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

FRAMEWORKS = ("torchrl", "stable_baselines3", "d3rlpy", "gymnasium", "gym", "pluggy", "matplotlib", "pandas")


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has imported after a statement."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(json.loads(output.splitlines()[-1]))


@pytest.mark.slow
def test_the_core_imports_no_framework() -> None:
    imported = modules_after("import torch, tensordict, tensordict.nn, iql_plugins.losses.iql, iql_plugins.networks")
    needed = modules_after("import torch, tensordict, tensordict.nn")
    assert "iql_plugins" in imported
    assert not (imported - needed) & set(FRAMEWORKS)


def test_the_public_names_are_there() -> None:
    import iql_plugins

    for name in iql_plugins.__all__:
        assert getattr(iql_plugins, name) is not None
        assert name in dir(iql_plugins)
    with pytest.raises(AttributeError, match="no attribute 'IQLLos'"):
        iql_plugins.IQLLos  # noqa: B018


def test_modules_are_there_without_an_import_of_their_own() -> None:
    code = "import iql_plugins; print(iql_plugins.functional.expectile_loss, iql_plugins.networks.critic)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_package_runs_as_the_command_does() -> None:
    commands = [[sys.executable, "-m", module, "--version"] for module in ("iql_plugins", "iql_plugins.cli")]
    first, second = (subprocess.run(command, capture_output=True, text=True) for command in commands)
    assert (first.returncode, first.stdout, first.stderr) == (second.returncode, second.stdout, second.stderr)
    # Without what the command needs, it says what to install.
    assert first.stdout.startswith("iql-plugins ") or "pip install 'iql-plugins[cli]'" in first.stderr
    # The module of the command is no part of the package's import.
    assert not modules_after("import iql_plugins") & {"torch", "tyro", *FRAMEWORKS}
    assert not modules_after("import iql_plugins.__main__") & {"torch", "tyro", *FRAMEWORKS}


def test_importing_changes_no_global_state() -> None:
    state = "(torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), warnings.filters)"
    ours = "iql_plugins.losses.iql, iql_plugins.training.agent"
    code = f"import torch, tensordict.nn, warnings; a = {state}; import {ours}; assert a == {state}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_dataset_that_ships_is_sound() -> None:
    path = resources.files("iql_plugins") / "data" / "datasets" / "pendulum-v1-sac.npz"
    assert path.is_file()
    with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
        arrays = dict(data)
    assert {name: (array.shape, array.dtype.str) for name, array in arrays.items()} == {
        "observations": ((20_000, 3), "<f4"),
        "actions": ((20_000, 1), "<f4"),
        "rewards": ((20_000,), "<f4"),
        "next_observations": ((20_000, 3), "<f4"),
        "terminals": ((20_000,), "<f4"),
        "timeouts": ((20_000,), "<f4"),
    }
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert not arrays["terminals"].any()
    assert np.array_equal(np.flatnonzero(arrays["timeouts"]), np.arange(199, 20_000, 200))
    assert np.abs(arrays["actions"]).max() <= 2.0
    inside = arrays["timeouts"][:-1] == 0
    assert np.array_equal(arrays["next_observations"][:-1][inside], arrays["observations"][1:][inside])
