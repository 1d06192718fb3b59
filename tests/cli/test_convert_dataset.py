"""``iql-plugins convert-dataset``: shards and Parquet, made a chunk at a time, whatever kills it on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from requirements import needs_proc
from tensordict import MemoryMappedTensor, TensorDict

from iql_plugins import checkpoint, load_dataset, read_dataset
from iql_plugins.cli import main
from iql_plugins.data import arrays, dataset, summary
from iql_plugins.spaces import Discrete, Spaces

Convert = Callable[..., tuple[int, dict[str, Any]]]


class Killed(BaseException):
    """In the place of a signal that ends the process."""


@pytest.fixture
def convert(capfd: pytest.CaptureFixture[str]) -> Convert:
    """Converts in this process; status and document."""

    def call(source: object, out: Path) -> tuple[int, dict[str, Any]]:
        capfd.readouterr()
        status = main(["convert-dataset", str(source), str(out), "--json"])
        return status, json.loads(capfd.readouterr().out)

    return call


def columns(rows: int = 300) -> dict[str, Any]:
    random = np.random.default_rng(0)
    numbers = {"observations": (rows, 3), "actions": (rows, 1), "rewards": (rows,), "next_observations": (rows, 3)}
    found: dict[str, Any] = {name: random.uniform(-1, 1, shape).astype("f4") for name, shape in numbers.items()}
    found["terminals"] = np.arange(rows) % 50 == 49
    found["timeouts"] = np.arange(rows) % 70 == 69
    found["timeouts"] &= ~found["terminals"]
    return found


def content(path: Path) -> dict[str, bytes]:
    """Of a file, or of all in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("kind", ["npz", "parquet", "minari", "shards"])
