"""``train`` of our IQL in Stable-Baselines3 against its SAC's, one gradient step a call, as ``learn`` calls it.

``python tests/benchmarks/bench_sb3.py``, at the headline's sizes (``contestants.Size``). ``replay`` draws batches from
the replay buffer, as ``learn`` does; ``offline`` draws ours from the packed dataset, as ``learn_offline`` does;
``compiled`` is ``offline`` with losses and gradients compiled.
"""

from functools import partial

import tyro
from contestants import Size, dataset_of, sb3_environment, sb3_replay_buffer, sb3_sac, sb3_train
from interleaved import Options, Steps, report
from stable_baselines3.common.logger import configure

from iql_sb3 import IQL

SIZE = Size(transitions=20_000)


def ours(mode: str) -> IQL:
    """Our model with its data."""
    options = {"buffer_size": 1, "batch_size": SIZE.batch, "device": "cpu"}
    env, data = sb3_environment(SIZE), dataset_of(SIZE)
    if mode == "replay":
        model = IQL("MlpPolicy", env, **options)
        model.replay_buffer = sb3_replay_buffer(SIZE, data, env)
    else:
        model = IQL("MlpPolicy", env, dataset=data, compile="yes" if mode == "compiled" else "no", **options)
    model.set_logger(configure(None, []))
    return model


def contestants(mode: str) -> dict[str, Steps]:
    """Ours and SAC."""
    return {
        name: sb3_train(model, SIZE, at_once=1)
        for name, model in (("ours", ours(mode)), ("sac", sb3_sac(SIZE, dataset_of(SIZE), "cpu")))
    }


if __name__ == "__main__":
    report({mode: partial(contestants, mode) for mode in ("replay", "offline", "compiled")}, tyro.cli(Options))
