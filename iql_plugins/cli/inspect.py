"""``iql-plugins inspect``."""

from typing import Any

from iql_plugins.cli.arguments import Inspect
from iql_plugins.cli.errors import mistakes
from iql_plugins.cli.figures import dataset_page
from iql_plugins.cli.output import Result, new_file, table
from iql_plugins.cli.rollouts import environment_spaces
from iql_plugins.data import inspection, read_dataset
from iql_plugins.data.inspection import Report, Statistics
from iql_plugins.plugins import PluginError

__all__ = ["run"]


def run(arguments: Inspect) -> Result:
    """What is in a dataset, and what is wrong with it."""
    options: dict[str, Any] = {}
    if arguments.env is not None:
        spaces = environment_spaces(arguments.env)
        options |= {"discrete": spaces.discrete, "spaces": spaces}
    picture = None if arguments.plot is None else new_file("--plot", arguments.plot, ".png")
    with mistakes(ValueError, ImportError, PluginError):
        source = read_dataset(
            arguments.dataset, trust_pickle=arguments.trust_pickle, discrete=options.pop("discrete", None), finite=False
        )
        report = inspection.inspect(source, **options)
    if picture is not None:
        with mistakes(OSError):
            dataset_page(source, options.get("spaces") or source.spaces, picture)
    failing = () if arguments.fail_on == "never" else report.findings_from(arguments.fail_on)
    return Result(report.as_dict(), _report_parts(report), status=int(bool(failing)))


def _report_parts(report: Report) -> list[Any]:
    counts = [
        ["transitions", f"{report.transitions}"],
        ["episodes", f"{report.episodes}"],
        ["return", _statistics(report.returns)],
        ["length", _statistics(report.lengths)],
        *([key, f"{report.dtypes[key]} {list(shape)}"] for key, shape in sorted(report.shapes.items())),
    ]
    parts: list[Any] = [table([report.name, ""], counts)]
    for finding in report.findings:
        parts.append(f"{finding.severity} {finding.code}: {finding.message}\n    {finding.suggestion}")
    return parts if report.findings else [*parts, "nothing was found to be wrong"]


def _statistics(statistics: Statistics) -> str:
    return f"{statistics.mean:.1f} ({statistics.min:.1f} to {statistics.max:.1f})"
