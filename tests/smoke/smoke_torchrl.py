"""TorchRL's Gym environment, replay buffer and trainer: a gradient step of the core, and a training of the adapter."""

import torch
from gradient_step import check_gradient_step
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, GymEnv, RewardSum, TransformedEnv
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SoftUpdate
from torchrl.trainers.algorithms import IQLTrainer

from iql_torchrl import IQLLoss

STEPS = 300
MAX_TORQUE = 2.0


def check_trainer(env: EnvBase) -> None:
    """Trains on ``Pendulum-v1`` with TorchRL's trainer: all parameters and targets changed, and are finite."""
    torch.manual_seed(0)
    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(MLP(3, 2), NormalParamExtractor()), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -MAX_TORQUE, "high": MAX_TORQUE},
    )
    critics = [ValueOperator(MLP(4, 1), in_keys=["observation", "action"]) for _ in range(2)]
    loss = IQLLoss(actor, critics, ValueOperator(MLP(3, 1), in_keys=["observation"]))
    trainer = IQLTrainer(
        # The trainer logs the sum of rewards.
        collector=Collector(
            TransformedEnv(env, RewardSum(in_keys=["reward"], out_keys=["reward_sum"])),
            actor,
            frames_per_batch=100,
            total_frames=STEPS,
        ),
        total_frames=STEPS,
        frame_skip=1,
        optim_steps_per_batch=5,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), 1e-3),
        replay_buffer=TensorDictReplayBuffer(storage=LazyTensorStorage(STEPS), batch_size=64),
        target_net_updater=SoftUpdate(loss, tau=0.5),
        progress_bar=False,
    )
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    trainer.train()
    for name, tensor in before.items():
        after = loss.state_dict()[name]
        assert after.isfinite().all(), f"{name} is not finite"
        assert not torch.equal(after, tensor), f"{name} did not change"
    print(f"{type(trainer).__name__} changed all {len(before)} tensors of the loss")


if __name__ == "__main__":
    torch.manual_seed(0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(STEPS), batch_size=64)
    buffer.extend(GymEnv("Pendulum-v1").rollout(STEPS, break_when_any_done=False))
    check_gradient_step(buffer.sample())
    check_trainer(GymEnv("Pendulum-v1"))
