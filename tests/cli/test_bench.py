"""The benchmark of gradient steps: what it compares, what it prints, and how it ends."""

import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import bench_large
import contestants
import interleaved
import pytest
import torch
from interleaved import Timing

Run = Callable[..., tuple[int, str, str]]

SMALL = ["--observation", "3", "--action", "1", "--batch", "8", "--hidden", "8", "--transitions", "200"]
PEER = (
    "def peer(data, batch_size, hidden):\n    return lambda count: [data['observation'][:batch_size].sum()] * count\n"
)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the benchmark in this process; status, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        status = bench.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks compile nothing, which would take most of their time."""
    monkeypatch.setattr(bench, "ours", lambda adapter, compile, **_: contestants.ours(adapter, "no"))


@pytest.mark.usefixtures("eager")
def test_the_speed_is_measured_beside_peers_that_print_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It takes tens of steps, and seconds to compile.
    monkeypatch.setattr(contestants.jax_iql, "PYTHON", Path("nowhere"))
    mine, plot = tmp_path / "mine.py", tmp_path / "speed.png"
    mine.write_text(PEER)
    everyone = [*contestants.installed(), mine]
    options = ["--rounds", "1", "--steps", "2", "--threads", "1", "--device", "cpu"]
    threads = torch.get_num_threads()
    status, out, err = run(*SMALL, *options, "--peers", *everyone, "--adapters", "tensor", "--plot", plot, "--json")
    assert status == 0
    document = json.loads(out)
    names = ["iql-plugins", "iql-plugins, eager", "iql-plugins through tensor", *contestants.installed(), "mine"]
    assert list(document["timings"]) == names
    assert document["timings"]["iql-plugins"]["ratio"] == 1.0
    assert all(timing["ms"] > 0.0 for timing in document["timings"].values())
    assert document["size"]["batch"] == 8
    machine = document["machine"]
    assert (machine["threads"], machine["device"], machine["gpu"]) == (1, "cpu", None)
    assert torch.get_num_threads() == threads
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "[info" not in err
    status, out, _ = run(*SMALL, *options, "--peers")
    assert status == 0
    assert not [name for name in contestants.PEERS if name in out]


@pytest.mark.slow
def test_a_benchmark_prints_its_table_alone() -> None:
    options = [*SMALL, "--rounds", "1", "--steps", "10"]
    finished = subprocess.run([sys.executable, bench.__file__, *options], capture_output=True, text=True, check=True)
    assert finished.stdout.split()[:3] == ["ms", "a", "step"]
    assert "[info" not in finished.stdout + finished.stderr


def test_a_benchmark_is_about_the_peers_that_are_installed_and_about_many_steps(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    found = importlib.util.find_spec
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: None if name == "d3rlpy" else found(name))
    monkeypatch.setattr(contestants.jax_iql, "PYTHON", Path("nowhere"))
    assert not {"d3rlpy", "jax"} & set(contestants.installed())
    monkeypatch.setattr(
        bench, "dataset_of", lambda size: asked.append(size) or types.SimpleNamespace(to=lambda _: None)
    )
    monkeypatch.setattr(bench, "ours", lambda *_: nothing)
    monkeypatch.setattr(bench, "makers", lambda peers: asked.append(peers) or {})
    monkeypatch.setattr(
        bench, "timings", lambda *given: asked.append(given) or dict.fromkeys(given[0], Timing(1.0, 1.0))
    )
    status, out, _ = run()
    assert status == 0
    assert "not installed, and not measured: d3rlpy, jax" in out
    peers, size, (_, rounds, steps, device) = asked
    assert peers == contestants.installed()
    assert size == contestants.Size()
    assert (rounds, device.type) == (9, "cpu")
    assert steps >= 200
    monkeypatch.undo()
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: None if name == "d3rlpy" else found(name))
    status, _, err = run("--peers", "d3rlpy")
    assert status == 2
    assert "the peer 'd3rlpy' needs d3rlpy, which is not installed" in err
    monkeypatch.setattr(contestants.jax_iql, "PYTHON", Path("nowhere"))
    status, _, err = run("--peers", "jax")
    assert status == 2
    assert "python tests/benchmarks/jax_iql.py makes it" in err


def nothing(size: Any, data: Any) -> Any:
    """A contestant whose steps take no time."""
    return lambda count: None


def test_on_a_gpu_the_step_is_measured_as_a_cuda_graph_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def ours(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options))
        return nothing

    def timings(contestants: Any, rounds: int, steps: int, device: torch.device) -> Any:
        assert (steps, device.type) == (1000, "cuda")
        return dict.fromkeys(contestants, Timing(1.0, 1.0))

    monkeypatch.setattr(bench, "device_name", lambda name: {"auto": "cuda"}[name])
    monkeypatch.setattr(bench, "dataset_of", lambda size: types.SimpleNamespace(to=lambda device: None))
    monkeypatch.setattr(bench, "products", lambda device: None)
    monkeypatch.setattr(bench, "ours", ours)
    monkeypatch.setattr(bench, "timings", timings)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fast Card")
    status, out, _ = run("--peers", "--json")
    document = json.loads(out)
    assert status == 0
    assert (document["machine"]["device"], document["machine"]["gpu"]) == ("cuda", "Fast Card")
    added = ["iql-plugins, reduce-overhead", "iql-plugins, CUDA graph"]
    assert list(document["timings"]) == ["iql-plugins", "iql-plugins, eager", *added]
    assert asked == [
        ("tensor", "yes", {}),
        ("tensor", "no", {}),
        ("tensor", "yes", {"mode": "reduce-overhead"}),
        ("tensor", "yes", {"capture": True}),
    ]
    assert "Fast Card, median of" in run("--peers")[1]


def test_what_is_launched_is_done_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("done"))
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: float(len(events)))
    assert interleaved.now(torch.device("cuda")) == 1.0
    assert interleaved.now(torch.device("cpu")) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "nobody"], "there is no peer 'nobody': give one of plain, torchrl"),
        (["--peers", "nothing.py"], "nothing.py has no function peer(data, batch_size, hidden)"),
        (["--peers", "broken.py"], "broken.py cannot be imported: ZeroDivisionError"),
        (["--peers", "mine.py", "mine.py"], "the peer 'mine' is there twice"),
        (["--adapters", "tensr"], "did you mean 'tensor'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--device", "meta"], "--device meta has no numbers"),
        (["--device", "toaster"], "--device must be auto, cpu, cuda or another of torch's devices, got 'toaster'"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--plot", "speed.xyz"], "--plot must be a file with one of the suffixes"),
        (["--plot", "nowhere/speed.png"], "there is no folder 'nowhere'"),
    ],
)
def test_a_mistake_ends_a_benchmark_before_anything_is_measured(
    options: list[str], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nothing.py").write_text("")
    Path("broken.py").write_text("1 / 0")
    Path("mine.py").write_text(PEER)
    status, out, err = run(*options)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_images_are_measured_with_their_evaluations_of_encoders(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("d3rlpy", "stable_baselines3"):
        pytest.importorskip(library)
    import bench_images

    monkeypatch.setattr(bench_images, "SIZE", contestants.Size(action=2, batch=2, transitions=200))
    modes = {"eager": lambda: bench_images.contestants("no")}
    capfd.readouterr()
    interleaved.report(modes, interleaved.Options(rounds=1, steps=1))
    lines = [line.removeprefix("eager").split(")")[0].strip() for line in capfd.readouterr().out.splitlines()]
    # With its own: actor and V(s), V(s') once, N critics and their targets.
    assert lines == [
        "tensor (7",
        "sb3 (7",
        "sb3, shared (3",
        "d3rlpy (7",
        "d3rlpy's IQL (10",
        "SB3's SAC (5",
    ]


def test_large_data_are_measured_where_the_disk_has_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = bench_large.Options(rows=2000, folder=tmp_path, adapters=("tensor",), steps=4)
    bench_large.main(options)
    title, row = capfd.readouterr().out.splitlines()[-2:]
    assert title.split()[:2] == ["first", "step"]
    assert row.split()[0] == "tensor"
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(bench_large.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    bench_large.main(options)
    assert capfd.readouterr().out.startswith("skipped: 2,000 transitions take 1,020,000 bytes on the way")
