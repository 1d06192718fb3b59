"""Completion by real shells: commands, options, their choices, and files elsewhere."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from strangers import Entry, plugin

from iql_plugins import plugins
from iql_plugins.cli import COMMANDS, main
from iql_plugins.cli.arguments import Shell
from iql_plugins.config import PRESETS
from iql_plugins.hookspecs import Command

#: How a shell says what it offers behind some words, of which the last is begun: a candidate a line.
ASK: dict[Shell, str] = {
    "bash": """
        source {script}
        read -r _ _ default _ function _ < <(complete -p iql-plugins)
        COMP_WORDS=({words}) COMP_CWORD=$(({count} - 1)) COMPREPLY=()
        $function
        # What readline does then.
        [[ $default = default && ${{#COMPREPLY[@]}} = 0 ]] && COMPREPLY=($(compgen -f {last}))
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """,
    # What the completion system would do with candidates and files.
    "zsh": """
        typeset -A compstate=(nmatches 0)
        _describe() {{
            local all=("${{(@)${{(@P)2}}%%:*}}")
            local found=(${{(M)all:#{last}*}})
            compstate[nmatches]=$#found
            (( $#found )) && print -rl -- $found
        }}
        _files() {{ print -l -- {last}*(N) }}
        words=({words}) CURRENT={count}
        source {script}
    """,
    "fish": """
        source {script}
        complete -C {line} | string replace -r '\\t.*' ''
    """,
}
OPTIONS = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}


@pytest.fixture(params=ASK)
def shell(request: pytest.FixtureRequest) -> Shell:
    if shutil.which(request.param) is None:
        pytest.skip(f"completes in {request.param}, which is no package of Python's and is not installed here")
    return request.param


class Asked:
    """A shell that has read its script, in a folder of two files."""

    def __init__(self, shell: Shell, folder: Path, script: str) -> None:
        self.shell, self.folder = shell, folder
        self.script = folder.parent / f"{folder.name}.script"
        self.script.write_text(script)
        for name in ("data.npz", "dates"):
            (folder / name).touch()
        # Nothing is installed for it.
        bare = folder.parent / "bin"
        bare.mkdir()
        (bare / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
        (bare / "python3").chmod(0o755)
        self.environment = os.environ | {"PATH": f"{bare}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}

    def __call__(self, *words: str) -> list[str]:
        """What is offered behind the program's name and these words, the last of which is begun."""
        line = ["iql-plugins", *words]
        program = ASK[self.shell].format(
            script=shlex.quote(str(self.script)),
            words=" ".join(map(shlex.quote, line)),
            count=len(line),
            last=shlex.quote(line[-1]),
            line=shlex.quote(" ".join(line)),
        )
        finished = subprocess.run(
            [self.shell, *OPTIONS[self.shell], "-c", program],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment,
            check=False,
        )
        assert finished.stderr == ""
        return sorted({line for line in finished.stdout.splitlines() if line})


@pytest.fixture
def offered(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Asked:
    greet = Entry("x", lambda: plugin("x", iql_commands=lambda: [Command("greet", "Says hello.", lambda _: None)]))
    real = list(plugins.entry_points(group=plugins.PROJECT))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*real, greet])
    assert main(["completion", shell]) == 0
    (tmp_path / "folder").mkdir()
    return Asked(shell, tmp_path / "folder", capfd.readouterr().out)


def test_a_shell_completes_commands_options_choices_and_files(offered: Asked) -> None:
    assert set(offered("")) - {"-h", "--help"} == {*COMMANDS, "greet"}
    assert offered("insp") == ["inspect"]
    assert offered("train", "--actor-le") == ["--actor-learning-rate"]
    # Texts of several lines are behind these.
    assert [offered("train", option) for option in ("--env", "--stack")] == [["--env"], ["--stack"]]
    assert offered("adapters", "--che") == ["--check"]
    assert all(option.startswith("-") for option in offered("train", "--"))
    assert offered("export", "policy", "--format", "") == ["hub", "onnx", "torch", "torchscript"]
    assert offered("train", "--seed", "3", "--baseline", "b") == ["bc"]
    assert offered("train", "--preset", "") == sorted(PRESETS)
    for option in (("train", "--adapter"), ("convert", "--to"), ("evaluate", "--from")):
        assert {"tensor", "x"} <= set(offered(*option, ""))
    assert offered("train", "--dataset", "dat") == ["data.npz", "dates"]
    assert offered("inspect", "data") == ["data.npz"]
    assert offered("inspect", "--env", "Pendulum-v1", "dat") == ["data.npz", "dates"]


@pytest.mark.parametrize("shell", ASK)
def test_the_script_is_the_same_in_json(shell: Shell, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capfd.readouterr().out
    assert main(["completion", shell, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"shell": shell, "script": script}


def test_another_shell_is_a_mistake(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "('bash', 'zsh', 'fish')" in capfd.readouterr().err
    # Whoever completes by choices may type others all the same, and is told what there is.
    assert main(["train", "--adapter", "tensr"]) == 2
    assert "did you mean 'tensor'" in capfd.readouterr().err
