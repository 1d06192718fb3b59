"""The command line: what it prints, where, and how it ends."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import EntryPoint, packages_distributions, version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from packaging.utils import canonicalize_name
from strangers import Entry, plugin, write_distribution

from iql_plugins import data, plugins
from iql_plugins.cli import COMMANDS, inspect, label, main, output, policies, report
from iql_plugins.cli.reference_scores import normalized_score, reference
from iql_plugins.cli.rollouts import LONGEST_EPISODE, environment_spaces, rollouts
from iql_plugins.cli.statistics import estimate
from iql_plugins.config import IQLConfig
from iql_plugins.hookspecs import Adapter, Command, Training
from iql_plugins.plugins import PluginError
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent

PENDULUM = Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,)))
CONFIG = IQLConfig(n_steps=10, hidden_sizes=(8,), compile="no")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, on a machine that is never slow; status, stdout and stderr."""
    monkeypatch.setattr(output, "PATIENCE", 600.0)

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


stranger = partial(Entry, distribution="stranger")


def install(monkeypatch: pytest.MonkeyPatch, *entries: Entry | EntryPoint) -> None:
    """Makes these the installed plugins, beside the real ones."""
    real = list(plugins.entry_points(group=plugins.PROJECT))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*real, *entries])


# What is printed, and the exit status


def test_the_version_and_the_help_are_printed(run: Run) -> None:
    status, out, err = run("--version")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"iql-plugins {version('iql-plugins')}"
    for name in ("torch", "stable-baselines3", "d3rlpy", "torchrl"):
        assert f"{name} {version(name)}" in out.splitlines()
    assert json.loads(run("--version", "--json")[1])["packages"]["torch"] == version("torch")
    for command in ((), *((command,) for command in COMMANDS)):
        status, out, err = run(*command, "--help")
        assert (status, err) == (0, "")
        assert out.startswith("usage: iql-plugins")


