"""What a run directory holds, whether its trainings have come to their end or not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iql_plugins.cli.errors import UserError
from iql_plugins.cli.settings import CONFIG, METHODS, Method, Settings, Unit, recorded_data
from iql_plugins.cli.statistics import Estimate
from iql_plugins.cli.training import METRICS, metrics_rows, reached
from iql_plugins.data.dataset import one_line
from iql_plugins.data.inspection import Statistics
from iql_plugins.limits import read_json

__all__ = ["RESULTS", "Run", "read_run"]

RESULTS = "results.json"


@dataclass(frozen=True)
class Run:
    """A run, as far as it has come.

    Attributes:
        folder: the run directory, as it was given.
        settings: of the run.
        made_on: the versions that it was begun with.
        data: what it says of its dataset beside name and digest; empty if an earlier release made it.
        finished: whether it has come to its end.
        steps: gradient steps of each training.
        evaluations: steps and returns of the evaluations on the way, of each training that was evaluated.
        metrics: rows of ``metrics.csv`` of each training.
        estimates: the rows of its table, by name; of a run that is unfinished the data's alone.
        warnings: what speaks against its result; None where nobody has looked.
        command: that finished it; None for a run that is unfinished.
        videos: films that lie in it, or in the folder of one of its trainings.
    """

    folder: str
    settings: Settings
    made_on: Mapping[str, Any]
    data: Mapping[str, Any]
    finished: bool
    steps: Mapping[Unit, int]
    evaluations: Mapping[Unit, Sequence[tuple[int, Sequence[float]]]]
    metrics: Mapping[Unit, Sequence[Mapping[str, float]]]
    estimates: Mapping[str, Estimate]
    warnings: Sequence[Mapping[str, str]] | None
    command: str | None
    videos: Sequence[Path]


def read_run(given: str) -> Run:
    """Reads a run directory, which others may be writing to.

    Each file is there as a whole or not at all, but for ``metrics.csv``, of which the rows up to a checkpoint stay.

    Raises:
        UserError: if it is none, or a file in it is damaged.
    """
    folder = Path(given)
    if not folder.is_dir():
        raise UserError(f"{given!r} is no run directory: there is no such folder")
    settings, made_on = Settings.read(folder)
    data = _data(folder)
    results = _results(folder / RESULTS, settings)
    places = {unit: settings.folder(folder, unit) for unit in settings.units}
    if results is None:
        so_far = {unit: reached(place) for unit, place in places.items()}
        # The interval of the data comes with the results.
        estimates = {"data": Estimate(data["returns"].mean, math.nan, math.nan)} if data else {}
        results = {"estimates": estimates, "evaluations": {unit: found for unit, (_, found) in so_far.items()}}
        steps = {unit: step for unit, (step, _) in so_far.items()}
    else:
        steps = dict.fromkeys(settings.units, settings.hyperparameters.n_steps)
    metrics = {
        unit: [row for row in metrics_rows(place / METRICS) if row["step"] <= steps[unit]]
        for unit, place in places.items()
    }
    return Run(
        folder=given,
        settings=settings,
        made_on=made_on,
        data=data,
        finished="command" in results,
        steps=steps,
        evaluations={unit: found for unit, found in results["evaluations"].items() if found},
        metrics=metrics,
        estimates=results["estimates"],
        warnings=results.get("warnings"),
        command=results.get("command"),
        videos=sorted(film for place in {folder, *places.values()} for film in place.glob("*.mp4")),
    )


def _results(path: Path, settings: Settings) -> dict[str, Any] | None:
    """What ``results.json`` says; None where there is none, or one of an end before that which the run goes on to."""
    if not path.exists():
        return None
    methods: dict[str, Method] = {"IQL": "iql", METHODS["bc"]: "bc"}
    try:
        document = read_json(path)
        if (document["n_steps"], document["episodes"]) != (settings.hyperparameters.n_steps, settings.episodes):
            return None
        return {
            "estimates": {str(name): _estimate(entry) for name, entry in document["results"].items()},
            "evaluations": {
                Unit(entry["seed"], methods[entry["method"]]): [
                    (int(step), [_number(value) for value in returns]) for step, returns in entry["evaluations"]
                ]
                for entry in document["by_seed"]
            },
            # Earlier releases had neither.
            "warnings": None
            if "warnings" not in document
            else [
                {name: str(entry[name]) for name in ("code", "message", "suggestion")} for entry in document["warnings"]
            ],
            "command": str(document.get("command", "")),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has no results of a run: {type(error).__name__}: {one_line(error)}") from error


def _estimate(document: Mapping[str, Any]) -> Estimate:
    """The inverse of :meth:`Estimate.as_dict`."""
    low, high = document["confidence_95"] or (None, None)
    return Estimate(_number(document["mean_return"]), _number(low), _number(high))


def _number(value: Any) -> float:
    """What a JSON document that was written with nulls for NaN means."""
    return math.nan if value is None else float(value)


def _data(folder: Path) -> dict[str, Any]:
    document = recorded_data(folder)
    if not document:
        return {}
    try:
        returns = {name: float(document["returns"][name]) for name in ("mean", "min", "max")}
        return {"episodes": int(document["episodes"]), "returns": Statistics(**returns),
                "provenance": dict(document.get("provenance", {}))}  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} describes no data: {type(error).__name__}: {one_line(error)}") from error
