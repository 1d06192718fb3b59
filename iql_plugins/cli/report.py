"""``iql-plugins report``: runs compared on one page."""

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from iql_plugins import checkpoint
from iql_plugins.cli.arguments import PROGRAM, Report
from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.cli.figures import THEME, Line, drawing, key
from iql_plugins.cli.output import Result, new_file
from iql_plugins.cli.reference_scores import normalized_score
from iql_plugins.cli.runs import Run, read_run
from iql_plugins.cli.settings import METHODS, Method
from iql_plugins.cli.statistics import Curve, Estimate, metric_curve, return_curve

__all__ = ["run"]

TEMPLATE = "report.html"
#: Of all films that are put into the page; others are links to the files.
MOST_VIDEO_BYTES = 2**24
#: Pictures for wide screens and for narrow ones, whose letters are as large on both.
WIDE, NARROW, SMALL = (760, 340), (345, 280), (300, 170)
#: What data or environment decide, which are told to be others themselves.
FOLLOWS = ("spaces", "transitions")
#: Rows of a run's table, and what the page calls them.
POLICIES = {
    "data": "Data",
    METHODS["bc"]: "Behaviour cloning",
    "IQL final": "IQL, last policy",
    "IQL best": "IQL, best policy",
}


def run(arguments: Report) -> Result:
    """Writes the page.

    Raises:
        UserError: for a folder that is no run, or a file that cannot be written.
    """
    if not arguments.runs:
        raise UserError(f"which runs? {PROGRAM} report RUN [RUN ...] takes one run directory or more")
    places = [os.path.realpath(given) for given in arguments.runs]
    if twice := [given for given, place in zip(arguments.runs, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"{', '.join(map(repr, twice))}: the same run, give it once")
    jinja2 = imported("jinja2")
    output = new_file("--output", arguments.output, ".html")
    runs = [read_run(given) for given in arguments.runs]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "interval": _interval}
    with mistakes(OSError):
        page = environment.get_template(TEMPLATE).render(_content(runs, output))
        # A file's name may be no text; whatever stands for it, it is not the page's encoding that fails.
        checkpoint.write_bytes(output, page.encode("utf-8", "replace"))
    entries = [
        {
            "run": each.folder,
            "finished": each.finished,
            "steps": min(each.steps.values()),
            "n_steps": each.settings.hyperparameters.n_steps,
        }
        for each in runs
    ]
    unfinished = [each.folder for each in runs if not each.finished]
    lines = [f"wrote {output}: {len(runs)} run{'s' if len(runs) > 1 else ''}"]
    lines += [f"unfinished: {', '.join(unfinished)}"] if unfinished else []
    return Result({"report": str(output), "runs": entries}, lines)


@dataclass(frozen=True)
class _Entry:
    """A run on the page: its number decides colour and marker, its label is as short as it can be."""

    number: int
    label: str
    run: Run

    def line(self, method: Method, curve: Curve) -> Line:
        return Line(curve, self.number, baseline=method == "bc")

    @property
    def note(self) -> str | None:
        """How far it has come, if that is not its end."""
        if self.run.finished:
            return None
        least, most = min(self.run.steps.values()), max(self.run.steps.values())
        steps = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        return f"unfinished: {steps} of {self.run.settings.hyperparameters.n_steps:,} steps"


def _content(runs: Sequence[Run], output: Path) -> dict[str, Any]:
    """What the template shows."""
    labels = _labels([run.folder for run in runs])
    entries = [_Entry(number, label, run) for number, (label, run) in enumerate(zip(labels, runs, strict=True))]
    configurations = [_configuration(run) for run in runs]
    names = list(dict.fromkeys(name for configuration in configurations for name in configuration))
    table = [(name, [configuration.get(name, "") for configuration in configurations]) for name in names]
    return {
        "theme": THEME,
        "program": PROGRAM,
        "version": version(PROGRAM),
        "entries": entries,
        "keys": [key(entry.line("iql", Curve([], [], [], [])), f"key-{entry.number}") for entry in entries],
        "environments": [_returns(number, env, group) for number, (env, group) in enumerate(_grouped(entries))],
        "configuration": table,
        "differences": [(name, values) for name, values in table if len(set(values)) > 1 and name not in FOLLOWS],
        "metrics": _metrics(entries),
        "datasets": _datasets(entries),
        "videos": _videos(entries, output),
    }


def _labels(folders: Sequence[str]) -> list[str]:
    """The names of the folders; what was given where two have the same."""
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    return [name if names.count(name) == 1 else folder for name, folder in zip(names, folders, strict=True)]


def _grouped(entries: Sequence[_Entry]) -> list[tuple[str | None, list[_Entry]]]:
    """By environment: returns of different ones cannot be compared."""
    environments = dict.fromkeys(entry.run.settings.env for entry in entries)
    return [(env, [entry for entry in entries if entry.run.settings.env == env]) for env in environments]


