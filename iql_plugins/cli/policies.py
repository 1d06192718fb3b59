"""``iql-plugins evaluate``, ``export`` and ``convert``: what is done with a policy that exists."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from iql_plugins.checkpoint import CheckpointError, existing_parent, new_folder, vacant
from iql_plugins.cli.arguments import Convert, Evaluate, Export
from iql_plugins.cli.errors import UserError, imported, mistakes
from iql_plugins.cli.hub import evaluated, recorded, shown, write_folder
from iql_plugins.cli.output import Result, new_file, table
from iql_plugins.cli.rollouts import environment_spaces, record, recorded_environment, rollouts
from iql_plugins.cli.statistics import estimate
from iql_plugins.cli.training import POLICY, adapter_training, evaluation_seeds
from iql_plugins.export import CHECKS, SUFFIXES, ExportError, as_one, export_policy, random_observations
from iql_plugins.plugins import PluginError, host
from iql_plugins.training.agent import Agent

__all__ = ["convert", "evaluate", "export"]

COMMON_SUFFIX = ".safetensors"

#: Of the evaluation in a card, as of `iql-plugins evaluate`.
HUB_EPISODES = 50


def load_agent(path: str, adapter: str | None, trust_pickle: bool) -> Agent:
    """The agent in a file.

    Args:
        path: a common checkpoint, a run directory (its final policy), a hub folder, or an adapter's native file.
        adapter: whose native file it is; None finds out by the suffix.
        trust_pickle: whether the framework's own loader may read it, which may run code that is in it.

    Raises:
        UserError: if there is no such file, or nobody can read it.
    """
    file = Path(path) / POLICY if Path(path).is_dir() else Path(path)
    if not file.is_file():
        seeds = [str(each.parent) for each in sorted(Path(path).glob(f"seed-*/{POLICY}"))]
        several = f": {path} is a run of several seeds, give {' or '.join(seeds)}" if seeds else ""
        raise UserError(f"there is no policy {str(file)!r}{several}")
    if adapter is None and file.suffix == COMMON_SUFFIX:
        with mistakes(CheckpointError, FileNotFoundError):
            return Agent.load(file)
    training = adapter_training(adapter or _adapter_by_suffix(file))
    try:
        if training.load_agent is None or trust_pickle:
            return training.to_agent(training.load(file))
        return training.load_agent(file)
    except CheckpointError as error:
        raise UserError(" ".join(str(error).split())) from error
    except Exception as error:
        # A framework's loader: what it raises for a file that is not its own is its affair.
        raise UserError(f"{file} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}") from error


def evaluate(arguments: Evaluate) -> Result:
    """Returns of a policy's episodes."""
    if arguments.episodes < 1:
        raise UserError(f"--episodes must be at least 1, got {arguments.episodes}")
    if arguments.seed < 0:
        raise UserError(f"--seed must be at least 0, got {arguments.seed}")
    imported("scipy.stats")
    video = None if arguments.video is None else new_file("--video", arguments.video, ".mp4")
    agent = load_agent(arguments.policy, arguments.adapter, arguments.trust_pickle)
    env = _environment(agent, arguments)
    if env is None:
        raise UserError(f"{arguments.policy} does not say which environment it is for: give --env")
    if video is not None:
        record(agent.act, env, arguments.seed, video)
    episodes = rollouts(agent.act, env, evaluation_seeds(arguments.episodes, arguments.seed))
    returns = [episode.total for episode in episodes]
    lengths = [episode.length for episode in episodes]
    result = estimate([returns])
    document: dict[str, Any] = {"policy": arguments.policy, "env": env, "episodes": arguments.episodes}
    document |= result.as_dict(env) | {"returns": returns, "lengths": lengths}
    if video is not None:
        document["video"] = str(video)
    rows = [
        ["mean return", f"{result.mean:.1f}"],
        ["95% interval", result.interval],
        ["smallest and largest", f"{min(returns):.1f} to {max(returns):.1f}"],
        ["mean length", f"{sum(lengths) / len(lengths):.1f}"],
    ]
    if "normalized_score" in document:
        rows.append(["normalised score", f"{document['normalized_score']:.1f}"])
    parts = [table([env, f"{arguments.episodes} episodes"], rows)]
    return Result(document, parts if video is None else [*parts, f"the first episode: {video}"])


