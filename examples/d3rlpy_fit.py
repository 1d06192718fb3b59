"""Trains a policy for ``Pendulum-v1`` from logged transitions with d3rlpy, whose IQL is ours.

The dataset that ships becomes a d3rlpy replay buffer, all of its 20,000 transitions; d3rlpy's own ``fit``, scalers and
evaluator do the rest, and ``d3rlpy.load_learnable`` loads what was saved anywhere. Run it with::

    pip install 'iql-plugins[d3rlpy,onnx]'
    python examples/d3rlpy_fit.py --output pendulum
"""

import argparse
from pathlib import Path

import d3rlpy
import gymnasium
import numpy as np
from d3rlpy.metrics import EnvironmentEvaluator
from d3rlpy.models import VectorEncoderFactory
from d3rlpy.preprocessing import ReturnBasedRewardScaler, StandardObservationScaler

from iql_d3rlpy import BoundedActionScaler, IQLConfig, to_replay_buffer

STEPS = 4000
MAX_TORQUE = np.full(1, 2.0)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("pendulum"))
    arguments = parser.parse_args()
    d3rlpy.seed(arguments.seed)
    env = gymnasium.make("Pendulum-v1")
    d3rlpy.envs.seed_env(env, arguments.seed)

    evaluator = EnvironmentEvaluator(env, n_trials=20)
    dataset = to_replay_buffer("pendulum-v1-sac")
    factory = VectorEncoderFactory(hidden_units=[128, 128])
    algorithm = IQLConfig(
        observation_scaler=StandardObservationScaler(),
        action_scaler=BoundedActionScaler(minimum=-MAX_TORQUE, maximum=MAX_TORQUE),
        reward_scaler=ReturnBasedRewardScaler(multiplier=1000.0),
        actor_learning_rate=1e-3,
        critic_learning_rate=1e-3,
        value_learning_rate=1e-3,
        actor_schedule_steps=arguments.steps,
        **{f"{network}_encoder_factory": factory for network in ("actor", "critic", "value")},
    ).create(device="cpu")
    algorithm.fit(
        dataset,
        n_steps=arguments.steps,
        n_steps_per_epoch=max(arguments.steps // 4, 1),
        evaluators={"environment": evaluator},
        logger_adapter=d3rlpy.logging.FileAdapterFactory(str(arguments.output)),
    )
    algorithm.save(arguments.output / "iql.d3")
    algorithm.save_policy(arguments.output / "policy.onnx")
    score = evaluator(d3rlpy.load_learnable(str(arguments.output / "iql.d3")), dataset)
    behaviour = sum(episode.compute_return() for episode in dataset.episodes) / dataset.size()
    print(f"mean return {score:.0f}, that of the data {behaviour:.0f}")
