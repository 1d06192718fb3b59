"""The usual single-file IQL in plain PyTorch: three optimisers, three backward passes. A peer, not a product.

Written as most people write it: five tensors indexed by a NumPy draw, one module a network, a loop over parameters
for the target. It is the peer ``plain`` of ``bench.py``.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def mlp(size: int, out: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
    )


class TwinQ(nn.Module):
    def __init__(self, observation: int, action: int, hidden: int) -> None:
        super().__init__()
        self.q1 = mlp(observation + action, 1, hidden)
        self.q2 = mlp(observation + action, 1, hidden)

    def both(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([observation, action], 1)
        return self.q1(joined).squeeze(-1), self.q2(joined).squeeze(-1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return torch.min(*self.both(observation, action))


class GaussianPolicy(nn.Module):
    def __init__(self, observation: int, action: int, hidden: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(mlp(observation, action, hidden), nn.Tanh())
        self.log_std = nn.Parameter(torch.zeros(action))

    def forward(self, observation: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.mean(observation), self.log_std.clamp(-5.0, 2.0).exp())


class PlainIQL:
    def __init__(
        self, observation: int, action: int, hidden: int = 256, expectile: float = 0.7, temperature: float = 3.0
    ) -> None:
        self.expectile, self.temperature = expectile, temperature
        self.qf = TwinQ(observation, action, hidden)
        self.target = copy.deepcopy(self.qf).requires_grad_(False)
        self.vf = mlp(observation, 1, hidden)
        self.actor = GaussianPolicy(observation, action, hidden)
        self.q_optimizer = torch.optim.Adam(self.qf.parameters(), lr=3e-4)
        self.v_optimizer = torch.optim.Adam(self.vf.parameters(), lr=3e-4)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_optimizer, 1_000_000)

    def train(self, batch: list[Tensor]) -> None:
        observation, action, reward, next_observation, terminated = batch
        with torch.no_grad():
            next_value = self.vf(next_observation).squeeze(-1)
            target_q = self.target(observation, action)
        value = self.vf(observation).squeeze(-1)
        advantage = target_q - value
        value_loss = torch.mean(torch.abs(self.expectile - (advantage < 0).float()) * advantage**2)
        self.v_optimizer.zero_grad()
        value_loss.backward()
        self.v_optimizer.step()

        target = reward + (1.0 - terminated) * 0.99 * next_value
        q_loss = sum(nn.functional.mse_loss(q, target) for q in self.qf.both(observation, action))
        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()
        for weight, source in zip(self.target.parameters(), self.qf.parameters(), strict=True):
            weight.data.copy_((1 - 0.005) * weight.data + 0.005 * source.data)

        weight = torch.exp(self.temperature * advantage.detach()).clamp(max=100.0)
        actor_loss = torch.mean(-weight * self.actor(observation).log_prob(action).sum(-1))
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self.schedule.step()


def peer(data: dict[str, Tensor], batch_size: int, hidden: int) -> Callable[[int], object]:
    """A function that takes a number of gradient steps on a dataset of keyword tensors, sampling included."""
    return trained(data, batch_size, hidden)[1]


def trained(
    data: dict[str, Tensor], batch_size: int, hidden: int, expectile: float = 0.7, temperature: float = 3.0
) -> tuple[PlainIQL, Callable[[int], object]]:
    """The same with the algorithm that it trains."""
    tensors = [
        data["observation"],
        data["action"],
        data["next_reward"].squeeze(-1),
        data["next_observation"],
        data["next_terminated"].squeeze(-1).float(),
    ]
    with tensors[0].device:
        algorithm = PlainIQL(tensors[0].shape[1], tensors[1].shape[1], hidden, expectile, temperature)

    def steps(count: int) -> None:
        for _ in range(count):
            index = np.random.randint(0, len(tensors[0]), size=batch_size)
            algorithm.train([tensor[index] for tensor in tensors])

    return algorithm, steps
