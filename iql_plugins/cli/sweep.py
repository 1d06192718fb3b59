"""``iql-plugins sweep``: many trainings on Ray Tune, each of them a run of ``train``."""

import argparse
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from iql_plugins import checkpoint
from iql_plugins.cli import report, select, train
from iql_plugins.cli.arguments import PROGRAM, Report, Select, Sweep, option, parse, spelled
from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.cli.output import Result, json_text, note, table
from iql_plugins.cli.runs import read_run
from iql_plugins.cli.search_space import SearchSpace, parsed, search_space
from iql_plugins.cli.settings import CONFIG, Settings
from iql_plugins.cli.statistics import with_interval
from iql_plugins.cli.training import HELD_OUT
from iql_plugins.cli.trials import ERROR, MEAN_RETURN, ON_THE_WAY, RUNS, evaluated, folder_name, trained
from iql_plugins.cli.workers import locked
from iql_plugins.limits import read_json

__all__ = ["run"]

FORMAT = 1
#: In a sweep's folder, beside what Ray and the trials have there: what it consists of, and what came of it.
STATE, TABLE, PAGE, PICTURE = "sweep.json", "sweep.parquet", "report.html", "selection.png"
#: Options that are the sweep's own, or are given to its trials otherwise.
VALUES = (
    *("grid", "range", "samples", "search", "by", "fqe_steps", "address", "run_dir", "resume", "workers", "threads"),
    *("stack", "dataset", "env", "baseline", "hold_out"),
)
FLAGS = ("json", "trust_pickle")
#: Of these, what can stand beside --resume: a file does not decide about the others.
BESIDE = ("resume", "address", "env", *FLAGS)
#: Share of the episodes that trials are judged on where there is no environment.
HOLD_OUT = 0.1
NEED_FQE = ("fqe", "doubly-robust", "wis")
#: Columns of the table behind the hyper-parameters.
COLUMNS = (
    *("seeds", "step", "n_steps", "score", MEAN_RETURN, "confidence_low", "confidence_high", *HELD_OUT),
    *("evaluation_episodes", "run_dir", "error", "hyperparameters"),
)


def run(arguments: Sweep, command_line: Sequence[str]) -> Result:
    """Trains all, and says which was best.

    Raises:
        UserError: for a mistake of the user, before anything is started.
        InterruptedRun: on Ctrl-C; the sweep can be resumed.
    """
    begin = time.monotonic()
    given, folder, sha256 = list(command_line[1:]), None, None
    if arguments.resume is not None:
        folder = Path(arguments.resume)
        arguments, given, sha256 = _recorded(arguments, given, folder)
    words = _split(given)[1]
    base = _base(arguments, words)
    space = search_space(arguments, base)
    train.check_libraries(arguments)
    for module in ("pyarrow.parquet", "ray.tune", *(["optuna"] if arguments.search == "optuna" else [])):
        imported(module, "ray")
    if folder is None:
        folder = train.empty_folder(arguments.run_dir, "sweep")
    settings, source = train.new_settings(parsed(base))
    if sha256 not in (None, settings.dataset_sha256):
        raise UserError(f"{settings.dataset} is not what the sweep was begun with: its content has changed")
    train.check(settings, source)
    del source
    if sha256 is not None and settings.env != arguments.env:
        raise UserError(
            f"the sweep was begun in {arguments.env or 'no environment'}, and {settings.dataset} is evaluated in "
            f"{settings.env or 'none'} here: install what the environment needs, or begin another sweep"
        )
    base, settings = _judged(arguments, base, settings, space, _split(given)[0])
    with mistakes(OSError):
        folder = train.made_folder(folder, settings.dataset, "sweeps").absolute()
    with locked(folder, use="sweeping in"):
        if sha256 is None:
            train.empty_folder(folder, "sweep")
        state = {"format": FORMAT, "command": _kept(given, settings.dataset), "env": settings.env}
        state["dataset_sha256"] = settings.dataset_sha256
        with mistakes(OSError):
            checkpoint.write_bytes(folder / STATE, (json_text(state) + "\n").encode())
        note(f"sweep: {folder}")
        try:
            rows = [_row(trial, space, folder / RUNS) for trial in trained(arguments, base, space, settings, folder)]
            selection = None if settings.env else _selected(arguments, rows, space, folder)
            result = _result(arguments, rows, settings, selection, space, folder, [PROGRAM, "sweep", *given])
            if any(row["status"] == "unfinished" for row in rows):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            env = f" --env {settings.env}" if settings.env and ":" in settings.env else ""
            raise train.InterruptedRun(f"sweep --resume {folder}{env}") from None
    return replace(result, document={**result.document, "seconds": time.monotonic() - begin})


