"""``iql-plugins select``: which of several policies, without their environment."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDictBase

from iql_plugins import ope
from iql_plugins.cli.arguments import Select
from iql_plugins.cli.errors import UserError
from iql_plugins.cli.figures import selection_page
from iql_plugins.cli.hub import CARD
from iql_plugins.cli.output import Result, new_file, note, table
from iql_plugins.cli.policies import load_agent
from iql_plugins.cli.settings import CONFIG, Settings, load_source
from iql_plugins.cli.statistics import with_interval
from iql_plugins.cli.train import device_name
from iql_plugins.cli.training import POLICY
from iql_plugins.limits import read_json
from iql_plugins.ope import Criterion, Policy
from iql_plugins.training.agent import Agent

__all__ = ["Candidate", "judged", "run"]

#: Of which less is better.
DESCENDING = ("td-error",)
#: In the units of discounted returns: of different discounts they are of different things.
OWN_DISCOUNT = ("value", "qvalue")

#: In a run lies the folder of a seed, in that the one of behaviour cloning, and in that a policy.
DEPTH = 3

#: Below these an estimate by importance sampling is that of single episodes.
FEW_EPISODES = 10


@dataclass(frozen=True)
class Candidate:
    """A policy that may be chosen.

    Attributes:
        name: what the user calls it.
        agent: the policy, and its critics.
        criteria: by name.
    """

    name: str
    agent: Agent
    criteria: Mapping[str, Criterion]


def run(arguments: Select) -> Result:
    """Judges the policies, ranks them, and draws.

    Raises:
        UserError: for policies or a dataset that cannot be read or do not fit together.
    """
    if not arguments.policies:
        raise UserError("which policies? iql-plugins select RUN [RUN ...] takes one run or policy, or more")
    plot = new_file("--plot", arguments.plot, ".png")
    if arguments.fqe_steps < 0 or arguments.fqe_seeds < 1:
        raise UserError("--fqe-steps must be at least 0, and --fqe-seeds at least 1")
    if not arguments.fqe_steps and arguments.by in ("fqe", "doubly-robust", "wis"):
        raise UserError(f"--by {arguments.by} needs a fitted Q evaluation: give --fqe-steps, or another --by")
    device = device_name(arguments.device)
    files = {name: file for given in arguments.policies for name, file in _policies(given).items()}
    agents = {name: load_agent(file, arguments.adapter, arguments.trust_pickle) for name, file in files.items()}
    dataset, source = _episodes(arguments, next(iter(agents.values())))
    for name, agent in agents.items():
        try:
            agent.check(dataset)
        except ValueError as error:
            raise UserError(f"{name} and {source} do not fit together: {error}") from error
    discount = _discount(agents, arguments.discount)
    others = [name for name, agent in agents.items() if agent.config.discount != discount]
    if others and arguments.by in OWN_DISCOUNT:
        raise UserError(f"--by {arguments.by} is not there for {', '.join(others)}, whose discount is not {discount}")
    candidates = judged(agents, dataset, discount, steps=arguments.fqe_steps, seeds=arguments.fqe_seeds, device=device)
    ranked = ranking(candidates, arguments.by)
    pairs = [_compared(first, second, arguments.by) for first, second in combinations(ranked, 2)]
    short = _short([each.name for each in ranked])
    data = Criterion.mean(ope.discounted_returns(dataset, discount))
    selection_page(f"{source}, discount {discount:g}", {short[each.name]: each.criteria for each in ranked}, plot)
    document: dict[str, Any] = {
        "dataset": source,
        "episodes": data.episodes,
        "transitions": len(dataset),
        "discount": discount,
        "by": arguments.by,
        "best": ranked[0].name,
        "candidates": [
            {"policy": each.name, "rank": rank, **{name: value.as_dict() for name, value in each.criteria.items()}}
            for rank, each in enumerate(ranked, start=1)
        ],
        "data": data.as_dict(),
        "differences": pairs,
        "cannot_tell_apart": [[pair["better"], pair["worse"]] for pair in pairs if not pair["beyond_noise"]],
        "other_criteria": _other_criteria(candidates, arguments.by),
        "plot": str(plot),
    }
    return Result(document, [*_tables(ranked, data, arguments.by, short), *_lines(document, short)])


def judged(
    agents: Mapping[str, Agent], dataset: TensorDictBase, discount: float, *, steps: int, seeds: int, device: str
) -> list[Candidate]:
    """What can be said of each policy; all are asked of the same episodes.

    Args:
        agents: by name.
        dataset: episodes in the environment's units.
        discount: of estimates.
        steps: of each fitted Q evaluation; 0 for none.
        seeds: of these.
        device: of these.
    """
    candidates = []
    behaviour: Policy | None = None
    hidden_sizes = max((agent.config.sizes_of("critic") for agent in agents.values()), key=sum)
    for number, (name, agent) in enumerate(agents.items(), start=1):
        policy = Policy.of(agent)
        criteria: dict[str, Criterion] = {}
        if steps:
            note(f"fitted Q evaluation {number} of {len(agents)}: {name}")
            config = ope.evaluation_config(dataset, n_steps=steps, discount=discount, hidden_sizes=hidden_sizes)
            evaluators = ope.fitted_q_evaluation(
                policy, dataset, agent.spaces, config, seeds=range(seeds), device=device
            )
            # That of the data is the same one for all.
            behaviour = behaviour or ope.cloned_behaviour(evaluators)
            criteria["fqe"] = ope.fitted_value(evaluators, dataset, policy)
            criteria["doubly-robust"] = ope.doubly_robust_value(policy, behaviour, evaluators, dataset, discount)
            criteria["wis"] = ope.importance_sampled_value(policy, behaviour, dataset, agent.spaces, discount)
        if agent.config.discount == discount:
            criteria["value"] = ope.initial_value(agent, dataset)
            criteria["qvalue"] = ope.initial_qvalue(agent, dataset)
        criteria["td-error"] = ope.td_error(agent, dataset)
        criteria["agreement"] = ope.action_agreement(policy, dataset, agent.spaces)
        candidates.append(Candidate(name, agent, criteria))
    return candidates


def ranking(candidates: Sequence[Candidate], name: str) -> list[Candidate]:
    """The candidates that have a criterion, the best one first; those of which it is no number last."""

    def score(candidate: Candidate) -> float:
        value = candidate.criteria[name].value
        return -np.inf if np.isnan(value) else (-value if name in DESCENDING else value)

    return sorted((each for each in candidates if name in each.criteria), key=score, reverse=True)


def _short(names: Sequence[str]) -> dict[str, str]:
    """For people: names without the folder that all are in."""
    if len(names) < 2:
        return {name: name for name in names}
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names])
    return {name: os.path.relpath(os.path.abspath(name), shared) for name in names}


def _compared(better: Candidate, worse: Candidate, name: str) -> dict[str, Any]:
    """How two policies of a ranking differ; an interval without 0 is beyond noise."""
    by = ope.difference(better.criteria[name], worse.criteria[name])
    # What chance does to a single fit is not known.
    beyond = len(by.fits) != 1 and (by.high < 0.0 if name in DESCENDING else by.low > 0.0)
    return {
        "better": better.name,
        "worse": worse.name,
        "difference": by.value,
        "confidence_95": [by.low, by.high],
        "beyond_noise": bool(beyond),
    }


def _other_criteria(candidates: Sequence[Candidate], by: str) -> dict[str, Any]:
    names = dict.fromkeys(name for each in candidates for name in each.criteria if name != by)
    document = {}
    for name in names:
        best, *others = ranking(candidates, name)
        alike = [other.name for other in others if not _compared(best, other, name)["beyond_noise"]]
        document[name] = {"ranking": [best.name, *(other.name for other in others)], "not_told_from_the_best": alike}
    return document


def _is_run(folder: Path) -> bool:
    """Whether it is one of ``train``: others have a ``config.json``, too, folders for the hub among them."""
    if not (folder / CONFIG).is_file() or (folder / CARD).exists():
        return False
    try:
        return "settings" in read_json(folder / CONFIG)
    except ValueError:
        # Settings.read says what is wrong with it.
        return True


def _run_of(policy: str) -> Path | None:
    """The run that a policy is of: its own folder, or one in which it lies; None for none."""
    path = Path(os.path.abspath(policy))
    return next((folder for folder in (path, *path.parents[:DEPTH]) if _is_run(folder)), None)


def _policies(given: str) -> dict[str, str]:
    """Files of policies by what they are called: one, or that of each seed of a run."""
    run = Path(given)
    if not _is_run(run):
        return {given: given}
    settings, _ = Settings.read(run)
    folders = [settings.folder(run, unit) for unit in settings.units if unit.method == "iql"]
    return {str(folder): str(folder / POLICY) for folder in folders}


def _episodes(arguments: Select, agent: Agent) -> tuple[TensorDictBase, str]:
    """The episodes to judge by, and what they are called."""
    if arguments.dataset is not None and not _is_run(Path(arguments.dataset)):
        options = {"trust_pickle": arguments.trust_pickle, "discrete": agent.spaces.discrete}
        return load_source(arguments.dataset, **options).tensors, arguments.dataset
    runs = [_run_of(given) for given in (arguments.policies if arguments.dataset is None else [arguments.dataset])]
    found = [Settings.read(run)[0] for run in runs if run is not None]
    if len(found) < len(runs) or not all(settings.hold_out for settings in found):
        raise UserError(
            "which episodes? Not all of these are of runs that held out some (train --hold-out): give --dataset, a "
            "dataset or such a run"
        )
    if len({(settings.dataset_sha256, settings.hold_out) for settings in found}) > 1:
        raise UserError("give --dataset: these runs are of different data, or held out other shares of them")
    settings = found[0]
    aside = settings.held_out(settings.load(trust_pickle=arguments.trust_pickle))
    assert aside is not None
    return aside, f"held-out episodes of {settings.dataset}"


def _discount(agents: Mapping[str, Agent], given: float | None) -> float:
    if given is not None:
        if not 0.0 <= given <= 1.0:
            raise UserError(f"--discount must be in [0, 1], got {given}")
        return given
    own = sorted({agent.config.discount for agent in agents.values()})
    if len(own) > 1:
        raise UserError(f"the policies' discounts are {', '.join(map(str, own))}: give the --discount of estimates")
    return own[0]


def _tables(ranked: Sequence[Candidate], data: Criterion, by: str, short: Mapping[str, str]) -> list[Any]:
    """The ranking with its intervals, and the other criteria: side by side they do not fit on a screen."""
    rows = [[short[each.name], _cell(each.criteria[by])] for each in ranked]
    if by not in ("td-error", "agreement"):
        rows.append(["(the data's returns)", _cell(data)])
    others = [name for name in dict.fromkeys(name for each in ranked for name in each.criteria) if name != by]
    values = [
        [short[each.name], *(f"{each.criteria[name].value:.4g}" if name in each.criteria else "" for name in others)]
        for each in ranked
    ]
    return [table(["policy", by], rows), table(["policy", *others], values)]


def _cell(criterion: Criterion) -> str:
    return with_interval(criterion.value, criterion.low, criterion.high)


def _lines(document: Mapping[str, Any], short: Mapping[str, str]) -> list[str]:
    def listed(names: Iterable[str]) -> str:
        return ", ".join(short[name] for name in names)

    episodes = document["episodes"]
    lines = [f"by {document['by']}, on {episodes} episode{'s' if episodes > 1 else ''}, 95% intervals:"]
    single = any(len(each[document["by"]].get("fits", ())) == 1 for each in document["candidates"])
    if single and len(document["candidates"]) > 1:
        lines.append("  one fit says nothing of its own noise, and nothing is beyond it: --fqe-seeds 3, or more")
    for each in document["candidates"]:
        name = each["policy"]
        mine = [pair for pair in document["differences"] if pair["better"] == name]
        if worse := [pair["worse"] for pair in mine if pair["beyond_noise"]]:
            lines.append(f"  beyond the noise: {short[name]} is better than {listed(worse)}")
        if alike := [pair["worse"] for pair in mine if not pair["beyond_noise"]]:
            lines.append(f"  cannot tell these apart: {short[name]} and {listed(alike)}")
    for name, other in document["other_criteria"].items():
        alike = other["not_told_from_the_best"]
        more = f", which cannot be told from {listed(alike)}" if alike else ""
        lines.append(f"by {name}: {short[other['ranking'][0]]}{more}")
    few = [each for each in document["candidates"] if each.get("wis", {}).get("effective_episodes", 99) < FEW_EPISODES]
    if few:
        lines.append(
            f"wis and doubly-robust rest on fewer than {FEW_EPISODES:g} episodes, and mean nothing, for "
            f"{listed(each['policy'] for each in few)}"
        )
    return [*lines, f"picture: {document['plot']}"]
