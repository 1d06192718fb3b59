"""The command line: what it prints, where, and how it ends."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from iql_plugins import registry
from iql_plugins.agent import Agent
from iql_plugins.cli import main, output
from iql_plugins.cli.reference_scores import normalized_score, reference
from iql_plugins.cli.rollouts import LONGEST_EPISODE, environment_spaces, rollouts
from iql_plugins.cli.statistics import estimate
from iql_plugins.config import IQLConfig
from iql_plugins.hookspecs import Adapter, Training, hookimpl
from iql_plugins.spaces import Box, Discrete, Spaces

PENDULUM = Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,)))
CONFIG = IQLConfig(n_steps=10, hidden_sizes=(8,), compile="no")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process; status, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "agent.safetensors"
    Agent(PENDULUM, CONFIG, seed=0).save(path)
    return path


class Entry:
    """An entry point of a distribution that may not be installed."""

    def __init__(self, name: str, load: Callable[[], object], distribution: str = "stranger") -> None:
        self.name, self.value, self.load = name, f"{name}.plugin", load
        self.dist = types.SimpleNamespace(name=distribution, version="1.0")


def install(monkeypatch: pytest.MonkeyPatch, *entries: Entry | EntryPoint) -> None:
    """Makes these the installed plugins, beside the real ones."""
    real = list(registry.entry_points(group=registry.PROJECT))
    monkeypatch.setattr(registry, "entry_points", lambda group: [*real, *entries])


def plugin(name: str, **hooks: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{hook: hookimpl(function) for hook, function in hooks.items()})


# What is printed, and the exit status


def test_the_version_and_the_help_are_printed(run: Run) -> None:
    assert run("--version") == (0, f"iql-plugins {version('iql-plugins')}\n", "")
    for command in ((), ("train",), ("evaluate",), ("export",), ("convert",), ("inspect",), ("adapters",), ("bench",)):
        status, out, err = run(*command, "--help")
        assert (status, err) == (0, "")
        assert out.startswith("usage: iql-plugins")


def test_the_help_has_no_markup_and_all_hyper_parameters(run: Run) -> None:
    from dataclasses import fields

    _, out, _ = run("train", "--help")
    assert ":math:" not in out
    assert "``" not in out
    for field in fields(IQLConfig):
        assert re.search(rf"--{field.name.replace('_', '-')}[ ,]", out), field.name


def test_the_version_is_there_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from iql_plugins.cli import main; sys.exit(main(['--version']))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == f"iql-plugins {version('iql-plugins')}\n"


def test_a_reader_that_goes_away_is_no_error_of_ours() -> None:
    code = "import sys; from iql_plugins.cli import main; sys.exit(main(['inspect']))"
    read, write = os.pipe()
    os.close(read)
    try:
        finished = subprocess.run(
            [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert (finished.returncode, finished.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which command"),
        (["fly"], "fly"),
        (["train", "--wings", "2"], "Unrecognized options: --wings, 2"),
        (["train", "--expectile", "high"], "--expectile"),
        (["train", "--expectile", "3"], "expectile must be in (0, 1], got 3.0"),
        (["train", "--preset", "moon"], "preset must be one of locomotion"),
        (["train", "--seed", "-1"], "--seed must be at least 0"),
        (
            ["train", "--seed", str(2**63 - 1), "--seeds", "2"],
            "--seed must be at least 0, and the last one below 2**63",
        ),
        (
            ["train", "--device", "banana"],
            "--device must be auto, cpu, cuda or another of torch's devices, got 'banana'",
        ),
        (["train", "--adapter", "tensr"], "did you mean 'tensor'"),
        (["train", "--dataset", "nowhere.npz"], "there is no file nowhere.npz"),
        (["train", "--dataset", "pendulum"], "there is no dataset, file or folder 'pendulum'"),
        (["train", "--env", "Moon-v1"], "the environment 'Moon-v1' cannot be made"),
        (["train", "--env", "CartPole-v1"], "discrete actions must be whole numbers"),
        (["train", "--seeds", "0"], "--seeds must be at least 1"),
        (["train", "--device", "abacus"], "abacus"),
        (["train", "--resume", "nowhere"], "there is no nowhere/config.json"),
        (["train", "--resume", "nowhere", "--seeds", "3"], "--seeds: --resume takes everything from the run's"),
        (["train", "--config", "nowhere.json"], "there is no nowhere.json"),
        (["evaluate"], "Missing"),
        (["evaluate", "nowhere.safetensors"], "there is no policy 'nowhere.safetensors'"),
        (["export", "nowhere.safetensors", "--format", "tflite"], "--format"),
        (["convert", "in.safetensors", "out.safetensors"], "--to"),
        (["inspect", "nowhere.hdf5"], "there is no file nowhere.hdf5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: Sequence[str], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    # A note may precede it.
    assert err.splitlines()[-1].startswith("iql-plugins: ")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
    status, out, err = run(*arguments, "--json")
    assert status == 2
    assert message in json.loads(out)["error"]


def test_an_error_of_ours_is_no_mistake_of_the_user(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from iql_plugins.cli import listings

    def fail(arguments: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(listings, "adapters", fail)
    status, out, err = run("adapters", "--json")
    assert status == 1
    assert json.loads(out) == {"error": "ZeroDivisionError: division by zero"}
    assert "Traceback" in err


def test_a_missing_package_is_named_with_its_extra(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run("train")
    assert status == 2
    assert "pip install 'iql-plugins[cli]'" in err
    assert not list(tmp_path.iterdir())


def test_whatever_libraries_print_stdout_is_one_json_document() -> None:
    code = """
