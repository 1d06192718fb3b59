"""Targets of Q along trajectories, against returns that are summed step by step."""

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import keywords, make_batch, make_loss
from tensordict import TensorDict
from torch import Tensor

from iql_plugins import IQLLoss
from iql_plugins.training.gradients import LossGradients

SHAPE = TRAJECTORIES, STEPS, AGENTS = 3, 5, 2
GAMMA, LMBDA = 0.9, 0.7
TRAJECTORY_ESTIMATORS = ["TD1", "TDLambda"]


def make_multi_agent_batch(kind: str, *, shape: tuple[int, ...] = SHAPE, batch_dims: int = 2) -> TensorDict:
    """``[B, T]`` with rewards ``[B, T, agents, 1]``: episodes end, and are cut, inside; each agent's on its own."""
    batch = make_batch(kind, shape)
    ended = torch.rand(*shape, 1)
    batch["next", "terminated"], batch["next", "done"] = ended < 0.2, ended < 0.4
    batch.batch_size = batch["next"].batch_size = shape[:batch_dims]
    return batch


def target(batch: TensorDict, value: Tensor, lmbda: float, valid: Tensor | None = None) -> Tensor:
    """``[B, T, agents]``: the forward view of the λ-return, each n-step return a sum of its own."""
    next_ = {key: tensor.squeeze(-1) for key, tensor in batch["next"].items()}
    result = torch.zeros(SHAPE)
    for b in range(TRAJECTORIES):
        for a in range(AGENTS):
            for t in range(STEPS):
                returns, rewards, end = [], 0.0, t
                while True:
                    discount = GAMMA ** (end - t)
                    rewards += discount * next_["reward"][b, end, a].item()
                    alive = 0.0 if next_["terminated"][b, end, a] else 1.0
                    returns.append(rewards + discount * GAMMA * alive * value[b, end, a].item())
                    followed = end + 1 < STEPS and (valid is None or bool(valid[b, end + 1, a]))
                    if next_["done"][b, end, a] or not followed:
                        break
                    end += 1
                weights = [(1 - lmbda) * lmbda**n for n in range(len(returns) - 1)] + [lmbda ** (len(returns) - 1)]
                result[b, t, a] = sum(w * g for w, g in zip(weights, returns, strict=True))
    return result


def expected_errors(loss: IQLLoss, batch: TensorDict, lmbda: float, valid: Tensor | None = None) -> Tensor:
    """``[N, B, T, agents]`` squared errors of the critics."""
    with torch.no_grad():
        value = loss.value_network(TensorDict(batch["next"], batch.shape))["state_value"].squeeze(-1)
    return (loss.qvalues(batch) - target(batch, value, lmbda, valid)).square()


def with_estimator(loss: IQLLoss, name: str, **hyperparams: Any) -> float:
    """Gives the loss an estimator; returns its λ."""
    lmbda = {"lmbda": LMBDA} if name == "TDLambda" else {}
    loss.make_value_estimator(name, gamma=GAMMA, **lmbda, **hyperparams)
    return lmbda.get("lmbda", 1.0)


@pytest.mark.parametrize("time_dim", [None, 1, -1])
@pytest.mark.parametrize("name", TRAJECTORY_ESTIMATORS)
def test_the_batch_size_says_which_dimension_is_time(kind: str, name: str, time_dim: int | None) -> None:
    loss, batch = make_loss(kind, loss_function="l2"), make_multi_agent_batch(kind)
    lmbda = with_estimator(loss, name, time_dim=time_dim)
    expected = expected_errors(loss, batch, lmbda)
    torch.testing.assert_close(loss.qvalue_loss(batch)[1]["td_error"], expected)
    torch.testing.assert_close(loss(batch)["loss_qvalue"], expected.sum(0).mean())


@pytest.mark.parametrize("time_dim", [1, -2])
@pytest.mark.parametrize("name", TRAJECTORY_ESTIMATORS)
def test_keyword_tensors_have_the_time_dimension_that_is_given(kind: str, name: str, time_dim: int) -> None:
    loss, batch = make_loss(kind, loss_function="l2"), make_multi_agent_batch(kind)
    lmbda = with_estimator(loss, name, time_dim=time_dim)
    expected = expected_errors(loss, batch, lmbda).sum(0).mean()
    torch.testing.assert_close(loss(**keywords(batch))[1], expected)


