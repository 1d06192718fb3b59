"""Every kind of file that is read, changed at random: it loads to what passes its check, or is one documented error."""

import copy
import faulthandler
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gymnasium")
h5py = pytest.importorskip("h5py")

from agents import make_agent, same, weights  # noqa: E402

from iql_plugins.checkpoint import CheckpointError  # noqa: E402
from iql_plugins.cli import main  # noqa: E402
from iql_plugins.cli.errors import UserError  # noqa: E402
from iql_plugins.cli.policies import load_agent  # noqa: E402
from iql_plugins.cli.settings import Settings  # noqa: E402
from iql_plugins.cli.training import metrics_rows  # noqa: E402
from iql_plugins.data import DatasetError, check_dataset, load_dataset  # noqa: E402
from iql_plugins.hookspecs import Training  # noqa: E402
from iql_plugins.training.agent import Agent  # noqa: E402

ENV = "short_pendulum:ShortPendulum-v0"
#: Files of each kind, times ``--stress``.
ROUNDS = 40
#: A load that takes longer ends the process, with a traceback.
MOST_SECONDS = 120

Change = Callable[[random.Random, bytes], bytes]


# How a file changes


def _cut(draw: random.Random, content: bytes) -> tuple[int, int]:
    """Where a piece of up to 64 bytes begins and ends; in every other case near the beginning or the end."""
    near = draw.choice([len(content), min(len(content), 200)])
    start = draw.randrange(near) if draw.random() < 0.7 else len(content) - 1 - draw.randrange(near)
    return start, min(len(content), start + draw.randint(1, 64))


def flipped(draw: random.Random, content: bytes) -> bytes:
    start, _ = _cut(draw, content)
    return content[:start] + bytes([content[start] ^ 1 << draw.randrange(8)]) + content[start + 1 :]


def replaced(draw: random.Random, content: bytes) -> bytes:
    start, stop = _cut(draw, content)
    piece = draw.choice([bytes(stop - start), b"\xff" * (stop - start), draw.randbytes(stop - start)])
    return content[:start] + piece + content[stop:]


def dropped(draw: random.Random, content: bytes) -> bytes:
    start, stop = _cut(draw, content)
    return content[:start] + content[stop:]


def doubled(draw: random.Random, content: bytes) -> bytes:
    start, stop = _cut(draw, content)
    return content[:stop] + content[start:]


def swapped(draw: random.Random, content: bytes) -> bytes:
    first, second, third = sorted(draw.randrange(len(content)) for _ in range(3))
    return content[:first] + content[second:third] + content[first:second] + content[third:]


def truncated(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randrange(len(content))]


BYTES: tuple[Change, ...] = (flipped, replaced, dropped, doubled, swapped, truncated)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**13, 0.5, -1e300, float("nan"), float("inf"), "", "x", "é" * 300, [], {},
    [1, 2], [[]], {"a": 1}, [10**6, 10**6], {"dtype": "object"},
)  # fmt: skip


def edited(draw: random.Random, content: bytes) -> bytes:
    """A JSON document in which values are others, or gone, or nested too deep."""
    document = json.loads(content)
    for _ in range(draw.randint(1, 2)):
        node: Any = document
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
                node = node[key]
                continue
            if draw.random() < 0.2:
                del node[key]
            else:
                node[key] = draw.choice([*VALUES, "NESTED"])
            break
    return json.dumps(document).replace('"NESTED"', "[" * 10**5 + "]" * 10**5).encode()


def mutations(file: Path, rounds: int, seed: int) -> Iterator[str]:
    """Changes a file, again and again, the values of a JSON document among others; it is whole again in the end."""
    whole = file.read_bytes()
    try:
        for number in range(rounds):
            draw = random.Random(f"{file.name} {seed} {number}")
            content = whole
            if file.suffix == ".json" and draw.random() < 0.6:
                content = edited(draw, content)
            else:
                for _ in range(draw.choice([1, 1, 1, 2, 5])):
                    content = draw.choice(BYTES)(draw, content) if content else content
            file.write_bytes(content)
            yield f"{file.name}, seed {seed}, round {number}"
    finally:
        file.write_bytes(whole)


