"""How the command line trains with d3rlpy."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from d3rlpy.logging import NoopAdapterFactory
from tensordict import TensorDictBase

from iql_d3rlpy.algorithm import BaseIQL, from_agent, load, to_agent
from iql_d3rlpy.datasets import to_replay_buffer
from iql_d3rlpy.mapped import MappedReplayBuffer
from iql_plugins.hookspecs import Training
from iql_plugins.spaces import Discrete

__all__ = ["TRAINING", "fit"]

#: d3rlpy averages all losses of an epoch again and again.
_STEPS_AN_EPOCH = 1000


def fit(algorithm: BaseIQL, dataset: TensorDictBase, n_steps: int, callback: Callable[[int], None]) -> None:
    """Trains by d3rlpy's own ``fit``, without its logs, on mini-batches that the agent's random state draws.

    A memory-mapped dataset stays on disk.

    Args:
        algorithm: with networks.
        dataset: transitions by the key layout, in the environment's units.
        n_steps: further gradient steps.
        callback: called with the number of all steps after each of them.

    Raises:
        ValueError: as :meth:`iql_plugins.training.agent.Agent.check`.
    """
    agent = to_agent(algorithm)
    agent.check(dataset)
    action = agent.spaces.action
    size = action.start + action.n if isinstance(action, Discrete) else None
    buffer = to_replay_buffer(dataset.select(*agent.loss.in_keys), action_size=size)

    on_disk = isinstance(buffer, MappedReplayBuffer)

    def draw(count: int, size: int) -> Any:
        return agent.learner.draw(count, size, agent.generator, on_disk=on_disk).cpu().numpy()

    buffer.draw = draw
    rest = n_steps % _STEPS_AN_EPOCH
    with _quiet():
        for steps in (n_steps - rest, rest):
            if steps:
                algorithm.fit(
                    buffer,
                    n_steps=steps,
                    n_steps_per_epoch=min(steps, _STEPS_AN_EPOCH),
                    logger_adapter=NoopAdapterFactory(),
                    show_progress=False,
                    callback=lambda *_: callback(agent.learner.step_count),
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without d3rlpy's messages: standard output is the command line's."""
    configuration = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**configuration)


TRAINING = Training(from_agent=from_agent, to_agent=to_agent, fit=fit, save=BaseIQL.save, load=load, suffix=".d3")
