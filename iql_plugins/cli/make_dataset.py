"""``iql-plugins make-dataset``: data that anyone can make again."""

import contextlib
import hashlib
import importlib.util
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from iql_plugins import checkpoint
from iql_plugins.cli.arguments import MakeDataset
from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.cli.output import Result, note, table
from iql_plugins.cli.recipes import RECIPES
from iql_plugins.cli.recipes.recipe import Columns, Parts, Recipe, archive
from iql_plugins.cli.rollouts import environment_spaces, quiet
from iql_plugins.cli.workers import locked
from iql_plugins.data.arrays import Transitions
from iql_plugins.data.dataset import Dataset, Options
from iql_plugins.data.episodes import episode_returns
from iql_plugins.data.readers.npz import PROVENANCE

__all__ = ["run"]

#: What a dataset's numbers may depend on.
_PACKAGES = ("numpy", "gymnasium", "gymnasium-robotics", "mujoco", "ogbench", "stable-baselines3", "torch")


def run(arguments: MakeDataset) -> Result:
    """Makes a dataset, or goes on making it.

    Raises:
        UserError: for a recipe that there is none of, a package that is missing, or another file in its place.
    """
    if arguments.name is None:
        entries = [
            {"name": recipe.name, "env": recipe.env, "summary": recipe.summary, "missing": _missing(recipe)}
            for recipe in RECIPES.values()
        ]
        lines = [f"{entry['name']}: {entry['summary']}" + _hint(entry["missing"]) for entry in entries]
        return Result({"recipes": entries}, ["\n".join(lines)])
    recipe = _recipe(arguments.name)
    if (package := _missing(recipe)) is not None:
        raise UserError(f"{recipe.name} needs a package that is not installed: {package}")
    if arguments.seed < 0:
        raise UserError(f"--seed must be at least 0, got {arguments.seed}")
    folder = Path(arguments.out)
    if not (folder if folder.exists() else checkpoint.existing_parent(folder)).is_dir():
        raise UserError(f"--out must be a folder, or the path of a new one, got {arguments.out!r}: a file is there")
    made_with = _versions()
    with mistakes(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{recipe.name}-{arguments.seed}.npz"
    recorded = {"recipe": recipe.name, "seed": arguments.seed, "versions": made_with}
    work = folder / f".{recipe.shares or recipe.name}-{arguments.seed}"
    with mistakes(OSError):
        work.mkdir(exist_ok=True)
        with locked(work, use="making a dataset in"):
            for leftover in (*checkpoint.leftovers(folder, file.name), *checkpoint.leftovers(work)):
                leftover.unlink()
            if file.exists():
                provenance = _found(file, recorded)
            else:
                _start_over_unless(work / "versions.json", made_with)
                with _progress() as report, quiet():
                    columns = recipe.make(arguments.seed, Parts(work, report))
                provenance = _described(recipe, columns, recorded)
                checkpoint.write_bytes(file, archive({**columns, PROVENANCE: np.array(json.dumps(provenance))}))
            # What another recipe goes on from stays, and so does what is not this one's.
            if recipe.shares is None:
                shutil.rmtree(work)
    return _result(file, provenance)


def _found(file: Path, recorded: dict[str, Any]) -> dict[str, Any]:
    """What a file says that is there already.

    Raises:
        UserError: if it is not the one that would be made.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            columns = {name: content[name] for name in content.files if name != PROVENANCE}
            provenance = dict(json.loads(str(content[PROVENANCE])))
        made = {name: provenance.get(name) for name in recorded} == recorded
        if not made or provenance["sha256"] != _read(columns).sha256:
            raise ValueError("its content is another one")
    # Whatever it is, it is none of ours.
    except Exception as error:
        raise UserError(
            f"{str(file)!r} is there already, and was made by something else: move it, or take --out"
        ) from error
    note(f"{file} is there already")
    return provenance


def _recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    close = get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"there is no recipe {name!r}: {hint}there are {', '.join(RECIPES)}")


def _missing(recipe: Recipe) -> str | None:
    """How to install what a recipe needs; None if it is there."""
    there = all(importlib.util.find_spec(package) is not None for package in recipe.packages)
    return None if there else f"pip install 'iql-plugins[{recipe.extra}]'"


def _hint(missing: Any) -> str:
    return f" ({missing})" if missing else ""


def _versions() -> dict[str, str]:
    found = {"iql-plugins": version("iql-plugins")}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _start_over_unless(file: Path, made_with: dict[str, str]) -> None:
    """Parts of other versions would not go together with what comes."""
    text = json.dumps(made_with)
    if file.exists() and file.read_text() == text:
        return
    for part in file.parent.glob("*.npz"):
        part.unlink()
    checkpoint.write_bytes(file, text.encode())


def _described(recipe: Recipe, columns: Columns, recorded: dict[str, Any]) -> dict[str, Any]:
    dataset = _read(columns)
    returns = episode_returns(dataset.tensors)
    return {
        **recorded,
        "env": recipe.env,
        "spaces": environment_spaces(recipe.env).to_json(),
        "summary": recipe.summary,
        "transitions": len(dataset.tensors),
        "episodes": len(returns),
        "returns": {"mean": float(returns.mean()), "min": float(returns.min()), "max": float(returns.max())},
        "sha256": dataset.sha256,
    }


def _read(columns: Columns) -> Dataset:
    """What is read of them: its SHA-256 is the one that a run records."""
    return Transitions.from_columns("the recipe", columns).load(Options())


def _result(file: Path, provenance: dict[str, Any]) -> Result:
    document = {"file": str(file), "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(), **provenance}
    returns = provenance["returns"]
    rows = [
        ["transitions", f"{provenance['transitions']:,}"],
        ["episodes", f"{provenance['episodes']:,}"],
        ["return", f"{returns['mean']:.1f} ({returns['min']:.1f} to {returns['max']:.1f})"],
        ["environment", provenance["env"]],
    ]
    # Below the table, where no column breaks a line that is to be copied.
    lines = [f"SHA-256 {document['file_sha256']}", f"iql-plugins train --dataset {shlex.quote(str(file))}"]
    return Result(document, [table([str(file), ""], rows), *lines])


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, a line for each part elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total, what: note(f"{done} of {total} parts ({what})")
        return
    console = imported("rich.console").Console(stderr=True)
    with imported("rich.progress").Progress(console=console) as bars:
        task = bars.add_task("starts", total=None)
        yield lambda done, total, what: bars.update(task, description=what, completed=done, total=total)