def test_what_is_read_of_the_shards_is_what_is_read_of_the_source(kind: str, convert: Convert, tmp_path: Path) -> None:
    source = tmp_path / f"data.{kind}"
    if kind == "minari":
        from minari_helpers import walk

        source = walk(tmp_path)
    elif kind == "npz":
        np.savez_compressed(source, **columns())
    elif kind == "parquet":
        assert convert("pendulum-v1-sac", source)[0] == 0
    else:
        read_dataset(columns(), memmap_dir=source)
    expected = read_dataset(source)
    status, document = convert(source, tmp_path / "shards")
    assert (status, document["sha256"], document["transitions"]) == (0, expected.sha256, len(expected.tensors))
    found = read_dataset(tmp_path / "shards")
    assert all(isinstance(tensor, MemoryMappedTensor) for tensor in found.tensors.values(True, True))
    assert (found.sha256, found.env, found.spaces) == (expected.sha256, expected.env, expected.spaces)
    assert bool((found.tensors == expected.tensors).all())
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_parquet_has_all_that_the_shards_have(convert: Convert, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data = columns() | {"actions": np.arange(300) % 3}
    del data["observations"], data["next_observations"]
    for name, shape in {"image": (4, 4, 3), "place": (1,), "speed": (2,)}.items():
        for key in ("observations", "next_observations"):
            data[f"{key}/{name}"] = random.integers(256, size=(300, *shape)).astype("u1" if name == "image" else "f4")
    np.savez(tmp_path / "data.npz", **data)
    expected = read_dataset(tmp_path / "data.npz", discrete=True)
    assert convert(tmp_path / "data.npz", tmp_path / "data.parquet")[0] == 0
    assert read_dataset(tmp_path / "data.parquet").sha256 == expected.sha256


def test_parquet_says_what_its_columns_cannot(convert: Convert, tmp_path: Path) -> None:
    source = read_dataset("pendulum-v1-sac")
    assert convert("pendulum-v1-sac", tmp_path / "pendulum.parquet")[0] == 0
    found = read_dataset(tmp_path / "pendulum.parquet")
    assert (found.env, found.spaces, found.sha256) == (source.env, source.spaces, source.sha256)
    # Numbers that look like those of discrete actions, images of a single pixel; how they were made.
    images = np.zeros((300, 1, 1, 1), "u1")
    data = columns() | {"actions": np.ones((300, 1), "f4"), "observations": images, "next_observations": images}
    data["metadata"] = np.array(json.dumps({"recipe": "ones"}))
    np.savez(tmp_path / "data.npz", **data)
    expected = read_dataset(tmp_path / "data.npz", discrete=False)
    TensorDict(dict(expected.tensors.items()), [300]).memmap(str(tmp_path / "data"))
    for name, of in (("data", {}), ("data.npz", {"recipe": "ones"})):
        for suffix in (".parquet", ""):
            out = tmp_path / f"{name}-converted{suffix}"
            assert convert(tmp_path / name, out)[0] == 0
            assert read_dataset(out).provenance == of
    found = read_dataset(tmp_path / "data-converted.parquet")
    assert found.tensors["action"].dtype == torch.float32
    assert found.sha256 == expected.sha256


def test_a_slip_does_not_cost_what_was_begun(convert: Convert, tmp_path: Path) -> None:
    begun = tmp_path / ".out.partial" / "dataset"
    begun.mkdir(parents=True)
    assert convert(tmp_path / "typo.npz", tmp_path / "out")[0] == 2
    assert begun.is_dir()
    for out, expected in ((Path("."), "a new folder"), (tmp_path / "in" / "side", "inside of SOURCE")):
        (tmp_path / "in").mkdir(exist_ok=True)
        status, document = convert(tmp_path / "in", out)
        assert (status, expected in document["error"]) == (2, True)


def test_what_is_in_the_way_stays_there(convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "file").touch()
    (tmp_path / "data.parquet").touch()
    for out in ("shards", "data.parquet"):
        status, document = convert("pendulum-v1-sac", tmp_path / out)
        assert status == 2
        assert "is there already" in document["error"]
    steps = read_dataset(columns()).tensors.copy()
    steps["steps_to_next_obs"] = torch.full((300, 1), 3)
    TensorDict(dict(steps.items()), [300]).memmap(str(tmp_path / "steps"))
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "_allocated", lambda *_: pytest.fail("something was written"))
        status, document = convert(tmp_path / "steps", tmp_path / "steps.parquet")
    assert status == 2
    assert "steps_to_next_obs" in document["error"]
    assert convert(tmp_path / "nowhere.npz", tmp_path / "out")[0] == 2
    np.savez(tmp_path / "bad.npz", **(columns() | {"rewards": np.full(300, np.nan)}))
    status, document = convert(tmp_path / "bad.npz", tmp_path / "out")
    assert status == 2
    assert "is not finite in row 0" in document["error"]
    names = {"shards", "data.parquet", "steps", "bad.npz"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("out", ["shards", "data.parquet"])
def test_a_conversion_that_is_killed_at_any_moment_is_gone_on_with(
    out: str, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file that is written, before it has its name and after, and before and after anything is moved."""
    np.savez(tmp_path / "data.npz", **columns())
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(arrays, "_SECONDS_BETWEEN_NOTES", 0.0)
    assert convert(tmp_path / "data.npz", tmp_path / "whole" / out)[0] == 0
    expected = content(tmp_path / "whole" / out)
    moments = [0, 0]
    rmtree = shutil.rmtree

    def at(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            for after in (False, True):
                moments[0] += 1
                if moments[0] == moments[1]:
                    raise Killed
                result = None if after else call(*arguments, **options)
            return result

        return counted

    for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, at(getattr(module, name)))
    folder = tmp_path / "killed"
    for moment in range(1, 10_000, 7):
        moments[:] = [0, moment]
        try:
            assert convert(tmp_path / "data.npz", folder / out)[0] == 0
        except Killed:
            moments[:] = [0, 0]
            status = convert(tmp_path / "data.npz", folder / out)[0]
            # Killed when all was done, it has nothing more to do than to say so.
            assert status == 0 or (folder / out).exists()
            assert content(folder / out) == expected, moment
            assert [path.name for path in folder.iterdir()] == [out], moment
            rmtree(folder)
        else:
            break
    assert moment > 50


def test_what_was_written_is_not_read_again(convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "data.npz", **columns())
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(arrays, "_SECONDS_BETWEEN_NOTES", 0.0)
    out, progress = tmp_path / "shards", tmp_path / ".shards.partial" / "progress.json"
    rows: list[int] = []
    real = checkpoint.write_bytes

    def write_bytes(path: Path, data: bytes) -> None:
        real(path, data)
        if path == progress:
            rows.append(json.loads(data)["filled"])
            if len(rows) == 3:
                raise Killed

    monkeypatch.setattr("iql_plugins.data.arrays.write_bytes", write_bytes)
    with pytest.raises(Killed):
        convert(tmp_path / "data.npz", out)
    assert convert(tmp_path / "data.npz", out)[0] == 0
    assert rows == sorted(set(rows))
    assert rows[-1] == 300

    # What was begun of other data is begun again.
    rmtree = shutil.rmtree
    rmtree(out)
    rows.clear()
    with pytest.raises(Killed):
        convert(tmp_path / "data.npz", out)
    np.savez(tmp_path / "data.npz", **(columns() | {"rewards": np.zeros(300, "f4")}))
    assert convert(tmp_path / "data.npz", out)[0] == 0
    assert not read_dataset(out).tensors["next", "reward"].any()


_KILLED = """
import os, signal, sys
from pathlib import Path
from iql_plugins.cli import main
from iql_plugins.data import arrays, dataset
dataset.CHUNK_BYTES, arrays._SECONDS_BETWEEN_NOTES = 3000, 0.0
real = arrays.write_bytes
def write_bytes(path, content):
    real(path, content)
    if b'"filled": 2' in content:
        os.kill(os.getpid(), signal.SIGKILL)
arrays.write_bytes = write_bytes
main(["convert-dataset", *sys.argv[1:]])
"""


def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_with(convert: Convert, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **columns())
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "data.npz"), str(tmp_path / "shards")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "shards").exists()
    status, document = convert(tmp_path / "data.npz", tmp_path / "shards")
    assert status == 0, document
    assert convert(tmp_path / "data.npz", tmp_path / "whole")[0] == 0
    assert content(tmp_path / "shards") == content(tmp_path / "whole")


#: Bytes of the data, and of the memory that there is for them and all that is done with them.
_DATA, _MEMORY = 120_000_000, 40_000_000

_LIMITED = """
import gc, re, resource, sys
from pathlib import Path
import numpy as np
from iql_plugins import data, plugins
from iql_plugins.cli import main
from iql_plugins.config import IQLConfig
from iql_plugins.data import dataset, summary
from iql_plugins.data.inspection import inspect, samples
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.spaces import Box, Spaces
from iql_plugins.training.agent import Agent

folder = Path(sys.argv[1])
# Of what is looked at together, and of what is compared with all others, there is less than in life.
dataset.CHUNK_BYTES, summary.CHUNK, samples._STEPS = 2**20, 2**12, 1000
spaces = Spaces(Box((17,)), Box((6,), low=(-1.0,) * 6, high=(1.0,) * 6))
config = IQLConfig(
    n_steps=3, hidden_sizes=(16,), batch_size=64, compile="no", normalize_observations=True, reward_scale="return_range"
)

def use(name):
    assert main(["convert-dataset", str(folder / f"{name}.npz"), str(folder / name)]) == 0
    transitions = inspect(folder / name).transitions
    tensors = data.read_dataset(folder / name).tensors
    for adapter in ("tensor", "torchrl", "sb3", "d3rlpy"):
        training = plugins.host().load(adapter).training
        agent = Agent(spaces, config, normalizers=Normalizers.fit(tensors, spaces, config), seed=0)
        training.fit(training.from_agent(agent), tensors, 3, lambda step: None)
    return transitions

# All that is imported on the way is there before it counts.
use("small")
taken = 1024 * int(re.search(r"VmData:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (taken + int(sys.argv[2]),) * 2)
try:
    data.load_dataset(folder / "large.npz")
except dataset.DatasetError as error:
    print("in memory:", error)
gc.collect()
assert use("large") == int(sys.argv[3])
print("done")
"""


@pytest.mark.slow
@needs_proc
def test_data_three_times_as_large_as_memory_are_converted_inspected_and_trained_on(tmp_path: Path) -> None:
    for name, rows in (("small", 2000), ("large", _DATA // 168)):
        random = np.random.default_rng(0)
        shapes = {"observations": (rows, 17), "actions": (rows, 6), "rewards": (rows,), "next_observations": (rows, 17)}
        data: dict[str, Any] = {key: random.random(shape, np.float32) for key, shape in shapes.items()}
        data |= {"terminals": np.zeros(rows, bool), "timeouts": np.arange(rows) % 1000 == 999}
        np.savez(tmp_path / f"{name}.npz", **data)
    command = [sys.executable, "-c", _LIMITED, tmp_path, _MEMORY, _DATA // 168]
    # What is freed is given back, and not kept for later.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "in memory:" in finished.stdout
    assert finished.stdout.endswith("done\n")


def test_before_the_first_step_nothing_reads_all_of_the_shards(
    convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iql_plugins.config import IQLConfig
    from iql_plugins.data import episodes, intake
    from iql_plugins.data.normalizers import Normalizers
    from iql_plugins.data.readers import tensordicts
    from iql_plugins.training.agent import Agent

    assert convert("pendulum-v1-sac", tmp_path / "shards")[0] == 0
    config = IQLConfig(
        n_steps=3, hidden_sizes=(8,), batch_size=16, normalize_observations=True, reward_scale="return_range"
    )
    source = read_dataset("pendulum-v1-sac")
    spaces = source.spaces
    assert spaces is not None
    expected, sha256 = Normalizers.fit(source.tensors, spaces, config).state_dict(), source.sha256

    def forbidden(*_: object, **__: object) -> Any:
        raise AssertionError("all of the dataset was read")

    for module, name in (
        *((dataset, name) for name in ("chunks", "non_finite")),
        *((intake, "non_finite"), (summary, "moments"), (episodes, "episode_returns")),
        *((tensordicts, name) for name in ("chunks", "_selected")),
    ):
        monkeypatch.setattr(module, name, forbidden)
    shards = read_dataset(tmp_path / "shards")
    assert shards.sha256 == sha256
    found = Normalizers.fit(shards.tensors, spaces, config)
    for key, value in found.state_dict().items():
        assert torch.equal(value, expected[key]), key
    Agent(spaces, config, normalizers=found, seed=0).fit(shards.tensors, 3)
    # Of data without a summary, they do.
    with pytest.raises(AssertionError, match="all of the dataset"):
        Normalizers.fit(source.tensors, spaces, config)


def test_discrete_spaces_of_shards_are_known_without_a_look_at_each_row(
    convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(300)
    data = columns() | {"actions": rows % 4, "observations": rows % 7, "next_observations": rows % 9}
    np.savez(tmp_path / "data.npz", **data)
    assert convert(tmp_path / "data.npz", tmp_path / "shards")[0] == 0
    shards = load_dataset(tmp_path / "shards")
    monkeypatch.setattr(summary, "_extremes", lambda values: pytest.fail("all of the dataset was read"))
    spaces = Spaces.from_dataset(shards)
    assert spaces == Spaces(Discrete(9), Discrete(4))
    spaces.check(shards)
    with pytest.raises(ValueError, match="is from 0 to 3, the space from 0 to 2"):
        Spaces(Discrete(9), Discrete(3)).check(shards)


def test_shards_that_were_changed_are_looked_at_again(convert: Convert, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    assert convert("pendulum-v1-sac", folder)[0] == 0
    tensors = read_dataset(folder).tensors
    known = summary.of(tensors)
    assert known is not None
    assert known.sha256 is not None
    part = summary.of(tensors.select("observation", ("next", "reward")))
    assert part is not None
    assert part.sha256 is None
    for other in (tensors[:100], tensors[::2], tensors.clone(), tensors.set("more", torch.zeros(20_000, 1))):
        assert summary.of(other) is None
    tensors = read_dataset(folder).tensors
    shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copy)
    assert summary.of(read_dataset(tmp_path / "copied").tensors) is None
    shutil.copytree(folder, tmp_path / "kept")
    assert summary.of(read_dataset(tmp_path / "kept").tensors) is not None

    tensors["next", "terminated"] = tensors["next", "done"]
    assert summary.of(tensors) is None
    tensors = read_dataset(folder).tensors
    # Copies by size and time leave files of another conversion as they are, beside the new summary.
    changed = read_dataset("pendulum-v1-sac").tensors
    changed["next", "reward"] *= 2.0
    changed.memmap(str(tmp_path / "twice"))
    assert convert(tmp_path / "twice", tmp_path / "other")[0] == 0
    shutil.copy(tmp_path / "other" / summary.FILE, tmp_path / "kept" / summary.FILE)
    assert summary.of(read_dataset(tmp_path / "kept").tensors) is None

    summary_file = folder / summary.FILE
    text = summary_file.read_text()
    for wrong in (
        "",
        "[]",
        "{}",
        text.replace('"rows": 20000', '"rows": "many"'),
        text.replace('"mean": [', '"mean": [1, '),
    ):
        summary_file.write_text(wrong)
        assert summary.of(tensors) is None
    summary_file.write_text(text)
    assert summary.of(tensors) is not None
    tensors["observation"][5, 1] = float("nan")
    assert summary.of(tensors) is None
    with pytest.raises(dataset.DatasetError, match="'observation' is not finite in row 5"):
        read_dataset(folder)
