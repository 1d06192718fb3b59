"""Bad input: an error before anything changes that names the key, what was expected and what came."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ACTION, ACTIONS, OBSERVATION, gradients, keywords, make_batch, make_loss
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor

from iql_plugins.losses.batch import mask_rows

Change = Callable[[TensorDict], Any]


def unchanged_after(loss: torch.nn.Module, batch: TensorDict, error: type[Exception], message: str) -> None:
    """The call raises, and neither the batch nor the loss has changed."""
    before, state = batch.clone(), {name: t.clone() for name, t in loss.state_dict().items()}
    with pytest.raises(error, match=message):
        loss(batch)
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    for name, tensor in loss.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize(
    "key", ["observation", "action", *[("next", name) for name in ("observation", "reward", "done", "terminated")]]
)
def test_a_missing_key_is_named(kind: str, key: Any) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    tensors = keywords(batch)
    del batch[key]
    unchanged_after(loss, batch, KeyError, repr(key).replace("(", r"\(").replace(")", r"\)"))
    del tensors[key if isinstance(key, str) else "_".join(key)]
    with pytest.raises(KeyError, match="the batch has no"):
        loss(**tensors)


def test_terminated_is_never_taken_from_done(kind: str) -> None:
    batch = make_batch(kind)
    del batch["next", "terminated"]
    unchanged_after(make_loss(kind), batch, KeyError, "never taken from .*done.* a time limit would then stop")


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        (
            ("next", "reward"),
            torch.zeros(6, 2),
            ValueError,
            r"'reward'\) must have shape \(6, 1\) or \(6,\).* got \(6, 2\)",
        ),
        (("next", "reward"), torch.zeros(6, 1, dtype=torch.int64), TypeError, "floating dtype, got torch.int64"),
        (("next", "done"), torch.zeros(6, 1), TypeError, "'done'.* bool dtype, got torch.float32"),
        (("next", "terminated"), torch.zeros(6, 1), TypeError, "'terminated'.* bool dtype, got torch.float32"),
        (("next", "done"), torch.zeros(6, 3, dtype=torch.bool), ValueError, r"'done'.* got \(6, 3\)"),
        (("next", "discount"), torch.ones(6, 2), ValueError, r"'discount'.* got \(6, 2\)"),
        (("next", "discount"), torch.ones(6, 1).long(), TypeError, "'discount'.* floating dtype"),
        ("steps_to_next_obs", torch.ones(6, 1), TypeError, "'steps_to_next_obs' must have a integer dtype"),
        ("priority_weight", torch.ones(6, 2), ValueError, r"'priority_weight'.* got \(6, 2\)"),
        ("priority_weight", torch.ones(6).long(), TypeError, "'priority_weight'.* floating"),
        ("shifted_valid", torch.ones(6), TypeError, "'shifted_valid' must have a bool dtype"),
        ("shifted_valid", torch.ones(6, 2).bool(), ValueError, r"'shifted_valid' must have shape \(6, 1\) or \(6,\)"),
        ("observation", torch.zeros(6, OBSERVATION + 1), RuntimeError, r"network failed on 'observation': \(6, 6\)"),
        (
            "observation",
            torch.zeros(6, OBSERVATION).double(),
            RuntimeError,
            "torch.float64; its parameters are .*float32",
        ),
        (
            ("next", "observation"),
            torch.zeros(6, 1),
            RuntimeError,
            r"value_network failed on \('next', 'observation'\)",
        ),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(kind: str, key: Any, value: Tensor, error: Any, message: str) -> None:
    unchanged_after(make_loss(kind), make_batch(kind).set(key, value), error, message)


@pytest.mark.parametrize(
    ("key", "shape"), [("observation", (4, OBSERVATION)), (("next", "observation"), (4, OBSERVATION)), ("action", (4,))]
)
def test_keyword_tensors_of_another_length_are_named(kind: str, key: Any, shape: tuple[int, ...]) -> None:
    tensors = keywords(make_batch(kind))
    name = key if isinstance(key, str) else "_".join(key)
    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    with pytest.raises(ValueError, match=r"must begin with the batch shape \(6,\).* got \(4"):
        make_loss(kind)(**tensors)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_flat_rewards_and_flags_are_columns_and_never_broadcast(kind: str, shape: tuple[int, ...]) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected = loss(batch.clone())
    for name in ("reward", "done", "terminated"):
        batch["next", name] = batch["next", name].reshape(shape)
    torch.testing.assert_close(loss(batch.clone()), expected)
    torch.testing.assert_close(loss(**keywords(batch)), tuple(expected[key] for key in loss.out_keys))


@pytest.mark.parametrize("size", [1, 6])
def test_a_batch_without_a_batch_size_works(kind: str, size: int) -> None:
    loss, batch = make_loss(kind), make_batch(kind, (size,))
    expected = loss(batch.clone())
    batch.batch_size = []
    torch.testing.assert_close(loss(batch), expected)
    assert batch["td_error"].shape == (size,)


def test_a_flat_continuous_action_is_refused() -> None:
    batch = make_batch("continuous").set("action", torch.zeros(6))
    unchanged_after(make_loss("continuous"), batch, RuntimeError, r"qvalue_network failed on .*'action': \(6,\)")
    batch.set("action", torch.zeros(6, ACTION + 1))
    unchanged_after(make_loss("continuous"), batch, RuntimeError, r"'action': \(6, 4\)")


def test_an_action_that_the_policy_would_broadcast_is_refused() -> None:
    class Sum(torch.nn.Module):
        def forward(self, observation: Tensor, action: Tensor) -> Tensor:
            return observation.sum(-1, keepdim=True) + action.sum()

    q = TensorDictModule(Sum(), ["observation", "action"], ["state_action_value"])
    batch = make_batch("continuous").set("action", torch.zeros(6, 1))
    loss = make_loss("continuous", qvalue_network=q, num_qvalue_nets=1)
    unchanged_after(loss, batch, ValueError, r"'action' must have shape \(6, 3\).* got \(6, 1\)")


@pytest.mark.parametrize(("value", "row"), [(ACTIONS, 2), (-1, 0)])
@pytest.mark.parametrize("column", [False, True])
def test_a_discrete_action_out_of_range_is_named_with_its_row(value: int, row: int, column: bool) -> None:
    batch = make_batch("discrete")
    batch["action"][row] = value
    if column:
        batch["action"] = batch["action"].unsqueeze(-1)
    unchanged_after(
        make_loss("discrete"), batch, ValueError, f"'action' must be from 0 to 3, got .*{value}.* in row {row}"
    )


def test_a_discrete_action_of_a_wrong_form_is_named() -> None:
    batch = make_batch("discrete")
    floats = batch.clone().set("action", batch["action"].float())
    unchanged_after(make_loss("discrete"), floats, TypeError, "'action' must have an integer dtype, got torch.float32")
    one_hot = make_loss("discrete", action_space="one-hot")
    unchanged_after(one_hot, batch, ValueError, r"one-hot of shape \(6, 4\), got \(6,\); for indices pass")
    for bad in (torch.zeros(6, ACTIONS), torch.ones(6, ACTIONS), torch.full((6, ACTIONS), 0.25)):
        unchanged_after(one_hot, batch.set("action", bad), ValueError, "'action' must be one-hot, got .* in row 0")


def test_an_empty_batch_is_refused(kind: str) -> None:
    batch = make_batch(kind)[:0]
    unchanged_after(make_loss(kind), batch, ValueError, r"the batch is empty: 'observation' has shape \(0, 5\)")
    with pytest.raises(ValueError, match="the batch is empty"):
        make_loss(kind)(**keywords(make_batch(kind)[:0]))


def test_another_device_is_refused(kind: str) -> None:
    batch = make_batch(kind)
    tensors = keywords(batch) | {"next_reward": torch.zeros(6, 1, device="meta")}
    with pytest.raises(ValueError, match=r"\('next', 'reward'\) must be on cpu, .* got meta"):
        make_loss(kind)(**tensors)


def test_what_is_no_batch_is_refused(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    with pytest.raises(TypeError, match=r"the batch must be a TensorDict, or keyword tensors .* got dict"):
        loss({"observation": batch["observation"]})
    with pytest.raises(TypeError, match="not both"):
        loss(batch, observation=batch["observation"])
    with pytest.raises(TypeError, match="unexpected tensor 'next_rewards'; did you mean 'next_reward'"):
        loss(**(keywords(batch) | {"next_rewards": batch["next", "reward"]}))
    with pytest.raises(TypeError, match="'observation' must be a tensor, got list"):
        loss(**(keywords(batch) | {"observation": [1.0]}))


def test_a_locked_batch_is_refused_before_anything_is_computed(kind: str) -> None:
    with pytest.raises(RuntimeError, match="locked: unlock_"):
        make_loss(kind)(make_batch(kind).lock_())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["observation", ("next", "observation"), ("next", "reward"), "priority_weight"])
def test_check_finite_names_the_key_and_the_first_row(kind: str, key: Any, bad: float) -> None:
    batch = make_batch(kind).set("priority_weight", torch.ones(6))
    batch[key][4] = bad
    batch[key][2] = bad
    unchanged_after(make_loss(kind, check_finite=True), batch, ValueError, f"{_tail(key)}.* is not finite in row 2")
    make_loss(kind)(batch)  # off by default: it reads the batch on the host


def _tail(key: Any) -> str:
    return key if isinstance(key, str) else key[-1]


def test_check_finite_passes_what_is_masked(kind: str) -> None:
    batch = make_batch(kind)
    batch["shifted_valid"] = torch.arange(6) != 2
    batch["observation"][2] = math.nan
    make_loss(kind, check_finite=True)(batch)


def poisoned(batch: TensorDict, mask: Tensor) -> TensorDict:
    """The batch with NaN (and an impossible discrete action) wherever it is masked."""
    batch = batch.clone()
    for key, tensor in batch.items(True, True):
        if tensor.is_floating_point():
            tensor[~mask] = math.nan
        elif key == "action":
            tensor[~mask] = 10**6
    return batch


@pytest.mark.parametrize("shape", ["column", "row"])
@pytest.mark.parametrize("key", ["shifted_valid", ("collector", "mask"), ("my", "mask")])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_masked_entry_reaches_no_loss_gradient_or_priority(kind: str, key: Any, shape: str, weighted: bool) -> None:
    loss, batch = make_loss(kind, temperature=3.0), make_batch(kind)
    if weighted:
        batch["priority_weight"] = torch.rand(6) + 0.5
    mask = torch.tensor([False, True, True, False, True, True])
    if key == ("my", "mask"):
        loss.loss_mask_key = key
    masked = poisoned(batch, mask).set(key, mask.unsqueeze(-1) if shape == "column" else mask)
    alone = batch[mask].clone()
    outputs = loss(masked)
    if key == ("my", "mask"):
        loss.loss_mask_key = None
    reference = loss(alone)
    torch.testing.assert_close(outputs, reference)
    torch.testing.assert_close(gradients(loss, outputs), gradients(loss, reference))
    torch.testing.assert_close(masked["td_error"][mask], alone["td_error"])
    assert not masked["td_error"][~mask].any()


@pytest.mark.parametrize("name", ["actor_loss", "qvalue_loss", "value_loss"])
def test_a_masked_entry_reaches_no_loss_that_is_called_alone(kind: str, name: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    mask = torch.tensor([True, True, False, True, True, False])
    masked = poisoned(batch, mask).set("shifted_valid", mask)
    value, metadata = getattr(loss, name)(masked)
    torch.testing.assert_close(value, getattr(loss, name)(batch[mask].clone())[0])
    assert all(not errors[:, ~mask].any() for errors in metadata.values())


@pytest.mark.parametrize("name", ["actor_loss", "qvalue_loss", "value_loss"])
def test_weights_count_in_a_loss_that_is_called_alone(kind: str, name: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    batch["priority_weight"] = torch.tensor([1.0, 0.0, 3.0, 0.0, 0.0, 0.0])
    first, third = (getattr(loss, name)(batch[i : i + 1].clone())[0] for i in (0, 2))
    torch.testing.assert_close(getattr(loss, name)(batch)[0], (first + 3 * third) / 4)


@pytest.mark.parametrize("name", ["actor_loss", "qvalue_loss", "value_loss"])
def test_a_loss_that_is_called_alone_writes_nothing_before_an_error(kind: str, name: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind).set("priority_weight", torch.ones(6, 2))
    keys = set(batch.keys(True, True))
    with pytest.raises(ValueError, match="'priority_weight'"):
        getattr(loss, name)(batch)
    assert set(batch.keys(True, True)) == keys


@pytest.mark.parametrize("name", ["actor_loss", "qvalue_loss", "value_loss"])
def test_a_loss_that_is_called_alone_takes_a_masked_batch_without_a_batch_size(kind: str, name: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind).set("shifted_valid", torch.arange(6) != 2)
    expected = getattr(loss, name)(batch.clone())[0]
    batch.batch_size = []
    torch.testing.assert_close(getattr(loss, name)(batch)[0], expected)


def test_both_automatic_masks_count(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    first, second = torch.arange(6) > 0, torch.arange(6) < 5
    masked = (
        poisoned(batch, first & second).set("shifted_valid", first).set(("collector", "mask"), second.unsqueeze(-1))
    )
    torch.testing.assert_close(loss(masked), loss(batch[1:5].clone()))


def test_a_batch_without_any_valid_entry_has_zero_losses_and_gradients(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    mask = torch.zeros(6, dtype=torch.bool)
    outputs = loss(poisoned(batch, mask).set("shifted_valid", mask))
    assert not any(value.any() for value in outputs.values())
    assert not any(grad.any() for grad in gradients(loss, outputs).values())


def test_no_reduction_keeps_masked_positions_at_zero(kind: str) -> None:
    loss, batch = make_loss(kind, reduction="none"), make_batch(kind)
    mask = torch.arange(6) != 3
    outputs = loss(poisoned(batch, mask).set("shifted_valid", mask))
    for value in outputs.values():
        assert value.shape == (6,)
        assert value[3] == 0
        assert value[mask].isfinite().all()


def test_a_step_before_padding_bootstraps_instead_of_looking_into_it(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind, (2, 5))
    loss.make_value_estimator("tdlambda")
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3:] = False
    masked = poisoned(batch, mask).set("shifted_valid", mask)
    loss(masked)
    short = batch[:, :3].clone()
    loss(short)
    torch.testing.assert_close(masked["td_error"][:, :3], short["td_error"])


def test_a_mask_that_was_named_must_be_there(kind: str) -> None:
    loss = make_loss(kind)
    loss.loss_mask_key = "valid"
    unchanged_after(loss, make_batch(kind), KeyError, "the batch has no 'valid'")
    with pytest.raises(ValueError, match="loss_mask_key must be 'auto', None or a key"):
        loss.loss_mask_key = 3
    assert loss.loss_mask_key == "valid"


def test_no_mask_counts_when_masking_is_off(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected = loss(batch.clone())
    loss.loss_mask_key = None
    torch.testing.assert_close(loss(batch.set("shifted_valid", torch.arange(6) > 3)), expected)


def test_weights_do_not_count_when_they_are_off(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    expected = loss(batch.clone())
    batch["priority_weight"] = torch.rand(6)
    assert not torch.equal(loss(batch.clone())["loss_value"], expected["loss_value"])
    loss.use_prioritized_weights = False
    torch.testing.assert_close(loss(batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_a_masked_row_becomes_a_valid_one(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = torch.arange(1, math.prod(shape) * 2 + 1).reshape(*shape, 2).to(dtype)
    mask = torch.ones(shape, dtype=torch.bool)
    assert torch.equal(mask_rows(rows, mask), rows)
    assert not mask_rows(rows, ~mask).any()
    if shape:
        mask.view(-1)[0] = False
        filled = mask_rows(rows, mask).reshape(-1, 2)
        assert torch.equal(filled[0], rows.reshape(-1, 2)[1])
        assert torch.equal(filled[1:], rows.reshape(-1, 2)[1:])