def _returns(number: int, env: str | None, entries: Sequence[_Entry]) -> dict[str, Any]:
    """Curves and final results in an environment."""
    lines, words, parts = [], [], {}
    # Baselines lie below.
    for method in ("bc", "iql"):
        for entry in entries:
            by_seed = [found for unit, found in entry.run.evaluations.items() if unit.method == method]
            if by_seed and (curve := return_curve(by_seed)).steps:
                lines.append(entry.line(method, curve))
                words.append(f"{entry.label}, {METHODS[method]}: {_told(curve)}")
                if len(by_seed) < len(seeds := entry.run.settings.seeds):
                    parts[f"{entry.label}, {METHODS[method]}"] = f"{len(by_seed)} of {len(seeds)} seeds"
    estimates = [entry.run.estimates for entry in entries]
    # A run that is unfinished does not know the interval that another one has.
    known = sorted((each["data"] for each in estimates if "data" in each), key=lambda data: math.isnan(data.low))
    levels = list({data.mean: data for data in reversed(known)}.values())
    drawings = [
        drawing(
            lines, f"returns-{number}-{width}", size=(width, height), unit="mean return", levels=levels, points=True
        )
        for width, height in (WIDE, NARROW)
    ]
    policies = [name for name in POLICIES if any(name in each for each in estimates)]
    return {
        "name": env,
        "number": number,
        "entries": entries,
        "drawings": drawings if lines else [],
        "description": ". ".join(words),
        "baseline": any(line.baseline for line in lines),
        "parts": parts,
        "policies": {name: POLICIES[name] for name in policies},
        "scores": {
            (entry.number, name): normalized_score(env, entry.run.estimates[name].mean)
            for entry in entries
            for name in policies
            if name in entry.run.estimates
        },
    }


def _told(curve: Curve) -> str:
    """A curve in words."""
    last = Estimate(curve.mean[-1], curve.low[-1], curve.high[-1])
    return (
        f"{_number(curve.mean[0])} at step {curve.steps[0]:,.0f}, "
        f"{_number(last.mean)} ({_interval(last)}) at step {curve.steps[-1]:,.0f}"
    )


def _metrics(entries: Sequence[_Entry]) -> list[dict[str, Any]]:
    """IQL's metrics, a drawing for each."""
    found: list[dict[str, Any]] = []
    by_run = [
        (entry, [rows for unit, rows in entry.run.metrics.items() if unit.method == "iql" and rows])
        for entry in entries
    ]
    names = dict.fromkeys(name for _, by_seed in by_run for rows in by_seed for name in rows[-1])
    for name in names:
        if name in ("step", "mean_return"):
            continue
        curves = [(entry, metric_curve(by_seed, name)) for entry, by_seed in by_run if by_seed]
        curves = [(entry, curve) for entry, curve in curves if curve.steps]
        if curves:
            picture = drawing([entry.line("iql", curve) for entry, curve in curves], f"metric-{len(found)}", size=SMALL)
            words = [f"{entry.label}: {curve.mean[0]:.3g} to {curve.mean[-1]:.3g}" for entry, curve in curves]
            found.append({"name": name, "drawing": picture, "description": ". ".join(words)})
    return found


def _configuration(run: Run) -> dict[str, str]:
    """Settings and versions, as texts by name."""
    settings = run.settings.to_json()
    values = settings.pop("hyperparameters") | settings | dict(run.made_on)
    packages = values.pop("packages", {})
    return {name: _text(value) for name, value in (values | _flat(packages)).items()}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The entries of nested dictionaries by their paths."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {
        path: entry
        for inner, content in value.items()
        for path, entry in _flat(content, f"{name}.{inner}" if name else str(inner)).items()
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _datasets(entries: Sequence[_Entry]) -> list[dict[str, Any]]:
    """Each dataset once, whatever it is called in the runs that were trained on it."""
    found: list[dict[str, Any]] = []
    for sha256 in dict.fromkeys(entry.run.settings.dataset_sha256 for entry in entries):
        users = [entry for entry in entries if entry.run.settings.dataset_sha256 == sha256]
        known = [entry.run.data for entry in users if entry.run.data]
        # One was perhaps trained on a copy that does not say how it was made.
        described = next((data for data in known if data["provenance"]), known[0] if known else {})
        provenance = _flat(described.get("provenance", {}))
        found.append(
            {
                "name": Path(users[0].run.settings.dataset).name,
                "names": list(dict.fromkeys(entry.run.settings.dataset for entry in users)),
                "sha256": sha256,
                "transitions": users[0].run.settings.transitions,
                "episodes": described.get("episodes"),
                "returns": described.get("returns"),
                "entries": users,
                "provenance": {name: _text(value) for name, value in provenance.items() if name},
                # What make-dataset writes down is of the content that is read.
                "other": provenance.get("sha256", sha256) != sha256,
            }
        )
    return found


def _videos(entries: Sequence[_Entry], output: Path) -> list[dict[str, Any]]:
    """Films, in the page as long as there is room for them."""
    found, left = [], MOST_VIDEO_BYTES
    for entry in entries:
        for path in entry.run.videos:
            size = path.stat().st_size
            data = None
            if size <= left:
                left -= size
                data = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
            link = quote(Path(os.path.relpath(path, output.absolute().parent)).as_posix())
            name = path.relative_to(entry.run.folder).as_posix()
            found.append({"entry": entry, "name": name, "data": data, "link": link, "megabytes": size / 1e6})
    return found


def _number(value: float) -> str:
    return f"{value:,.1f}".replace("-", "−")


def _interval(of: Estimate) -> str:
    return "no interval" if math.isnan(of.low) else f"{_number(of.low)} to {_number(of.high)}"
