"""A stranger's adapter: as ``iql-plugins adapters --new`` writes it, installed, used, and broken on purpose."""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    if finished.returncode:
        raise AssertionError(f"{command} failed:\n{finished.stdout}\n{finished.stderr}")
    return finished


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that sees the packages of this one, with a new adapter installed into it."""
    folder = tmp_path_factory.mktemp("third_party")
    written = json.loads(
        run(sys.executable, "-m", "iql_plugins.cli", "adapters", "--new", "tiny", "--json", cwd=folder).stdout
    )
    assert written["files"] == ["README.md", "iql_tiny/__init__.py", "pyproject.toml", "test_tiny.py"]
    project = folder / written["folder"]
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    # addsitedir() and not the path alone: an editable install is a .pth file in there.
    here = sysconfig.get_path("purelib")
    (packages(environment) / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run(python(environment), "-m", "pip", "install", *offline, project)
    return environment


def python(environment: Path) -> Path:
    return environment / "bin" / "python"


def packages(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


@contextmanager
def replaced(path: Path, content: str) -> Iterator[None]:
    original = path.read_text(encoding="utf-8")
    path.write_text(content, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")


@pytest.mark.slow
def test_it_is_found_and_loaded_beside_the_others(environment: Path) -> None:
    code = (
        "import sys, iql_plugins; info = iql_plugins.available();"
        "assert 'tensor' in info and 'iql_tiny' not in sys.modules;"
        "assert (info['tiny'].distribution, info['tiny'].version, info['tiny'].error) == ('iql-tiny', '1.0', None);"
        "tiny = iql_plugins.load('tiny'); import iql_tiny; assert tiny.algorithms == {'TinyIQL': iql_tiny.TinyIQL}"
    )
    run(python(environment), "-c", code)


@pytest.mark.slow
def test_it_keeps_to_the_contract_by_the_test_that_comes_with_it(environment: Path) -> None:
    test = environment.parent / "iql-tiny" / "test_tiny.py"
    finished = run(python(environment), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", test.parent, test)
    assert "1 passed" in finished.stdout


@pytest.mark.slow
def test_the_command_line_lists_it_and_trains_with_it(environment: Path, tmp_path: Path) -> None:
    cli = [python(environment), "-m", "iql_plugins.cli"]
    adapters = {entry["name"]: entry for entry in json.loads(run(*cli, "adapters", "--json").stdout)["adapters"]}
    assert adapters["tiny"]["distribution"] == "iql-tiny"
    assert adapters["tiny"]["error"] is None
    folder = tmp_path / "run"
    options = ["--n-steps", "20", "--baseline", "none", "--episodes", "1", "--run-dir", folder, "--json"]
    result = json.loads(run(*cli, "train", "--adapter", "tiny", *options).stdout)
    assert "error" not in result
    assert list(folder.rglob("policy.safetensors"))


def test_broken_it_is_named_and_harms_no_other(environment: Path) -> None:
    code = (
        "import iql_plugins as p, torch; from iql_plugins.plugins import PluginError\n"
        "assert p.available()['tiny'].error is None\n"
        "assert p.map_batch({'action': torch.zeros(5, 1)}).batch_size == (5,)\n"
        "assert p.load('tensor').name == 'tensor'\n"
        "assert \"plugin 'tiny' of iql-tiny 1.0 (iql_tiny) cannot be imported\" in p.available()['tiny'].error\n"
        "try: p.load('tiny')\n"
        "except PluginError as error: assert 'iql-tiny 1.0' in str(error)\n"
        "else: raise AssertionError\n"
    )
    with replaced(packages(environment) / "iql_tiny" / "__init__.py", "raise SystemExit(3)"):
        run(python(environment), "-c", code)


@pytest.mark.slow
def test_broken_it_is_reported_by_the_command_line_that_lists_the_others(environment: Path) -> None:
    with replaced(packages(environment) / "iql_tiny" / "__init__.py", "raise RuntimeError('broken on purpose')"):
        listing = run(python(environment), "-m", "iql_plugins.cli", "adapters", "--json")
    adapters = {entry["name"]: entry for entry in json.loads(listing.stdout)["adapters"]}
    assert "broken on purpose" in adapters["tiny"]["error"]
    assert adapters["tensor"]["error"] is None


def test_a_duplicate_of_it_is_refused_by_both_names(environment: Path) -> None:
    metadata = packages(environment) / "iql_other-1.0.dist-info"
    metadata.mkdir()
    try:
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: iql-other\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text("[iql_plugins]\ntiny = iql_tiny\n")
        code = (
            "import iql_plugins; from iql_plugins.plugins import PluginError\n"
            "try: iql_plugins.load('tiny')\n"
            "except PluginError as error: assert 'iql-other' in str(error) and 'iql-tiny' in str(error), error\n"
            "else: raise AssertionError\n"
            "assert iql_plugins.load('tensor').name == 'tensor'\n"
        )
        run(python(environment), "-c", code)
    finally:
        for file in metadata.iterdir():
            file.unlink()
        metadata.rmdir()