def export(arguments: Export) -> Result:
    """A policy as a file of its own, or as a folder for the Hugging Face hub."""
    if arguments.format == "hub":
        return _export_to_hub(arguments)
    for name in ("env", "episodes"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is of the hub's card; the format {arguments.format} has none")
    source = Path(arguments.policy)
    default = (source / POLICY if source.is_dir() else source).with_suffix(SUFFIXES[arguments.format])
    output = default if arguments.output is None else new_file("--output", arguments.output, None)
    agent = load_agent(arguments.policy, arguments.adapter, arguments.trust_pickle)
    with mistakes(ImportError, OSError, ExportError):
        difference = export_policy(agent, output, arguments.format)
    document = {
        "policy": arguments.policy,
        "output": str(output),
        "format": arguments.format,
        "largest_difference": difference,
        "observations_checked": CHECKS,
    }
    line = (
        f"wrote {output}; on {CHECKS} random observations its actions differ by at most {difference:.1e} of the range"
    )
    return Result(document, [line])


def _export_to_hub(arguments: Export) -> Result:
    source = Path(arguments.policy)
    folder = (source if source.is_dir() else source.parent) / "hub" if arguments.output is None else arguments.output
    folder = Path(folder)
    if not vacant(folder) or not existing_parent(folder).is_dir():
        raise UserError(f"{folder} must be a new or an empty folder")
    episodes = HUB_EPISODES if arguments.episodes is None else arguments.episodes
    if episodes < 1:
        raise UserError(f"--episodes must be at least 1, got {episodes}")
    agent = load_agent(arguments.policy, arguments.adapter, arguments.trust_pickle)
    env = _environment(agent, arguments)
    evaluation = None if env is None else evaluated(agent, env, episodes)
    with mistakes(OSError), new_folder(folder) as written:
        write_folder(written, agent, env, evaluation, recorded(source))
        with mistakes(CheckpointError):
            _check_same(agent, Agent.load(written / POLICY))
    document = {"policy": arguments.policy, "output": str(folder), "format": "hub", "evaluation": evaluation}
    reward = "it has no environment to be evaluated in" if evaluation is None else f"mean reward {shown(evaluation)}"
    return Result(document, [f"wrote {folder}; its actions are the same on {CHECKS} random observations; {reward}"])


def convert(arguments: Convert) -> Result:
    """An agent as an adapter's native file, or as a common checkpoint."""
    training = adapter_training(arguments.to)
    target = Path(arguments.target)
    if target.suffix != training.suffix:
        raise UserError(f"a file of adapter {arguments.to!r} has suffix {training.suffix}, got {str(target)!r}")
    if not target.absolute().parent.is_dir():
        raise UserError(f"there is no folder {str(target.parent)!r} to write {target.name!r} to")
    if target.is_dir():
        raise UserError(f"{str(target)!r} is a folder, no file to write")
    agent = load_agent(arguments.source, arguments.adapter, arguments.trust_pickle)
    with (
        mistakes(OSError),
        tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as folder,
    ):
        temporary = Path(folder) / target.name
        with mistakes(ValueError, TypeError, NotImplementedError):
            training.save(training.from_agent(agent), temporary)
        try:
            # Of this process: what is in it can be run.
            converted = [training.to_agent(training.load(temporary))]
            if training.load_agent is not None:
                converted.append(training.load_agent(temporary))
        except ValueError as error:
            custom = ", ".join(agent.custom_parts())
            if not custom:
                raise
            raise UserError(
                f"{custom} of {arguments.source} are not the default ones, which a file of adapter {arguments.to!r} "
                "cannot describe"
            ) from error
        for other in converted:
            _check_same(agent, other)
        os.replace(temporary, target)
    document = {"source": arguments.source, "output": str(target), "to": arguments.to, "observations_checked": CHECKS}
    return Result(document, [f"wrote {target}; its actions are the same on {CHECKS} random observations"])


def _adapter_by_suffix(file: Path) -> str:
    found = []
    for name in host().available():
        try:
            training = host().load(name).training
        except PluginError:
            continue
        if training is not None and training.suffix == file.suffix:
            found.append(name)
    if len(found) == 1:
        return found[0]
    which = f"may be of {' or '.join(found)}" if found else "has the suffix of no installed adapter's files"
    raise UserError(f"{file} {which}: give --from")


def _environment(agent: Agent, arguments: Evaluate | Export) -> str | None:
    """The environment of an evaluation, whose spaces are the policy's; None if nobody names one."""
    run = agent.extra.get("run")
    recorded = run.get("env") if isinstance(run, dict) else None
    env = arguments.env or recorded_environment(recorded, arguments.policy)
    if env is not None:
        _check_spaces(agent, env)
    return env


def _check_spaces(agent: Agent, env: str) -> None:
    spaces = environment_spaces(env)
    wanted, there = agent.spaces.to_json(), spaces.to_json()
    for name in ("observation", "action"):
        # Bounds of observations do not matter to a policy; those of actions were learned with.
        if _shapes(wanted[name]) != _shapes(there[name]):
            raise UserError(f"the policy's {name} space is {wanted[name]}, that of {env} {there[name]}")


def _shapes(space: dict[str, Any]) -> Any:
    if "dict" in space:
        return {name: _shapes(entry) for name, entry in space["dict"].items()}
    return {name: value for name, value in space.items() if name not in ("low", "high")}


def _check_same(agent: Agent, other: Agent) -> None:
    given = as_one(agent, random_observations(agent, CHECKS))
    if not torch.equal(agent.act(given), other.act(given)):
        raise RuntimeError("the converted policy acts differently: nothing was written")