# What is asked for


def _split(given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own options, each a list or a truth value, and the words that are all trials'."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in VALUES:
        parser.add_argument(option(name), action="append", default=[])
    for name in FLAGS:
        parser.add_argument(option(name), action="store_true")
    return parser.parse_known_args(spelled(given))


def _kept(given: Sequence[str], dataset: str) -> list[str]:
    """The words that a sweep goes on with from anywhere, without those that a file has no say in."""
    own, words = _split(given)
    kept = {name: values for name, values in vars(own).items() if name not in (*BESIDE, "run_dir") and values}
    kept["dataset"] = [dataset]
    return [*(word for name, values in kept.items() for value in values for word in (option(name), value)), *words]


def _recorded(arguments: Sweep, given: Sequence[str], folder: Path) -> tuple[Sweep, list[str], str]:
    """The arguments of a sweep that goes on, their words, and the digest of its data."""
    own, words = _split(given)
    wrong = [option(name) for name, value in vars(own).items() if value and name not in BESIDE]
    if wrong := [*wrong, *(word for word in words if word.startswith("--"))]:
        raise UserError(
            f"{', '.join(wrong)}: a sweep goes on as it was begun; beside --resume there can be "
            f"{', '.join(option(name) for name in BESIDE[1:])}"
        )
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"there is no {path}: a sweep's folder has it from its first second on")
    with mistakes(KeyError, TypeError, ValueError):
        state = read_json(path)
        if state["format"] != FORMAT:
            raise UserError(f"{path} has format {state['format']!r}, known is {FORMAT}: another release wrote it")
        kept, env, sha256 = [str(word) for word in state["command"]], state["env"], str(state["dataset_sha256"])
    if wrong := [option(name) for name, value in vars(_split(kept)[0]).items() if value and name in BESIDE]:
        raise UserError(f"{path} has {', '.join(wrong)}, about which no file decides")
    train.check_environment(env, arguments.env, path)
    kept += [] if env is None else ["--env", env]
    kept += [option(name) for name in FLAGS if getattr(arguments, name)]
    kept += [] if arguments.address is None else ["--address", arguments.address]
    recorded = parse(["sweep", *kept])
    assert isinstance(recorded, Sweep)
    return recorded, kept, sha256


def _base(arguments: Sweep, words: Sequence[str]) -> list[str]:
    """The command of all trials, but for what is different in each."""
    for name in ("workers", "threads", "samples"):
        value = getattr(arguments, name)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{option(name)} must be at least 1, got {value}")
    if ":" in arguments.device:
        raise UserError(f"--device {arguments.device}: Ray gives each trial a GPU; --device cuda takes it")
    return [
        *("train", "--dataset", train.wherever(arguments.dataset), "--baseline", arguments.baseline, "--workers", "1"),
        *("--threads", "1" if arguments.threads == "auto" else str(arguments.threads)),
        *("--stack", str(arguments.stack), "--hold-out", str(arguments.hold_out)),
        *([] if arguments.env is None else ["--env", arguments.env]),
        *(["--trust-pickle"] if arguments.trust_pickle else []),
        *words,
    ]


