"""A disk that fills: one line, whatever was there before is there still, and once there is room the work goes on."""

import itertools
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("gymnasium")
resource = pytest.importorskip("resource")

from agents import make_agent  # noqa: E402

import iql_plugins  # noqa: E402
from iql_plugins.cli import main  # noqa: E402
from iql_plugins.data import DatasetError, arrays, load_dataset  # noqa: E402
from iql_plugins.hookspecs import Training  # noqa: E402
from iql_plugins.training.agent import Agent  # noqa: E402

ENV = "short_pendulum:ShortPendulum-v0"
TRAIN = [
    *("--n-steps", "40", "--hidden-sizes", "8", "--batch-size", "16", "--evaluate-every", "20", "--log-every", "10"),
    *("--episodes", "1", "--evaluation-episodes", "1", "--baseline", "none", "--env", ENV),
]
BITWISE = ("checkpoint.safetensors", "policy.safetensors", "policy_best.safetensors", "metrics.csv")
#: What Linux says of a full disk, and of a file that may not become as large.
FULL = ("No space left on device", "File too large")
DISK_BYTES = 2**23

Run = Callable[..., tuple[int, str]]


class Disk(NamedTuple):
    """A folder, and a context in which there is room for so many bytes more: of all files, or of each."""

    folder: Path
    room: Callable[[int], AbstractContextManager[None]]


@contextmanager
def file_size(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What the tests themselves print goes to a file, too.
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(limit, 1500), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["disk", "file size"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A small disk of its own where this process may mount one, and a limit of the size of files anywhere."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "file size":
        yield Disk(folder, file_size)
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("to mount a small disk takes root; the same runs with a limit on the size of files need none")
    filler = tmp_path / "disk" / "filler"

    @contextmanager
    def room(size: int) -> Iterator[None]:
        with filler.open("wb") as file:
            left = os.statvfs(folder)
            if (taken := left.f_bavail * left.f_bsize - size) > 0:
                os.posix_fallocate(file.fileno(), 0, taken)
        try:
            yield
        finally:
            filler.unlink()

    try:
        yield Disk(folder, room)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line; status and stderr, which never has a traceback."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        err = capfd.readouterr().err
        assert "Traceback" not in err, err
        return status, err

    return call


def sizes(most: int, rounds: int, seed: str) -> list[int]:
    """Room for nothing, for nearly all, and for random parts."""
    draw = random.Random(seed)
    return [0, most - 1, *(draw.randrange(most) for _ in range(rounds))]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("filler", ".lock")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *TRAIN, "--workers", "1", "--run-dir", str(folder)]) == 0
    return folder


