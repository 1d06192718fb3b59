"""A policy as the Hugging Face hub wants it: weights, what they are, how well they do, and a card. Nothing is uploaded.

The card's metadata are those that the hub's pages of reinforcement learning read, as Stable-Baselines3's
(``huggingface_sb3``) have them: ``mean_reward`` is the mean return of episodes, and their standard deviation.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from iql_plugins import checkpoint
from iql_plugins.cli.errors import UserError
from iql_plugins.cli.output import json_text
from iql_plugins.cli.rollouts import rollouts, with_module
from iql_plugins.cli.settings import CONFIG, recorded_data, versions
from iql_plugins.cli.statistics import estimate
from iql_plugins.cli.training import POLICY, evaluation_seeds
from iql_plugins.training.agent import Agent

__all__ = ["evaluated", "recorded", "shown", "write_folder"]

CARD, RESULTS = "README.md", "results.json"

_TEXT = """
# {method}{on}

A policy of Implicit Q-Learning ([Kostrikov et al. 2021](https://arxiv.org/abs/2110.06169)), learned offline with
`iql-plugins`. `{policy}` holds its weights, normalisers and optimisers as safetensors, and no pickle; `{config}` has
its hyper-parameters, its spaces, and the versions that this folder was written with.

## Evaluation

{evaluation}

## Data

{data}

## Use

`pip install 'iql-plugins[cli]'`; then, in this folder:

```python
{use}
```

`iql-plugins evaluate .{option}` measures it again, and `iql-plugins convert . FILE --to sb3` (or another adapter)
goes on with it in another framework.
"""
_IN_AN_ENVIRONMENT = """\
import gymnasium
from iql_plugins.training.agent import Agent
agent = Agent.load({policy!r})
observation, _ = gymnasium.make({env!r}).reset(seed=0)
action = agent.act(observation)"""
_ANYWHERE = """\
from iql_plugins.export import as_one, random_observations
from iql_plugins.training.agent import Agent
agent = Agent.load({policy!r})
observations = as_one(agent, random_observations(agent, 1))
action = agent.act(observations)"""


def evaluated(agent: Agent, env: str, episodes: int) -> dict[str, Any]:
    """What the policy's episodes come to: the ones that ``iql-plugins evaluate`` plays. JSON values.

    Raises:
        UserError: if the environment cannot be made.
    """
    returns = [episode.total for episode in rollouts(agent.act, env, evaluation_seeds(episodes))]
    return {
        "env": env,
        "n_eval_episodes": episodes,
        "is_deterministic": True,
        "mean_reward": float(np.mean(returns)),
        "std_reward": float(np.std(returns)),
        **estimate([returns]).as_dict(env),
    }


def shown(evaluation: Mapping[str, Any]) -> str:
    """Mean and standard deviation of the episodes' returns, as the hub's cards write them."""
    return f"{evaluation['mean_reward']:.2f} +/- {evaluation['std_reward']:.2f}"


def write_folder(
    folder: Path,
    agent: Agent,
    env: str | None,
    evaluation: Mapping[str, Any] | None,
    made: Mapping[str, Any],
) -> None:
    """Writes a folder for the hub.

    Args:
        folder: to be made.
        agent: whose policy it is.
        env: the environment that it acts in; None if nobody knows.
        evaluation: as :func:`evaluated` returns it; None for none.
        made: how the data were made, see :func:`recorded`.
    """
    run = agent.extra.get("run")
    run = run if isinstance(run, dict) else {}
    method, data = str(run.get("method", "IQL")), _data_of(run, made)
    document, tensors = agent.state()
    # Of a run no more than what others have a use for: its folders are nobody's business.
    document["extra"] = document["extra"] | {"run": {"env": env, "method": method, "dataset": data}}
    described = {
        "library_name": "iql-plugins",
        "env": env,
        "method": method,
        "dataset": data,
        "spaces": document["spaces"],
        "hyperparameters": document["config"],
        "n_steps": agent.learner.step_count,
        "packages": versions()["packages"],
    }
    card = _card(method, env, evaluation, data)
    folder.mkdir()
    checkpoint.write(folder / POLICY, document, tensors)
    for name, content in ((CONFIG, described), (RESULTS, evaluation)):
        if content is not None:
            checkpoint.write_bytes(folder / name, (json_text(content) + "\n").encode())
    checkpoint.write_bytes(folder / CARD, card.encode())


def recorded(policy: Path) -> dict[str, Any]:
    """How the data were made, as the run recorded it in which a policy lies; empty for others.

    Args:
        policy: a run directory, or a file in one.
    """
    for folder in (policy, *policy.absolute().parents[:2]):
        if (folder / CONFIG).is_file():
            with contextlib.suppress(UserError):  # another program's file of that name
                return dict(recorded_data(folder).get("provenance", {}))
    return {}


def _data_of(run: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the dataset of a run: its name, its digest, and how it was made if that is of this very one."""
    settings = run.get("settings")
    if not isinstance(settings, dict):
        return dict(run["dataset"]) if isinstance(run.get("dataset"), dict) else {}
    sha256 = settings["dataset_sha256"]
    known = {"name": Path(settings["dataset"]).name, "sha256": sha256, "transitions": settings["transitions"]}
    # Sorted, as checkpoints have it.
    return dict(sorted((known | (dict(made) if made.get("sha256") == sha256 else {})).items()))


def _card(method: str, env: str | None, evaluation: Mapping[str, Any] | None, data: Mapping[str, Any]) -> str:
    tags = ["deep-reinforcement-learning", "reinforcement-learning", "offline-reinforcement-learning", "iql"]
    front: dict[str, Any] = {
        "library_name": "iql-plugins",
        "pipeline_tag": "reinforcement-learning",
        "tags": [*tags, "iql-plugins"] if env is None else [env, *tags, "iql-plugins"],
    }
    measured = "No environment was at hand to evaluate it in."
    if evaluation is not None:
        metric = {"type": "mean_reward", "name": "mean_reward", "value": shown(evaluation), "verified": False}
        task = "reinforcement-learning"
        result = {"task": {"type": task, "name": task}, "dataset": {"type": env, "name": env}, "metrics": [metric]}
        front["model-index"] = [{"name": method, "results": [result]}]
        measured = (
            f"Mean return of {evaluation['n_eval_episodes']} episodes in `{env}`, which start from seeds 0 and up, by "
            f"the deterministic policy: **{shown(evaluation)}** (their standard deviation)."
        )
        if evaluation["confidence_95"] is not None:
            low, high = evaluation["confidence_95"]
            measured += f" The mean's 95% confidence interval is {low:.2f} to {high:.2f}."
        if "normalized_score" in evaluation:
            measured += f" D4RL's normalised score: {evaluation['normalized_score']:.1f}."
    # Values of JSON are values of YAML: no text of a stranger ends what it is in.
    yaml = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    use = (_ANYWHERE if env is None else _IN_AN_ENVIRONMENT).format(policy=POLICY, env=with_module(env or ""))
    text = _TEXT.format(
        method=method if method == "IQL" else method.capitalize(),
        on="" if env is None else f" on {env}",
        policy=POLICY,
        config=CONFIG,
        evaluation=measured,
        data=f"```json\n{json_text(data)}\n```" if data else "Nobody wrote down what it learned from.",
        use=use,
        option=f" --env {env}" if env is not None and ":" in env else "",
    )
    return f"---\n{yaml}\n---\n{text}"