import atexit, ctypes, os, subprocess, sys
from iql_plugins.cli import listings, main
def noisy(arguments, quiet=listings.adapters):
    print("python")
    os.write(1, b"descriptor\\n")
    ctypes.CDLL(None).puts(b"C")
    subprocess.run(["echo", "child"])
    return quiet(arguments)
listings.adapters = noisy
atexit.register(lambda: print("at exit"))
sys.argv = ["iql-plugins", "adapters", "--json"]
sys.exit(main())
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tensor" in [entry["name"] for entry in json.loads(finished.stdout)["adapters"]]
    for line in ("python", "descriptor", "C", "child", "at exit"):
        assert line in finished.stderr.splitlines()


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    assert json.loads(output.json_text({"a": [float("nan"), float("inf"), 1.5]})) == {"a": [None, None, 1.5]}


# Adapters


def test_adapters_are_listed_without_importing_a_framework() -> None:
    code = "import sys; from iql_plugins.cli import main; main(['adapters', '--json']); print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = finished.stdout.splitlines()[-1].split()
    assert "iql_tensor.plugin" in modules
    assert not {"stable_baselines3", "d3rlpy", "torchrl", "gymnasium", "matplotlib"} & set(modules)


def test_an_adapter_says_what_it_needs_and_what_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> object:
        raise SyntaxError("bad plugin")

    def needs_more() -> object:
        raise ImportError("No module named 'stable_baselines4'")

    from iql_plugins.cli import listings

    requirements = {"stranger": ["torch", "stable-baselines4>=1; extra == 'missing'", "numpy>=1; extra == 'there'"]}
    monkeypatch.setattr(listings, "requires", lambda name: requirements.get(name))
    entries = [
        Entry("broken", broken),
        Entry("missing", needs_more),
        Entry("there", lambda: plugin("there", iql_adapter=lambda: Adapter("there", "numpy"))),
    ]
    install(monkeypatch, *entries)
    status, out, _ = run("adapters", "--json")
    assert status == 0
    found = {entry["name"]: entry for entry in json.loads(out)["adapters"]}
    assert found["tensor"]["version"] == version("iql-plugins")
    assert "SyntaxError: bad plugin" in found["broken"]["error"]
    assert found["missing"]["install"] == "pip install 'stranger[missing]'"
    assert found["missing"]["error"] is None
    assert found["there"]["framework"] == {"numpy": np.__version__}
    assert found["there"]["install"] is None
    _, out, _ = run("adapters")
    assert "stable-baselines4 missing" in out
    # Whole lines, however narrow the terminal: they are there to be copied.
    assert "missing: pip install 'stranger[missing]'" in out.splitlines()
    assert any(line.startswith("broken: ") and line.endswith("SyntaxError: bad plugin") for line in out.splitlines())