@contextmanager
def one_line_or_fine(path: Path, kind: type[Exception]) -> Iterator[None]:
    """An error inside is of this kind, and of one line that names the file."""
    text = str(path)
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    try:
        with warnings.catch_warnings():
            # Of libraries, about versions and the like in what they read.
            warnings.simplefilter("ignore")
            yield
    except kind as error:
        text = str(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 1000


# Datasets

ROWS = 30


def columns() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    number = np.arange(ROWS)
    return {
        "observations": draw.normal(size=(ROWS, 3)).astype(np.float32),
        "actions": draw.uniform(-1, 1, (ROWS, 2)).astype(np.float32),
        "rewards": draw.normal(size=ROWS).astype(np.float32),
        "terminals": number % 10 == 9,
        "timeouts": number % 10 == 4,
    }


def npz(folder: Path) -> Path:
    np.savez(folder / "d.npz", **columns())
    return folder / "d.npz"


def npz_compressed(folder: Path) -> Path:
    np.savez_compressed(folder / "d.npz", **columns())
    return folder / "d.npz"


def hdf5(folder: Path) -> Path:
    with h5py.File(folder / "d.hdf5", "w") as file:
        for key, array in columns().items():
            packed = (
                {"compression": "gzip", "shuffle": True, "chunks": (7, *array.shape[1:])} if key != "rewards" else {}
            )
            file.create_dataset(key, data=array, **packed)
    return folder / "d.hdf5"


def parquet(folder: Path) -> Path:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    arrays = columns()
    vectors = {key: pa.array(list(arrays.pop(key))) for key in ("observations", "actions")}
    parquet.write_table(pa.table(arrays | vectors), folder / "d.parquet", row_group_size=7)
    return folder / "d.parquet"


def of_d3rlpy(folder: Path) -> Path:
    with h5py.File(folder / "d.h5", "w") as file:
        file["num_episodes"] = 3
        for episode in range(3):
            for key in ("observations", "actions", "rewards"):
                part = columns()[key][10 * episode : 10 * episode + 10]
                file[f"{key}_{episode}"] = part if part.ndim > 1 else part.reshape(-1, 1)
            file[f"terminated_{episode}"] = episode == 1
    return folder / "d.h5"


def of_minari(folder: Path) -> Path:
    pytest.importorskip("minari")
    from minari_helpers import walk

    return walk(folder, "d-v0")


def of_tensordict(folder: Path) -> Path:
    load_dataset("pendulum-v1-sac")[:ROWS].memmap(folder / "d")
    return folder / "d"


DATASETS = (npz, npz_compressed, parquet, hdf5, of_d3rlpy, of_minari, of_tensordict)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("write", DATASETS)
def test_a_dataset_loads_or_is_one_clear_error(
    write: Callable[[Path], Path], mapped: bool, tmp_path: Path, stress: int
) -> None:
    path = write(tmp_path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    before = sorted(os.listdir(tmp_path))
    for file in files:
        for where in mutations(file, max(1, ROUNDS * stress // len(files)), int(mapped)):
            options = {"memmap_dir": tmp_path / "new" / "mapped"} if mapped else {}
            with one_line_or_fine(path, DatasetError):
                check_dataset(load_dataset(path, **options))
            shutil.rmtree(tmp_path / "new", ignore_errors=True)
            assert sorted(os.listdir(tmp_path)) == before, where
    check_dataset(load_dataset(path))


# Policies


def test_a_checkpoint_is_the_one_that_was_written_or_an_error(tmp_path: Path, stress: int) -> None:
    original = make_agent("continuous")
    path = tmp_path / "policy.safetensors"
    original.save(path)
    other = make_agent("continuous", expectile=original.config.expectile).loss
    for parameter in other.parameters():
        parameter.data.zero_()
    before = copy.deepcopy(dict(other.state_dict()))
    for where in mutations(path, ROUNDS * stress, 0):
        with one_line_or_fine(path, CheckpointError):
            assert same(weights(Agent.load(path)), weights(original)), where
        try:
            Agent.load(path, loss=other)
        except CheckpointError:
            assert same(dict(other.state_dict()), before), where
        else:
            assert same(dict(other.state_dict()), weights(original)), where
            other.load_state_dict(before)


@pytest.mark.parametrize("adapter", ["sb3", "d3rlpy", "torchrl"])
def test_a_native_file_is_the_one_that_was_written_or_an_error(adapter: str, tmp_path: Path, stress: int) -> None:
    pytest.importorskip({"sb3": "stable_baselines3"}.get(adapter, adapter))
    import iql_plugins

    training = iql_plugins.load(adapter).training
    assert isinstance(training, Training)
    original = make_agent("continuous")
    path = tmp_path / f"policy{training.suffix}"
    training.save(training.from_agent(original), path)
    expected = original.act(np.ones((4, 3), np.float32))
    for where in mutations(path, max(1, ROUNDS * stress // 4), 0):
        with one_line_or_fine(path, UserError):
            action = load_agent(str(path), adapter, trust_pickle=False).act(np.ones((4, 3), np.float32))
            assert (action == expected).all(), where
    assert (load_agent(str(path), adapter, trust_pickle=False).act(np.ones((4, 3), np.float32)) == expected).all()


# Runs


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped on its way."""
    from iql_plugins.cli import training

    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--n-steps", "40", "--hidden-sizes", "8", "--batch-size", "16", "--evaluate-every", "20"]
    options += ["--log-every", "10", "--episodes", "1", "--evaluation-episodes", "1", "--baseline", "none"]
    after_step = training._Trainer.after_step

    def interrupted(self: Any, step: int) -> None:
        after_step(self, step)
        if step == 25:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Trainer, "after_step", interrupted)
        assert main(["train", *options, "--env", ENV, "--workers", "1", "--run-dir", str(folder)]) == 130
    return folder


def test_a_configuration_is_read_or_is_one_clear_error(stopped: Path, stress: int) -> None:
    path = stopped / "config.json"
    for _ in mutations(path, 5 * ROUNDS * stress, 0):
        with one_line_or_fine(stopped, UserError):
            settings, _ = Settings.read(path)
            assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings or _has_nan(settings)


def _has_nan(settings: Settings) -> bool:
    return "NaN" in json.dumps(settings.to_json())


def test_metrics_are_read_or_are_one_clear_error(stopped: Path, stress: int) -> None:
    path = stopped / "metrics.csv"
    for _ in mutations(path, 5 * ROUNDS * stress, 0):
        with one_line_or_fine(stopped, UserError):
            assert all(isinstance(row["step"], float) for row in metrics_rows(path))


@pytest.mark.parametrize("name", ["config.json", "checkpoint.safetensors", "metrics.csv"])
def test_a_run_goes_on_or_ends_with_one_clear_error(
    name: str, stopped: Path, stress: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for where in mutations(stopped / name, 3 * stress, 1):
        run = tmp_path / "run"
        shutil.copytree(stopped, run)
        status = main(["train", "--resume", str(run), "--workers", "1", "--env", ENV])
        err = capfd.readouterr().err
        assert status in (0, 2), where
        assert "Traceback" not in err, where
        shutil.rmtree(run)
