"""Trains on Parquet by several workers of Ray Train: data of any size, machines of any number.

Ray Data streams batches, each worker takes its share, and gradients are averaged, so that all hold the same weights.
One that dies is started again with the last checkpoint. On a cluster give its address by RAY_ADDRESS, and folders that
all machines share. `iql-plugins evaluate` takes the policy. Run it with::

    pip install 'iql-plugins[cli,ray]'
    iql-plugins convert-dataset pendulum-v1-sac pendulum.parquet
    python examples/ray_train.py pendulum.parquet --workers 2
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import torch.distributed as dist

from iql_plugins import load_dataset
from iql_plugins.config import preset
from iql_plugins.training.distributed import synchronize
from iql_tensor import IQL

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

FILE, STEPS_BETWEEN_CHECKPOINTS = "policy.safetensors", 500


def train(options: dict[str, Any]) -> None:
    """What each worker runs."""
    checkpoint = ray.train.get_checkpoint() or ray.train.Checkpoint(options["start"])
    with checkpoint.as_directory() as folder:
        iql = IQL.load(Path(folder) / FILE)
    learner = iql.agent.learner
    workers = synchronize(learner).count
    size, n_steps = options["batch_size"] // workers, options["n_steps"]
    while learner.step_count < n_steps:
        before, epoch = (
            learner.step_count,
            ray.train.get_dataset_shard("train").iter_torch_batches(
                batch_size=size, dtypes=torch.float32, drop_last=True, local_shuffle_buffer_size=20 * size
            ),
        )
        for batch in epoch:
            terminated = batch["terminals"].bool().reshape(size, 1)
            iql.update(
                observation=batch["observations"],
                action=batch["actions"].reshape(size, -1),
                next_observation=batch["next_observations"],
                next_reward=batch["rewards"].reshape(size, 1),
                next_done=terminated | batch["timeouts"].bool().reshape(size, 1),
                next_terminated=terminated,
            )
            if learner.step_count % STEPS_BETWEEN_CHECKPOINTS == 0 or learner.step_count == n_steps:
                with tempfile.TemporaryDirectory() as folder:
                    iql.save(Path(folder) / FILE)
                    made = ray.train.Checkpoint.from_directory(folder) if dist.get_rank() == 0 else None
                    ray.train.report({"step": learner.step_count, **iql.metrics()}, checkpoint=made)
            if learner.step_count == n_steps:
                break
        if learner.step_count == before:
            raise ValueError(f"each worker needs {size} rows, a batch's share: the data have fewer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a Parquet file or folder, of `iql-plugins convert-dataset`'s columns")
    for name, default in {"--env": "Pendulum-v1", "--steps": 4000, "--workers": 2, "--output": Path("ray")}.items():
        parser.add_argument(name, type=type(default), default=default, help="default: %(default)s")
    arguments = parser.parse_args()
    env, data = gymnasium.make(arguments.env), ray.data.read_parquet(os.path.abspath(arguments.data))
    data = data.map_batches(lambda batch: {name: np.stack(column) for name, column in batch.items()})
    # Weights and normalisers are those of one agent, which sees enough of the data to know their scale.
    sample = load_dataset(data.take_batch(20_000))
    config = preset("pendulum", n_steps=arguments.steps)
    start = IQL.build(env.observation_space, env.action_space, dataset=sample, config=config, seed=0)
    arguments.output.mkdir(parents=True, exist_ok=True)
    start.save(arguments.output / FILE)
    failures = ray.train.FailureConfig(max_failures=3)
    result = TorchTrainer(
        train,
        train_loop_config={"start": str(arguments.output.absolute()), **config.of("learner", "batches")},
        torch_config=TorchConfig(backend="gloo"),
        # The other half of the cores is Ray Data's.
        scaling_config=ray.train.ScalingConfig(num_workers=arguments.workers, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(storage_path=str(arguments.output.absolute()), failure_config=failures),
        datasets={"train": data},
    ).fit()
    with result.checkpoint.as_directory() as folder:
        IQL.load(Path(folder) / FILE).save(arguments.output / FILE)
    print(f"step {result.metrics['step']}: wrote {arguments.output / FILE}")