def assert_ends_as(whole: Path, folder: Path) -> None:
    for name in BITWISE:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_goes_on_when_there_is_room_again(disk: Disk, run: Run, whole: Path, stress: int) -> None:
    folder = disk.folder / "run"
    contents = [len(content) for content in files(whole).values()]
    most = max(contents) if disk.room is file_size else sum(contents) + 8 * 4096
    options = ["train", *TRAIN, "--workers", "1", "--run-dir", folder]
    for size in sizes(most, 3 * stress, "run"):
        with disk.room(size):
            status, err = run(*options)
        if status != 0:
            assert status == 2
            line = err.splitlines()[-1]
            assert any(text in line for text in FULL)
            assert str(folder) in line
        # Nothing half written, and nothing but what a whole run has.
        assert files(folder).keys() <= files(whole).keys()
        if not (folder / "config.json").exists():
            assert files(folder) == {}
            assert run(*options)[0] == 0
        elif status != 0:
            assert f"go on with iql-plugins train --resume {folder}" in err
            # A second time, a little later.
            with disk.room(size // 2):
                run("train", "--resume", folder, "--workers", "1", "--env", ENV)
            assert run("train", "--resume", folder, "--workers", "1", "--env", ENV)[0] == 0
        assert_ends_as(whole, folder)
        assert files(folder).keys() == files(whole).keys()
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_run_of_several_processes_goes_on_when_there_is_room_again(disk: Disk, run: Run, tmp_path: Path) -> None:
    folder, whole = disk.folder / "run", tmp_path / "whole"
    options = ["train", *TRAIN, "--seeds", "2", "--stack", "1"]
    with disk.room(20_000):
        status, err = run(*options, "--workers", "2", "--run-dir", folder)
    assert status == 2
    assert any(text in err.splitlines()[-1] for text in FULL)
    assert run("train", "--resume", folder, "--workers", "1", "--env", ENV)[0] == 0
    assert run(*options, "--workers", "1", "--run-dir", whole)[0] == 0
    for seed in ("seed-0", "seed-1"):
        assert_ends_as(whole / seed, folder / seed)


# Single files


def raised(kind: type[Exception], call: Callable[[], object]) -> str | None:
    """The text of an error of this kind, if there was one."""
    try:
        call()
    except kind as error:
        return str(error)
    return None


def native(adapter: str) -> Callable[[Agent, Path], None]:
    def write(agent: Agent, path: Path) -> None:
        pytest.importorskip({"sb3": "stable_baselines3", "tensor": "torch"}.get(adapter, adapter))
        training = iql_plugins.load(adapter).training
        assert isinstance(training, Training)
        training.save(training.from_agent(agent), path)

    return write


def of_stable_baselines3(agent: Agent, path: Path) -> None:
    """As its users save: the suffix is added."""
    pytest.importorskip("stable_baselines3")
    import iql_sb3

    iql_sb3.IQL.from_agent(agent).save(str(path.with_suffix("")))


def torchscript(agent: Agent, path: Path) -> None:
    from iql_plugins.export import export_policy

    export_policy(agent, path, "torchscript")


def d3rlpys(method: str) -> Callable[[Agent, Path], None]:
    def write(agent: Agent, path: Path) -> None:
        pytest.importorskip("d3rlpy")
        from iql_d3rlpy.training import TRAINING

        getattr(TRAINING.from_agent(agent), method)(path)

    return write


WRITERS: dict[str, tuple[str, Callable[[Agent, Path], None]]] = {
    "the common checkpoint": (".safetensors", Agent.save),
    "Stable-Baselines3's zip": (".zip", native("sb3")),
    "Stable-Baselines3's save": (".zip", of_stable_baselines3),
    "TorchScript": (".ts", torchscript),
    "d3rlpy's file": (".d3", native("d3rlpy")),
    "d3rlpy's model": (".pt", d3rlpys("save_model")),
    "d3rlpy's policy": (".pt", d3rlpys("save_policy")),
    "TorchRL's file": (".pt", native("torchrl")),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", list(WRITERS))
def test_a_file_that_cannot_be_written_leaves_the_one_that_was_there(name: str, disk: Disk, stress: int) -> None:
    suffix, write = WRITERS[name]
    path = disk.folder / f"policy{suffix}"
    write(make_agent("continuous"), path)
    before = files(disk.folder)
    assert list(before) == [path.name]
    other = make_agent("continuous", hidden_sizes=(16,))
    failed = 0
    for size in sizes(len(before[path.name]), stress, name):
        with disk.room(size):
            error = raised(OSError, lambda: write(other, path))
        if error is None:
            assert files(disk.folder) != before
            path.write_bytes(before[path.name])
            continue
        failed += 1
        assert any(text in error for text in FULL)
        assert str(path) in error
        assert files(disk.folder) == before
    assert failed
    write(other, path)
    assert files(disk.folder) != before
    assert list(files(disk.folder)) == [path.name]


COMMANDS: dict[str, tuple[str, list[str]]] = {
    "export": (".pt2", ["--format", "torch", "--output"]),
    "convert sb3": (".zip", ["--to", "sb3"]),
    "convert d3rlpy": (".d3", ["--to", "d3rlpy"]),
    "convert tensor": (".safetensors", ["--to", "tensor"]),
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_that_cannot_write_leaves_the_file_that_was_there(
    name: str, disk: Disk, run: Run, tmp_path: Path, stress: int
) -> None:
    suffix, options = COMMANDS[name]
    if suffix in (".zip", ".d3"):
        pytest.importorskip({".zip": "stable_baselines3", ".d3": "d3rlpy"}[suffix])
    policy = tmp_path / "policy.safetensors"
    make_agent("continuous").save(policy)
    target = disk.folder / f"target{suffix}"
    command = name.split()[0]
    arguments = [command, policy, *options, target] if command == "export" else [command, policy, target, *options]
    status, _ = run(*arguments)
    assert status == 0
    needed = target.stat().st_size
    target.write_bytes(b"what was there")
    for size in sizes(needed, stress - 1, name):
        with disk.room(size):
            status, err = run(*arguments)
        if status == 0:
            # A little of the disk goes to pages that are not full.
            target.write_bytes(b"what was there")
            continue
        assert status == 2
        assert len(err.splitlines()[-1]) < 1000
        assert files(disk.folder) == {target.name: b"what was there"}
        assert sorted(path.name for path in disk.folder.iterdir()) == [target.name]
    assert run(*arguments)[0] == 0


# Datasets that are mapped


@pytest.mark.parametrize("looked", [True, False])
def test_a_dataset_that_cannot_be_mapped_leaves_nothing(
    looked: bool, disk: Disk, stress: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the room was there when it was looked at, and is gone when the dataset is written."""
    if not looked:
        monkeypatch.setattr(arrays, "require_space", lambda *arguments: None)
    expected = load_dataset("pendulum-v1-sac")
    most = 4 * 20_000 * 3 if disk.room is file_size else 2 * sum(t.nbytes for t in expected.values(True, True))
    for size, number in zip(sizes(most, 3 * stress, "mapped"), itertools.count()):
        target = disk.folder / str(number) / "mapped"
        with disk.room(size):
            error = raised(DatasetError, lambda target=target: load_dataset("pendulum-v1-sac", memmap_dir=target))
        if error is None:
            shutil.rmtree(target.parent)
        else:
            assert str(disk.folder) in error
            assert "\n" not in error
        assert [path.name for path in disk.folder.iterdir()] == []
        assert (load_dataset("pendulum-v1-sac", memmap_dir=target) == expected).all()
        shutil.rmtree(target.parent)