def test_the_version_names_the_framework_of_each_adapter(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_distribution(tmp_path, "acme", "", requires=['rich; extra == "acme"', 'pytest; extra == "other"'])
    monkeypatch.syspath_prepend(tmp_path)
    packages = {
        canonicalize_name(name): number
        for name, number in json.loads(run("--version", "--json")[1])["packages"].items()
    }
    assert packages["rich"] == version("rich")
    assert "pytest" not in packages
    distributions = packages_distributions()
    named = []
    for name in set(plugins.available()) - {"acme"}:
        # One whose framework is missing has none to name.
        with contextlib.suppress(PluginError):
            if (framework := plugins.load(name).framework) is not None:
                [distribution] = distributions[framework]
                assert packages[canonicalize_name(distribution)] == version(distribution)
                named.append(name)
    assert named


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
    assert finished.stdout.startswith(f"iql-plugins {version('iql-plugins')}\n")


@pytest.mark.parametrize("arguments", ["--help", "train --help", "adapters", "completion bash"])
def test_what_needs_no_training_imports_nothing_that_trains(arguments: str) -> None:
    code = f"import sys; from iql_plugins.cli import main; main({arguments.split()}); print(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = finished.stdout.splitlines()[-1].split()
    assert "iql_plugins.config" in modules
    # TensorDict takes longer than torch itself.
    assert not {"tensordict", "torch._dynamo", "sympy", "iql_plugins.cli.settings"} & set(modules)


@pytest.mark.parametrize(
    ("env", "advice"),
    [
        ("Hopper-v4", ": pip install 'iql-plugins[mujoco]'"),
        ("LunarLander-v3", ": pip install 'gymnasium[box2d]'"),
        ("CartPole-v1", ": pip install 'gymnasium[classic-control]'"),
        ("phys2d/CartPole-v1", ""),
        ("Unknown-v0", ""),
    ],
)
def test_an_environment_whose_package_is_missing_says_what_installs_it(
    env: str, advice: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gymnasium

    def make(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'imageio'")

    monkeypatch.setattr(gymnasium, "make", make)
    _, _, err = run("train", "--env", env)
    assert err.splitlines()[-1].endswith(f"the environment {env!r} cannot be made: No module named 'imageio'{advice}")


def test_an_unknown_environment_gets_the_nearest_name(run: Run) -> None:
    assert "Did you mean: `Pendulum`?" in run("train", "--env", "Pendulm-v1")[2]


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
        (["train", "--objective-options", "alpha"], "--objective-options: expected names and numbers, such as alpha"),
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
    from iql_plugins.cli import adapters

    def fail(arguments: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(adapters, "run", fail)
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
from iql_plugins.cli import adapters, main
def noisy(arguments, quiet=adapters.run):
    print("python")
    os.write(1, b"descriptor\\n")
    ctypes.CDLL(None).puts(b"C")
    subprocess.run(["echo", "child"])
    return quiet(arguments)
adapters.run = noisy
atexit.register(lambda: print("at exit"))
sys.argv = ["iql-plugins", "adapters", "--json"]
sys.exit(main())
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tensor" in [entry["name"] for entry in json.loads(finished.stdout)["adapters"]]
    for line in ("python", "descriptor", "C", "child", "at exit"):
        assert line in finished.stderr.splitlines()


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    assert output.json_text({"a": [1, 2]}, indent=None) == '{"a": [1, 2]}'
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

    from iql_plugins.cli import adapters

    requirements = {"stranger": ["torch", "stable-baselines4>=1; extra == 'missing'", "numpy>=1; extra == 'there'"]}
    monkeypatch.setattr(adapters, "requires", lambda name: requirements.get(name))
    entries = [
        stranger("broken", broken),
        stranger("missing", needs_more),
        stranger("there", lambda: plugin("there", iql_adapter=lambda: Adapter("there", "numpy"))),
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

    install(monkeypatch, stranger("broken", broken))
    monkeypatch.setenv(plugins.STRICT_VARIABLE, "1")
    status, _, err = run("adapters")
    assert status == 2
    assert err.startswith("iql-plugins: plugin 'broken' of stranger 1.0")


def test_a_new_adapter_has_the_name_that_is_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("adapters", "--new", "acme")
    assert (status, out.startswith("wrote README.md, iql_acme/__init__.py")) == (0, True)
    texts = [path.read_text() for path in Path("iql-acme").rglob("*.*")]
    assert "class AcmeIQL" in "".join(texts)
    assert not any("tiny" in text.lower() for text in texts)
    before = {path: path.read_bytes() for path in Path("iql-acme").rglob("*.*")}
    for name, message in (("acme", "is there already"), ("sb3", "installed already"), ("../x", "one word of small")):
        status, _, err = run("adapters", "--new", name)
        assert (status, message in err) == (2, True)
    assert before == {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}


def test_a_plugins_command_is_in_the_help_and_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []

    def main(arguments: Sequence[str]) -> dict[str, Any]:
        asked.append(arguments)
        sys.stdout.write("hello\n")
        return {"greeted": arguments[0]}

    def commands() -> list[Command]:
        return [Command("greet", "Says hello.", main)]

    loaded: list[str] = []
    greeter = stranger("greeter", lambda: loaded.append("greeter") or plugin("greeter", iql_commands=commands))
    thief = stranger("thief", lambda: plugin("thief", iql_commands=lambda: [Command("train", "", main)]))
    faulty = stranger("faulty", lambda: plugin("faulty", iql_commands=lambda: 1 / 0))
    install(monkeypatch, greeter, thief, faulty)
    assert run("adapters", "--new", "")[0] == 2
    assert not loaded
    status, out, _ = run("--help")
    assert (status, "greet" in out, "Says hello." in out) == (0, True, True)
    assert run("greet", "you") == (0, "hello\n", "")
    status, out, err = run("greet", "you", "--json")
    assert (status, json.loads(out), err) == (0, {"greeted": "you"}, "hello\n")
    assert asked == [["you"], ["you", "--json"]]
    status, _, err = run("gret")
    assert (status, len(err.splitlines())) == (2, 1)
    errors = {entry["name"]: entry["error"] for entry in json.loads(run("adapters", "--json")[1])["adapters"]}
    assert "failed in iql_commands(): ZeroDivisionError" in errors["faulty"]
    assert "failed in iql_commands(): ValueError: train is taken" in errors["thief"]
    assert errors["greeter"] is None


def test_a_plugins_command_that_fails_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: Sequence[str]) -> None:
        raise OSError("no luck")

    install(monkeypatch, stranger("x", lambda: plugin("x", iql_commands=lambda: [Command("fail", "", fail)])))
    status, _, err = run("fail")
    assert status == 1
    assert err.splitlines()[-1] == "iql-plugins: OSError: no luck"


# Datasets


def test_a_dataset_is_inspected(run: Run) -> None:
    status, out, _ = run("inspect", "pendulum-v1-sac", "--json")
    document = json.loads(out)
    assert status == 0
    assert document["transitions"] == 20_000
    assert document["returns"]["mean"] == pytest.approx(-325.8, abs=0.1)
    _, out, _ = run("inspect")
    assert "20000" in out
    assert "note no-terminals: no step is terminal" in out
    assert run("inspect", "--fail-on", "warning")[0] == 0
    assert run("inspect", "--fail-on", "note")[0] == 1
    assert json.loads(run("inspect", "--fail-on", "note", "--json")[1])["findings"][0]["severity"] == "note"


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


def test_observations_are_held_against_the_environments_bounds(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "degrees.npz"
    columns = dict(np.load(Path(data.__file__).parent / "datasets" / "pendulum-v1-sac.npz"))
    np.savez(path, **{key: 57.3 * column if "obs" in key else column for key, column in columns.items()})
    codes = {}
    for env in ((), ("--env", "Pendulum-v1")):
        findings = json.loads(run("inspect", path, *env, "--json")[1])["findings"]
        codes[env] = {finding["code"] for finding in findings}
    assert codes["--env", "Pendulum-v1"] - codes[()] == {"observations-outside-bounds"}


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
    from iql_plugins.data import Dataset, load_dataset

    tensors = load_dataset("pendulum-v1-sac")[:400]

    def read(source: object) -> Dataset | None:
        return Dataset(tensors, "a stranger's") if source == "stranger://data" else None

    install(monkeypatch, stranger("stranger", lambda: plugin("stranger", iql_read_dataset=read)))
    assert json.loads(run("inspect", "stranger://data", "--json")[1])["transitions"] == 400
    status, _, err = run("inspect", "stranger://other")
    assert status == 2
    assert "there is no dataset, file or folder 'stranger://other'" in err


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


def test_one_episode_has_no_interval(run: Run, policy: Path) -> None:
    command = ("evaluate", policy, "--env", "Pendulum-v1", "--episodes", "1")
    assert json.loads(run(*command, "--json")[1])["confidence_95"] is None
    text = run(*command)[1]
    assert "mean return" in text
    assert "none of one episode" in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        (("evaluate", "POLICY", "--env", "Pendulum-v1"), "--video", "new.mp4"),
        (("export", "POLICY"), "--output", "new.onnx"),
        (("label", "POLICY", "pendulum-v1-sac"), "--output", "new.parquet"),
        (("inspect", "pendulum-v1-sac"), "--plot", "new.png"),
        (("report", "RUN"), "--output", "new.html"),
    ],
)
def test_a_file_to_write_needs_a_folder_and_is_none(
    command: tuple[str, ...], option: str, name: str, run: Run, policy: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """That is found before anything is read, or made."""
    for module, reader in ((policies, "load_agent"), (label, "load_agent"), (inspect, "read_dataset"),
                           (report, "read_run")):  # fmt: skip
        monkeypatch.setattr(module, reader, lambda *arguments, **options: pytest.fail("something was read"))
    given = [policy if word == "POLICY" else word for word in command]
    (tmp_path / name).mkdir()
    (tmp_path / "file").write_bytes(b"")
    for target, words in (
        (tmp_path / name, f"{option} must be a file, got {str(tmp_path / name)!r}, which is a folder"),
        (tmp_path / "nowhere" / name, f"{option}: there is no folder {str(tmp_path / 'nowhere')!r}"),
        (tmp_path / "file" / name, f"{option}: there is no folder {str(tmp_path / 'file')!r}"),
    ):
        status, _, err = run(*given, option, target)
        assert (status, words in err) == (2, True), err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["agent.safetensors", "file", name])


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
    assert "which is a folder: give the file to write" in err
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
    return stranger(name, lambda: plugin(name, iql_adapter=lambda: Adapter(name, None, training=training)))


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