@pytest.mark.parametrize("shape", [SHAPE, (4, 3), (6,)])
@pytest.mark.parametrize("name", TRAJECTORY_ESTIMATORS)
def test_keyword_tensors_need_a_time_dimension(kind: str, name: str, shape: tuple[int, ...]) -> None:
    loss = make_loss(kind)
    with_estimator(loss, name)
    with pytest.raises(ValueError, match="keyword tensors do not say which dimension is time: pass time_dim to"):
        loss(**keywords(make_batch(kind, shape)))


@pytest.mark.parametrize("name", TRAJECTORY_ESTIMATORS)
def test_shuffled_transitions_of_agents_are_refused(kind: str, name: str) -> None:
    loss = make_loss(kind)
    with_estimator(loss, name)
    with pytest.raises(ValueError, match=r"needs trajectories, .* got batch size \(3,\)"):
        loss(make_multi_agent_batch(kind, shape=(3, 2), batch_dims=1))


@pytest.mark.parametrize("per_agent", [False, True])
@pytest.mark.parametrize("name", TRAJECTORY_ESTIMATORS)
def test_no_target_of_an_agent_sees_a_masked_step(kind: str, name: str, per_agent: bool) -> None:
    loss, batch = make_loss(kind, loss_function="l2"), make_multi_agent_batch(kind)
    valid = torch.rand(SHAPE if per_agent else (*SHAPE[:2], 1)) < 0.6
    batch["collector", "mask"] = valid.unsqueeze(-1) if per_agent else valid
    valid = valid.expand(SHAPE)
    lmbda = with_estimator(loss, name)
    expected = expected_errors(loss, batch, lmbda, valid) * valid
    batch["next", "reward"][~valid] = torch.nan
    torch.testing.assert_close(loss.qvalue_loss(batch)[1]["td_error"], expected)
    torch.testing.assert_close(loss(batch)["loss_qvalue"], expected.sum() / valid.sum())


@pytest.mark.parametrize("name", TRAJECTORY_ESTIMATORS)
def test_a_dimension_named_time_is_time(kind: str, name: str) -> None:
    loss, batch = make_loss(kind, loss_function="l2"), make_multi_agent_batch(kind)
    expected = expected_errors(loss, batch, with_estimator(loss, name)).transpose(1, 2)
    swapped = batch.transpose(0, 1).contiguous()
    swapped.names = ["time", None]
    torch.testing.assert_close(loss.qvalue_loss(swapped)[1]["td_error"], expected)


@pytest.mark.parametrize("flag", ["done", "terminated"])
def test_flags_that_agents_share_are_refused_by_name(kind: str, flag: str) -> None:
    loss, batch = make_loss(kind), make_multi_agent_batch(kind)
    batch["next", flag] = batch["next", flag].any(-2)
    with pytest.raises(ValueError, match=rf"'next', '{flag}'\) must have shape \(3, 5, 2, 1\)"):
        loss(batch)


@pytest.mark.parametrize("time_dim", [True, 1.0, "1", torch.tensor(1)])
def test_a_time_dimension_is_an_integer(time_dim: Any) -> None:
    loss = make_loss("continuous")
    before = loss.value_estimator
    with pytest.raises(TypeError, match="time_dim must be an integer or None"):
        loss.make_value_estimator("TD1", time_dim=time_dim)
    assert loss.value_estimator is before


@pytest.mark.parametrize(("time_dim", "as_keywords"), [(3, False), (-3, False), (3, True), (-4, True)])
def test_a_time_dimension_that_the_batch_lacks_is_refused(time_dim: int, as_keywords: bool) -> None:
    loss, batch = make_loss("continuous"), make_multi_agent_batch("continuous")
    loss.make_value_estimator("TDLambda", time_dim=time_dim)
    with pytest.raises(ValueError, match=f"time_dim={time_dim} is not a dimension of the batch shape"):
        loss(**keywords(batch)) if as_keywords else loss(batch)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_of_a_loss_keeps_the_time_dimension(how: Any) -> None:
    loss, batch = make_loss("continuous"), keywords(make_multi_agent_batch("continuous"))
    loss.make_value_estimator("TDLambda", time_dim=1)
    torch.testing.assert_close(how(loss)(**batch), loss(**batch))


def test_a_compiled_step_follows_the_time_dimension() -> None:
    loss, batch = make_loss("continuous"), keywords(make_multi_agent_batch("continuous"))
    loss.make_value_estimator("TDLambda", time_dim=1)
    compute = LossGradients(loss, compile=True)
    for time_dim in (1, 0):
        loss.value_estimator.time_dim = time_dim
        torch.testing.assert_close(compute(batch), tuple(output.detach() for output in loss(**batch)))