def _judged(
    arguments: Sweep, base: list[str], settings: Settings, space: SearchSpace, given: argparse.Namespace
) -> tuple[list[str], Settings]:
    """The same with an environment that was found, or held-out episodes where there is none."""
    if settings.env is not None:
        if given.by or given.fqe_steps:
            raise UserError(f"--by chooses where there is no environment; here it is the return in {settings.env}")
        if "n_steps" in space.names:
            raise UserError(
                "n_steps: trials in an environment are compared on the way, after equal parts of the same steps"
            )
        return [*base, "--env", settings.env], settings
    if arguments.by in select.OWN_DISCOUNT and "discount" in space.names:
        raise UserError(f"--by {arguments.by} compares no policies of different discounts: give another --by")
    if arguments.search == "optuna" and arguments.by not in ON_THE_WAY:
        raise UserError(
            f"--search optuna learns from each trial as it ends, and --by {arguments.by} is known when all have: "
            f"without an environment give --by {', '.join(ON_THE_WAY)}"
        )
    if arguments.by in NEED_FQE and arguments.fqe_steps < 1:
        raise UserError(f"--by {arguments.by} needs a fitted Q evaluation: give --fqe-steps, or another --by")
    if not settings.hold_out:
        note(f"no environment: {HOLD_OUT:.0%} of the episodes are held out, and trials are chosen by {arguments.by}")
        settings = replace(settings, hold_out=HOLD_OUT)
    settings.held_out(settings.load(trust_pickle=arguments.trust_pickle))
    return [*base, "--hold-out", str(settings.hold_out)], settings


def _row(trial: Any, space: SearchSpace, runs: Path) -> dict[str, Any]:
    """A row of the table, of a trial of Ray's."""
    folder = runs / folder_name(trial)
    row: dict[str, Any] = {
        "trial": folder.name,
        "status": None,
        **{name: space.values.get((name, value), value) for name, value in trial.config.items()},
        **dict.fromkeys(COLUMNS),
        "run_dir": str(folder),
    }
    finished = False
    if (folder / CONFIG).exists():
        run = read_run(str(folder))
        finished, settings = run.finished, run.settings
        row |= {
            "seeds": list(settings.seeds),
            "n_steps": settings.hyperparameters.n_steps,
            "hyperparameters": json.dumps(settings.hyperparameters.to_json()),
            "evaluation_episodes": 0 if settings.env else None,
        }
        step = min(step for unit, step in run.steps.items() if unit.method == "iql")
        found = [entry for entry in evaluated(settings, folder) if entry["step"] <= step]
        if found:
            row |= {"score": found[-1].get(MEAN_RETURN)} | {name: found[-1].get(name) for name in HELD_OUT}
        row["step"] = step
        if settings.env:
            # Those on the way; and those that measure the last and the best policy.
            made = sum(len(returns) for each in run.evaluations.values() for _, returns in each)
            row["evaluation_episodes"] = made + finished * 2 * settings.episodes * len(settings.units)
        if "IQL final" in run.estimates:
            final = run.estimates["IQL final"]
            row |= {MEAN_RETURN: final.mean, "confidence_low": final.low, "confidence_high": final.high}
    if finished:
        return row | {"status": "finished"}
    if (folder / ERROR).exists():
        row["error"] = (folder / ERROR).read_text().strip()
    elif trial.status == "ERROR":
        row["error"] = str(trial.get_error()).strip()
    ended = "failed" if row["error"] else "stopped" if trial.status == "TERMINATED" else "unfinished"
    return row | {"status": ended}


def _selected(
    arguments: Sweep, rows: Sequence[dict[str, Any]], space: SearchSpace, folder: Path
) -> dict[str, Any] | None:
    """Scores the trials that are finished as ``select`` does; what that says."""
    finished = [row for row in rows if row["status"] == "finished"]
    if not finished or len(finished) + sum(row["status"] == "failed" for row in rows) < len(rows):
        return None
    needs_fqe = arguments.by in NEED_FQE
    document = select.run(
        Select(
            policies=tuple(row["run_dir"] for row in finished),
            by=arguments.by,
            fqe_steps=arguments.fqe_steps if needs_fqe else 0,
            discount=arguments.hyperparameters.discount if "discount" in space.names else None,
            plot=str(folder / PICTURE),
            device=arguments.device,
            trust_pickle=arguments.trust_pickle,
        )
    ).document
    for row in finished:
        seeds = [
            entry[arguments.by]["value"]
            for entry in document["candidates"]
            if Path(row["run_dir"]) in (Path(entry["policy"]), *Path(entry["policy"]).parents)
        ]
        row["score"] = sum(seeds) / len(seeds)
    return dict(document)