def test_what_is_broken_is_an_error_in_strict_mode(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> object:
        raise SyntaxError("bad plugin")

    install(monkeypatch, Entry("broken", broken))
    monkeypatch.setenv(registry.STRICT_VARIABLE, "1")
    status, _, err = run("adapters")
    assert status == 2
    assert err.startswith("iql-plugins: plugin 'broken' of stranger 1.0")


# Datasets


def test_a_dataset_is_inspected(run: Run) -> None:
    status, out, _ = run("inspect", "pendulum-v1-sac", "--json")
    document = json.loads(out)
    assert status == 0
    assert document["transitions"] == 20_000
    assert document["returns"]["mean"] == pytest.approx(-325.8, abs=0.1)
    _, out, _ = run("inspect")
    assert "20000" in out
    assert "no-terminals: no step is terminal" in out


def test_actions_are_held_against_the_environments_bounds(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    observations = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    np.savez(
        path,
        observations=observations[:5],
        next_observations=observations[1:],
        actions=np.array([[0.5], [1.5], [-2.5], [0.1], [0.2]], np.float32),
        rewards=np.arange(5, dtype=np.float32),
        terminals=np.array([0, 0, 0, 0, 1], np.float32),
        timeouts=np.zeros(5, np.float32),
    )
    outside = {}
    for env in ((), ("--env", "Pendulum-v1")):
        findings = json.loads(run("inspect", path, *env, "--json")[1])["findings"]
        outside[env] = next(finding["count"] for finding in findings if finding["code"] == "actions-outside-bounds")
    assert outside == {(): 2, ("--env", "Pendulum-v1"): 1}


@pytest.mark.parametrize("command", ["inspect", "train"])
def test_a_column_that_is_not_read_is_refused_in_one_line(command: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    columns = {key: np.zeros((4, 2), np.float32) for key in ("observations", "next_observations", "actions")}
    flags = {key: np.zeros(4, np.float32) for key in ("rewards", "terminals", "time_outs")}
    np.savez(path, **columns, **flags)
    source = (path,) if command == "inspect" else ("--dataset", path, "--run-dir", tmp_path / "run")
    status, out, err = run(command, *source)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert f"{path}: 'time_outs' is not a column that is read; did you mean 'timeouts'?" in err
    assert not (tmp_path / "run").exists()


def test_a_plugins_dataset_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from iql_plugins.data import load_dataset

    def load(source: object) -> object:
        return load_dataset("pendulum-v1-sac")[:400] if source == "stranger://data" else None

    install(monkeypatch, Entry("stranger", lambda: plugin("stranger", iql_load_dataset=load)))
    assert json.loads(run("inspect", "stranger://data", "--json")[1])["transitions"] == 400
    status, _, err = run("inspect", "stranger://other")
    assert status == 2
    assert "there is no dataset, file or folder 'stranger://other'" in err


# Speed


BENCH = ["bench", *("--observation", "3", "--action", "1", "--batch", "8", "--hidden", "8", "--transitions", "200")]
PEER = (
    "def peer(data, batch_size, hidden):\n    return lambda count: [data['observation'][:batch_size].sum()] * count\n"
)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks compile nothing, which would take most of their time."""
    from iql_plugins.cli import bench, peers

    monkeypatch.setattr(bench, "ours", lambda adapter, compile, **_: peers.ours(adapter, "no"))


@pytest.mark.usefixtures("eager")
def test_the_speed_is_measured_beside_peers_that_print_nothing(run: Run, tmp_path: Path) -> None:
    from iql_plugins.cli.peers import PEERS, installed

    mine, plot = tmp_path / "mine.py", tmp_path / "speed.png"
    mine.write_text(PEER)
    everyone = [*installed(), mine]
    options = ["--rounds", "1", "--steps", "2", "--threads", "1", "--device", "cpu"]
    threads = torch.get_num_threads()
    status, out, err = run(*BENCH, *options, "--peers", *everyone, "--adapters", "tensor", "--plot", plot, "--json")
    assert status == 0
    document = json.loads(out)
    names = ["iql-plugins", "iql-plugins, eager", "iql-plugins through tensor", *installed(), "mine"]
    assert list(document["timings"]) == names
    assert document["timings"]["iql-plugins"]["ratio"] == 1.0
    assert all(timing["ms"] > 0.0 for timing in document["timings"].values())
    assert document["size"]["batch"] == 8
    machine = document["machine"]
    assert (machine["threads"], machine["device"], machine["gpu"]) == (1, "cpu", None)
    assert torch.get_num_threads() == threads
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "[info" not in err
    status, out, _ = run(*BENCH, *options, "--peers")
    assert status == 0
    assert not [name for name in PEERS if name in out]


@pytest.mark.slow
def test_a_benchmark_prints_its_table_alone() -> None:
    code = "import sys; from iql_plugins.cli import main; sys.exit(main())"
    options = [*BENCH, "--rounds", "1", "--steps", "2"]
    finished = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=True)
    assert finished.stdout.split()[:3] == ["ms", "a", "step"]
    assert "[info" not in finished.stdout + finished.stderr


def test_a_benchmark_is_about_the_peers_that_are_installed_and_about_many_steps(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iql_plugins.cli import bench, peers

    asked: list[Any] = []
    found = importlib.util.find_spec
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "d3rlpy" else found(name))
    assert "d3rlpy" not in peers.installed()

    def measured(*arguments: Any) -> Any:
        asked.append(arguments)
        return output.Result({})

    monkeypatch.setattr(bench, "_bench", measured)
    assert run("bench")[0] == 0
    made, _, size, _, steps, *_ = asked[0]
    assert list(made) == peers.installed()
    assert size == peers.Size()
    assert steps >= 200
    status, _, err = run("bench", "--peers", "d3rlpy")
    assert status == 2
    assert "the peer 'd3rlpy' needs d3rlpy, which is not installed" in err


def test_on_a_gpu_the_step_is_measured_as_a_cuda_graph_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from iql_plugins.cli import bench

    asked: list[Any] = []
    clock = iter(range(100))

    def ours(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options))
        return lambda size, data: lambda count: None

    def measure(contestants: Any, size: Any, rounds: int, steps: int, device: torch.device) -> Any:
        assert (steps, device.type) == (1000, "cuda")
        return [bench.Timing(name, 1.0, 1.0) for name in contestants], 1e9

    monkeypatch.setattr(bench, "device_name", lambda name: {"auto": "cuda"}[name])
    monkeypatch.setattr(bench, "dataset_of", lambda size: types.SimpleNamespace(to=lambda device: None))
    monkeypatch.setattr(bench, "ours", ours)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "_now", lambda device: next(clock))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fast Card")
    status, out, _ = run("bench", "--peers", "--json")
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
    assert "Fast Card, median of" in run("bench", "--peers")[1]


def test_what_is_launched_is_done_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from iql_plugins.cli import bench

    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("done"))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(len(events)))
    assert bench._now(torch.device("cuda")) == 1.0
    assert bench._now(torch.device("cpu")) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "nobody"], "there is no peer 'nobody': give one of torchrl"),
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
    status, out, err = run("bench", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


# Policies


def test_a_policy_is_evaluated(run: Run, policy: Path) -> None:
    status, out, _ = run("evaluate", policy, "--env", "Pendulum-v1", "--episodes", "3", "--json")
    document = json.loads(out)
    assert status == 0
    assert document["lengths"] == [200, 200, 200]
    assert document["mean_return"] == pytest.approx(np.mean(document["returns"]))
    low, high = document["confidence_95"]
    assert low < document["mean_return"] < high
    again = json.loads(run("evaluate", policy, "--env", "Pendulum-v1", "--episodes", "2", "--seed", "1", "--json")[1])
    np.testing.assert_allclose(again["returns"], document["returns"][1:], rtol=1e-3)
    assert "mean return" in run("evaluate", policy, "--env", "Pendulum-v1", "--episodes", "1")[1]


def test_a_policy_needs_an_environment_like_its_own(run: Run, policy: Path) -> None:
    for arguments, message in (
        ((policy,), "does not say which environment it is for: give --env"),
        ((policy, "--env", "CartPole-v1"), "the policy's observation space"),
        ((policy, "--env", "Pendulum-v1", "--episodes", "0"), "--episodes must be at least 1"),
        ((policy, "--env", "Pendulum-v1", "--seed", "-1"), "--seed must be at least 0, got -1"),
    ):
        status, _, err = run("evaluate", *arguments)
        assert status == 2
        assert message in err


def test_a_damaged_file_is_no_policy(run: Run, tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    (tmp_path / "policy.xyz").write_bytes(b"nothing")
    for name, message in (("damaged.safetensors", "damaged"), ("policy.xyz", "has the suffix of no installed adapter")):
        status, _, err = run("export", tmp_path / name)
        assert status == 2
        assert message in err


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_policy_is_exported(format: str, run: Run, policy: Path) -> None:
    pytest.importorskip("onnxscript")
    status, out, _ = run("export", policy, "--format", format, "--json")
    document = json.loads(out)
    assert status == 0
    assert Path(document["output"]) == policy.with_suffix({"onnx": ".onnx", "torch": ".pt2"}[format])
    assert Path(document["output"]).exists()
    assert document["largest_difference"] <= 1e-5


def test_what_cannot_be_written_is_a_mistake(run: Run, policy: Path, tmp_path: Path) -> None:
    status, _, err = run("export", policy, "--output", tmp_path)
    assert status == 2
    assert "is a folder: give the file to write" in err
    # Not even root can write there.
    if Path("/proc").is_dir():
        for arguments in (["export", policy, "--output", "/proc/a.onnx"], ["convert", policy, "/proc/a.safetensors"]):
            status, _, err = run(*arguments, *(["--to", "tensor"] if arguments[0] == "convert" else []))
            assert status == 2
            assert "/proc/.a." in err
    assert [file.name for file in tmp_path.iterdir()] == [policy.name]


def test_an_export_without_its_packages_names_the_extra(
    run: Run, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    status, _, err = run("export", policy)
    assert status == 2
    assert "pip install 'iql-plugins[onnx]'" in err
    assert not policy.with_suffix(".onnx").exists()


class Foreign:
    """A framework's algorithm, whose native file is a common checkpoint with another name."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent


def foreign(name: str, *, spoil: bool = False) -> Entry:
    def load(path: Any) -> Foreign:
        agent = Agent.load(path)
        if spoil:
            with torch.no_grad():
                for parameter in agent.loss.actor_network.parameters():
                    parameter.add_(1.0)
        return Foreign(agent)

    training = Training(
        from_agent=Foreign,
        to_agent=lambda foreign: foreign.agent,
        fit=lambda *arguments: None,
        save=lambda foreign, path: foreign.agent.save(path),
        load=load,
        suffix=".native",
    )
    return Entry(name, lambda: plugin(name, iql_adapter=lambda: Adapter(name, None, training=training)))


def test_agents_move_between_adapters(run: Run, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, foreign("foreign"))
    native, back = tmp_path / "agent.native", tmp_path / "back.safetensors"
    status, out, _ = run("convert", policy, native, "--to", "foreign", "--json")
    assert status == 0
    assert json.loads(out)["output"] == str(native)
    # The suffix tells whose file it is.
    assert run("convert", native, back, "--to", "tensor")[0] == 0
    observations = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    assert np.array_equal(Agent.load(back).act(observations), Agent.load(policy).act(observations))
    assert run("evaluate", native, "--env", "Pendulum-v1", "--episodes", "1")[0] == 0
    install(monkeypatch, foreign("other"))
    status, _, err = run("convert", native, back, "--to", "tensor")
    assert status == 2
    assert "may be of foreign or other: give --from" in err
    assert run("convert", native, back, "--to", "tensor", "--from", "other")[0] == 0


def test_a_conversion_that_acts_differently_is_not_written(
    run: Run, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, foreign("foreign", spoil=True))
    status, _, err = run("convert", policy, tmp_path / "agent.native", "--to", "foreign")
    assert status == 1
    assert "acts differently" in err
    assert [file.name for file in tmp_path.iterdir()] == [policy.name]
    status, _, err = run("convert", policy, tmp_path / "agent.zip", "--to", "foreign")
    assert status == 2
    assert "has suffix .native" in err


# Episodes


class Counting(gymnasium.Env[Any, Any]):
    """Ends after as many steps as its seed says, each rewarded by 1; seed 0 never ends."""

    observation_space = gymnasium.spaces.Dict({"left": gymnasium.spaces.Discrete(9)})
    action_space = gymnasium.spaces.Discrete(2, start=3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.left = seed
        return {"left": np.int64(min(seed or 8, 8))}, {}

    def step(self, action: int) -> Any:
        assert self.action_space.contains(action)
        assert self.left != "over", "stepped past the end of its episode"
        self.left = "over" if self.left == 1 else (self.left or 0) - 1
        return {"left": np.int64(1)}, 1.0, self.left == "over", False, {}


def test_each_episode_counts_once_and_has_its_own_seed() -> None:
    gymnasium.register("Counting-v0", entry_point=Counting, max_episode_steps=50)
    batches = []

    def act(observations: Any) -> Any:
        batches.append(len(observations["left"]))
        return np.full(len(observations["left"]), 4)

    episodes = rollouts(act, "Counting-v0", [3, 1, 2, *[1] * 40])
    assert [episode.length for episode in episodes] == [3, 1, 2, *[1] * 40]
    assert [episode.total for episode in episodes[:3]] == [3.0, 1.0, 2.0]
    assert batches == [32, 2, 1, 11]
    assert environment_spaces("Counting-v0") == Spaces({"left": Discrete(9)}, Discrete(2, 3))


def test_an_episode_without_a_limit_is_cut() -> None:
    gymnasium.register("Endless-v0", entry_point=Counting)
    (episode,) = rollouts(lambda observations: [3], "Endless-v0", [0])
    assert episode.length == LONGEST_EPISODE


# Statistics


def test_the_interval_is_over_seeds_and_over_episodes() -> None:
    random = np.random.default_rng(0)
    episodes = random.normal(size=40)
    over_episodes = estimate([episodes.tolist()])
    # 1.96 standard errors of the mean on each side.
    assert over_episodes.high - over_episodes.low == pytest.approx(2 * 1.96 * episodes.std() / 40**0.5, rel=0.1)
    # Seeds that differ by much widen it, however many episodes there are.
    seeds = estimate([(episodes + shift).tolist() for shift in (-5.0, 0.0, 5.0)])
    assert seeds.low < -2.5
    assert seeds.high > 2.5
    assert seeds.mean == pytest.approx(episodes.mean())
    assert estimate([[1.0, 1.0]]) == estimate([[1.0, 1.0, 1.0]])
    assert np.isnan(estimate([[1.0]]).low)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("HalfCheetah-v5", (-280.178953, 12135.0)),
        ("halfcheetah-medium-expert-v2", (-280.178953, 12135.0)),
        ("hopper-medium-v2", (-20.272305, 3234.3)),
        ("my_module:Walker2d-v4", (1.629008, 4592.3)),
        ("antmaze-umaze-diverse-v2", (0.0, 1.0)),
        ("Ant-v4", (-325.6, 3879.7)),
        ("AdroitHandDoor-v1", (-56.512833, 2880.5693087298737)),
        ("AntMaze_UMaze-v4", None),
        ("Pendulum-v1", None),
        (None, None),
    ],
)
def test_scores_are_normalised_where_the_reference_is_known(env: str | None, expected: Any) -> None:
    assert reference(env) == expected
    if expected:
        assert normalized_score(env, expected[0]) == 0.0
        assert normalized_score(env, expected[1]) == 100.0
