"""``iql-plugins adapters``."""

import math
import re
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from iql_plugins.cli.arguments import Adapters
from iql_plugins.cli.check import Check, check
from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.cli.output import Result, announced, table
from iql_plugins.plugins import PluginError, PluginInfo, host

__all__ = ["run"]


#: A working adapter: what is called tiny in its files, TinyIQL and so on, becomes what the user names.
TEMPLATE, TEMPLATE_NAME = Path(__file__).parent / "new_adapter", "tiny"


def run(arguments: Adapters) -> Result:
    """The adapters, without importing a framework; or a new one."""
    if arguments.new is not None:
        return _new(arguments.new)
    if not 0 < arguments.timeout < math.inf:
        raise UserError(f"--timeout must be a positive number of seconds, got {arguments.timeout}")
    # In strict mode, what is broken is an error.
    with mistakes(PluginError):
        known = host().available()
        checks = {name: _checked(name, arguments.timeout) for name in known} if arguments.check else {}
        # What may not come back is imported elsewhere alone.
        errors = {name: check.error for name, check in checks.items()}
        errors = errors or {name: info.error for name, info in host().check().items()}
    entries = [_entry(info, errors[name], checks.get(name)) for name, info in known.items()]
    rows = [[entry["name"], f"{entry['distribution']} {entry['version']}", _framework(entry)] for entry in entries]
    columns = ["adapter", "distribution", "framework"]
    if checks:
        columns, rows = [*columns, "check"], [[*row, checks[row[0]].outcome] for row in rows]
    parts: list[Any] = [table(columns, rows)]
    # Below the table, where no column breaks a line that is to be copied.
    bad = {name: check.message for name, check in checks.items() if check.outcome != "fine"}
    told = bad or {entry["name"]: entry["error"] for entry in entries if entry["error"]}
    parts += [f"{name}: {message}" for name, message in told.items()]
    parts += [f"{entry['name']}: {entry['install']}" for entry in entries if entry["install"]]
    return Result({"adapters": entries}, parts if entries else ["no adapter is installed"], status=int(bool(bad)))


def _checked(name: str, timeout: float) -> Check:
    with announced(f"checking plugin {name!r}, for at most {timeout:g} seconds"):
        return check(name, timeout)


def _new(name: str) -> Result:
    """Writes an adapter that works, in a new folder."""
    if re.fullmatch("[a-z][a-z0-9]*", name) is None:
        raise UserError(f"--new must be one word of small letters and digits, got {name!r}")
    if name in host().available():
        raise UserError(f"the adapter {name!r} is installed already: take another name")
    folder = Path(f"iql-{name}")
    if folder.exists():
        raise UserError(f"{str(folder)!r} is there already: move it, or take another name")

    def named(text: str) -> str:
        return text.replace(TEMPLATE_NAME, name).replace(TEMPLATE_NAME.capitalize(), name.capitalize())

    files = {named(str(path.relative_to(TEMPLATE))): path for path in TEMPLATE.rglob("*") if path.suffix in _SUFFIXES}
    with mistakes(OSError):
        for file, source in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(named(source.read_text()))
    document = {"adapter": name, "folder": str(folder), "files": sorted(files)}
    return Result(document, [f"wrote {', '.join(sorted(files))} in {folder}: {folder / 'README.md'} says what next"])


#: Of the template's files; nothing that Python leaves beside them.
_SUFFIXES = {".md", ".py", ".toml"}


def _entry(info: PluginInfo, error: str | None, check: Check | None) -> dict[str, Any]:
    found, missing = {}, []
    for requirement in _requirements(info):
        try:
            found[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            missing.append(str(requirement.name))
            continue
        if found[requirement.name] not in requirement.specifier:
            missing.append(f"{requirement.name}{requirement.specifier}")
    return {
        "name": info.name,
        "distribution": info.distribution,
        "version": info.version,
        "framework": found,
        "missing": missing,
        "install": f"pip install '{info.distribution}[{info.name}]'" if missing else None,
        # A plugin that cannot be imported because of what is missing is not broken.
        "error": info.error if missing else error,
        **({} if check is None else {"check": asdict(check)}),
    }


def _requirements(info: PluginInfo) -> list[Any]:
    """What the extra that is named like the adapter installs."""
    parse = imported("packaging.requirements").Requirement
    try:
        declared = [parse(text) for text in requires(info.distribution) or []]
    except PackageNotFoundError:
        return []
    return [
        requirement
        for requirement in declared
        if requirement.marker is not None
        and requirement.marker.evaluate({"extra": info.name})
        and not requirement.marker.evaluate({"extra": ""})
    ]


def _framework(entry: dict[str, Any]) -> str:
    if entry["install"]:
        return f"{', '.join(entry['missing'])} missing"
    return ", ".join(f"{name} {number}" for name, number in entry["framework"].items()) or "needs none"
