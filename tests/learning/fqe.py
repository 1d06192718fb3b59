"""Holds fitted Q evaluation against d3rlpy's own on CartPole: five fits of each, of the same policy and the same data.

From the repository's root, after the README's installation (some ten minutes on one core)::

    python tests/learning/fqe.py

Theirs has d3rlpy's default networks, rate, batches and hard updates of the target, ours what ``iql-plugins select``
has; both have Huber's loss, which is d3rlpy's. 10,000 steps are 100 of its updates, enough at a discount of 0.95. The
policy is a clone of the data's behaviour by d3rlpy, greedy. ``results/fqe.json`` has the mean value of the episodes'
first states in each fit, the 95% intervals, over fits and episodes, and what the policy returns from these states when
it is played.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro

from iql_plugins import checkpoint, ope, read_dataset
from iql_plugins.cli.settings import versions
from iql_plugins.data.episodes import episode_ends, episode_lengths
from iql_plugins.ope import Criterion, Policy, difference
from iql_plugins.spaces import Spaces

DISCOUNT = 0.95


@dataclass(frozen=True)
class Options:
    """What is compared."""

    dataset: Path = Path("../shared/data/reagent_cartpole_mixed.npz")
    steps: int = 10_000
    fits: int = 5
    results: Path = Path(__file__).parent / "results" / "fqe.json"


def played(policy: Any, starts: Any) -> list[float]:
    """The discounted return from each first state: CartPole and a greedy policy leave nothing to chance."""
    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    returns = []
    for start in starts:
        env.state = observation = np.array(start)
        total, weight, terminated = 0.0, 1.0, False
        while not terminated and weight > 1e-6:
            observation, reward, terminated, _, _ = env.step(int(policy.predict(observation[None])[0]))
            total, weight = total + weight * float(reward), weight * DISCOUNT
        returns.append(total)
    return returns


def main(options: Options) -> None:
    import iql_d3rlpy

    with contextlib.redirect_stdout(sys.stderr):
        import d3rlpy
    torch.set_num_threads(1)
    quiet = {"logger_adapter": d3rlpy.logging.NoopAdapterFactory(), "show_progress": False}
    data = read_dataset(options.dataset, discrete=True).tensors
    buffer = iql_d3rlpy.to_replay_buffer(data)
    d3rlpy.seed(0)
    clone = d3rlpy.algos.DiscreteBCConfig().create()
    clone.fit(buffer, 2000, 2000, **quiet)
    first = data["observation"][episode_ends(data) - episode_lengths(data) + 1].numpy()

    values = []
    for seed in range(options.fits):
        d3rlpy.seed(seed)
        fitted = d3rlpy.ope.DiscreteFQE(clone, d3rlpy.ope.FQEConfig(gamma=DISCOUNT))
        fitted.fit(buffer, options.steps, options.steps, **quiet)
        values.append(fitted.predict_value(first, clone.predict(first)))
    theirs = Criterion.mean(np.stack(values))

    policy = Policy(clone.predict)
    config = ope.evaluation_config(data, n_steps=options.steps, discount=DISCOUNT).replace(loss_function="smooth_l1")
    evaluators = ope.fitted_q_evaluation(policy, data, Spaces.from_dataset(data), config, seeds=range(options.fits))
    ours = ope.fitted_value(evaluators, data, policy)
    document = {
        "d3rlpy": theirs.as_dict(),
        "ours": ours.as_dict(),
        "difference": difference(ours, theirs).as_dict(),
        "played": float(np.mean(played(clone, first))),
        "versions": versions()["packages"],
    }
    checkpoint.write_bytes(options.results, (json.dumps(document, indent=1) + "\n").encode())
    sys.stdout.write(
        f"{json.dumps({name: document[name] for name in ('d3rlpy', 'ours', 'difference', 'played')}, indent=1)}\n"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