def _result(
    arguments: Sweep,
    rows: list[dict[str, Any]],
    settings: Settings,
    selection: dict[str, Any] | None,
    space: SearchSpace,
    folder: Path,
    command: Sequence[str],
) -> Result:
    """Writes table and page, and says which trial was best."""
    by = MEAN_RETURN if settings.env else arguments.by
    sign = -1.0 if not settings.env and by in select.DESCENDING else 1.0

    def rank(row: Mapping[str, Any]) -> tuple[bool, float]:
        known = row["score"] is not None and math.isfinite(row["score"])
        return row["status"] == "finished", sign * row["score"] if known else -math.inf

    rows = sorted(sorted(rows, key=lambda row: str(row["trial"])), key=rank, reverse=True)
    best = rows[0] if rows and rank(rows[0]) > (True, -math.inf) else None
    episodes = sum(row["evaluation_episodes"] or 0 for row in rows) if settings.env else None
    document: dict[str, Any] = {
        "sweep": str(folder),
        "dataset": settings.dataset,
        "dataset_sha256": settings.dataset_sha256,
        "env": settings.env,
        "chosen_by": by,
        "best": best and best["trial"],
        "best_score": best and best["score"],
        "evaluation_episodes": episodes,
        "hold_out": settings.hold_out,
        "command": shlex.join(command),
    }
    if rows:
        _write(rows, document, folder / TABLE)
    runs = [row["run_dir"] for row in rows if (Path(row["run_dir"]) / CONFIG).exists()]
    if runs:
        report.run(Report(runs=tuple(runs), output=str(folder / PAGE)))
    document |= {"trials": rows, "selection": selection, "parquet": str(folder / TABLE), "report": str(folder / PAGE)}
    shown = [
        [row["trial"], row["status"], str(row["step"] or 0), "" if row["score"] is None else f"{row['score']:.4g}"]
        for row in rows
    ]
    lines = [f"{row['trial']}: {row['error'].splitlines()[-1]}" for row in rows if row["error"]]
    if best is not None and settings.env:
        interval = with_interval(best[MEAN_RETURN], best["confidence_low"], best["confidence_high"])
        lines.append(
            f"best of {len(rows)}: {best['trial']}, chosen by the last evaluation on the way; by {settings.episodes} "
            f"other episodes a seed its mean return is {interval}"
        )
    elif best is not None:
        lines.append(
            f"best of {len(rows)}: {best['trial']}, chosen without an environment, by the offline criterion {by} on "
            f"held-out episodes, {best['score']:.4g}"
        )
    if settings.env:
        lines.append(f"{settings.env}: {episodes:,} evaluation episodes were spent over all trials")
    lines += [f"table: {document['parquet']}", f"report: {document['report']}"]
    return Result(document, [table(["trial", "status", "step", "score"], shown), *lines], status=int(best is None))


def _write(rows: Sequence[Mapping[str, Any]], document: Mapping[str, Any], path: Path) -> None:
    """Writes ``sweep.parquet``."""
    pyarrow, parquet = imported("pyarrow", "ray"), imported("pyarrow.parquet", "ray")

    def column(name: str) -> list[Any]:
        values = [row[name] for row in rows]
        # A number beside a name, "auto" say, has no type of a column.
        return (
            [json.dumps(value) for value in values]
            if any(isinstance(value, str) for value in values) and any(isinstance(value, float) for value in values)
            else values
        )

    content = pyarrow.table({name: column(name) for name in rows[0]})
    content = content.replace_schema_metadata({"iql_plugins": json_text(document, indent=None)})
    with mistakes(OSError), checkpoint.replaced(path) as file:
        parquet.write_table(content, file)
