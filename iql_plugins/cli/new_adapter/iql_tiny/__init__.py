"""IQL for TinyRL: where the parts of its batches are, and how its users train."""

from collections.abc import Callable
from typing import NamedTuple

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from iql_plugins.hookspecs import Adapter, Training, hookimpl
from iql_plugins.training.agent import Agent


class Batch(NamedTuple):
    """TinyRL's own: a real adapter recognises it by its name, and imports the framework in ``iql_adapter`` alone."""

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    terminal: Tensor
    timeout: Tensor


class TinyIQL:
    """What users of TinyRL build."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def train(self, batch: Batch) -> None:
        """One gradient step."""
        self.agent.learner.step(self.agent.normalizers(iql_map_batch(batch)))


def fit(algorithm: TinyIQL, dataset: TensorDictBase, n_steps: int, callback: Callable[[int], None]) -> None:
    """Trains on a dataset by the key layout, in batches that the agent's generator draws."""
    agent = algorithm.agent
    for _ in range(n_steps):
        index = agent.learner.draw(len(dataset), agent.config.batch_size, agent.generator, on_disk=False)
        row = dataset[index.cpu()].to(agent.device)
        then, terminal = row["next"], row["next", "terminated"]
        ends = terminal, then["done"] & ~terminal
        algorithm.train(Batch(row["observation"], row["action"], then["reward"], then["observation"], *ends))
        callback(agent.learner.step_count)


@hookimpl
def iql_map_batch(batch: object) -> TensorDict | None:
    """Takes TinyRL's batches."""
    if not isinstance(batch, Batch):
        return None
    done = batch.terminal | batch.timeout
    then = {"observation": batch.next_state, "reward": batch.reward, "done": done, "terminated": batch.terminal}
    return TensorDict({"observation": batch.state, "action": batch.action, "next": then}, [len(batch.reward)])


@hookimpl
def iql_adapter() -> Adapter:
    """How the command line trains with TinyRL."""
    training = Training(
        from_agent=TinyIQL,
        to_agent=lambda algorithm: algorithm.agent,
        fit=fit,
        save=lambda algorithm, path: algorithm.agent.save(path),
        load=lambda path: TinyIQL(Agent.load(path)),
        suffix=".tiny",
    )
    return Adapter("tiny", framework=None, algorithms={"TinyIQL": TinyIQL}, training=training)
