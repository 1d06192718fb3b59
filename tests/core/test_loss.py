"""The contract of IQLLoss and DiscreteIQLLoss: keys, outputs, what trains what."""

import warnings
from typing import Any

import pytest
import torch
from conftest import ACTION, ACTIONS, OBSERVATION, gradients, keywords, make_batch, make_loss, total
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn

from iql_plugins import DiscreteIQLLoss, IQLLoss, ValueEstimators
from iql_plugins.networks import MLP, GaussianHead, critic, gaussian_actor, value_function
from iql_plugins.networks.distributions import TanhMeanNormal

LOSSES = ["loss_actor", "loss_qvalue", "loss_value"]


def test_a_tensordict_gives_a_tensordict_and_keywords_a_tuple(kind: str, device: torch.device) -> None:
    loss = make_loss(kind).to(device)
    batch = make_batch(kind, device=device)
    outputs = loss(batch.clone())
    assert isinstance(outputs, TensorDict)
    assert list(loss.out_keys) == [*LOSSES, "entropy"]
    assert set(outputs.keys()) == {*LOSSES, "entropy"}
    for name, value in zip(loss.out_keys, loss(**keywords(batch)), strict=True):
        assert value.shape == ()
        torch.testing.assert_close(value, outputs[name])


def test_nothing_but_the_priority_and_the_log_probability_is_written(kind: str) -> None:
    batch = make_batch(kind)
    before = batch.clone()
    make_loss(kind)(batch)
    assert set(batch.keys(True, True)) - set(before.keys(True, True)) == {"td_error", "_log_prob"}
    for key in before.keys(True, True):
        assert torch.equal(batch[key], before[key])
    assert batch["td_error"].shape == batch["_log_prob"].shape == batch.batch_size
    assert not batch["td_error"].requires_grad
    assert not batch["_log_prob"].requires_grad


def test_the_priority_is_the_largest_squared_error_of_the_critics(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    _, metadata = loss.qvalue_loss(batch.clone())
    assert metadata["td_error"].shape == (2, *batch.batch_size)
    loss(batch)
    torch.testing.assert_close(batch["td_error"], metadata["td_error"].amax(0))


def test_every_loss_can_be_called_alone(kind: str) -> None:
    loss, batch = make_loss(kind, expectile=0.7, temperature=3.0), make_batch(kind)
    outputs = loss(batch.clone())
    torch.testing.assert_close(loss.actor_loss(batch)[0], outputs["loss_actor"])
    torch.testing.assert_close(loss.qvalue_loss(batch)[0], outputs["loss_qvalue"])
    torch.testing.assert_close(loss.value_loss(batch)[0], outputs["loss_value"])


def test_a_loss_alone_needs_no_more_than_it_reads(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    loss.value_loss(batch.select("observation", "action"))
    loss.actor_loss(batch.select("observation", "action"))
    loss.qvalue_loss(batch.select("observation", "action", "next"))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", None])
@pytest.mark.parametrize("mode", [None, "exclude", "non_tensor"])
def test_the_outputs_follow_the_reduction(kind: str, reduction: str | None, mode: str | None) -> None:
    loss, batch = make_loss(kind, reduction=reduction, scalar_output_mode=mode), make_batch(kind, (3, 2))
    outputs, values = loss(batch.clone()), loss(**keywords(batch))
    none = reduction == "none"
    assert ("entropy" in outputs.keys()) == (not none or mode == "non_tensor") == ("entropy" in loss.out_keys)
    assert len(values) == len(loss.out_keys)
    for name, value in zip(loss.out_keys, values, strict=True):
        assert value.shape == ((3, 2) if none and name != "entropy" else ())
        torch.testing.assert_close(outputs[name], value)


def test_selected_outputs_come_in_the_order_of_the_selection(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    everything = loss(batch.clone())
    assert loss.select_out_keys("loss_value", "loss_actor") is loss
    value, actor = loss(**keywords(batch))
    torch.testing.assert_close((value, actor), (everything["loss_value"], everything["loss_actor"]))
    assert set(loss(batch.clone()).keys()) == {"loss_value", "loss_actor"}
    loss.select_out_keys("entropy")
    assert loss(**keywords(batch)).shape == ()
    assert loss.out_keys_source == [*LOSSES, "entropy"]
    loss.reset_out_keys()
    assert loss.out_keys == [*LOSSES, "entropy"]


@pytest.mark.parametrize("keys", [("loss",), ("loss_actor", "loss_critic"), ()])
def test_an_output_that_is_not_there_cannot_be_selected(keys: tuple[str, ...]) -> None:
    loss = make_loss("continuous")
    with pytest.raises(ValueError, match="out_keys must be some of"):
        loss.select_out_keys(*keys)
    assert loss.out_keys == [*LOSSES, "entropy"]


def test_entropy_cannot_be_selected_where_it_is_left_out() -> None:
    with pytest.raises(ValueError, match="entropy"):
        make_loss("continuous", reduction="none").select_out_keys("entropy")


RENAMED = {
    "action": "act",
    "log_prob": ("out", "lp"),
    "priority": ("out", "priority"),
    "priority_weight": "is_weight",
    "reward": ("agent", "r"),
    "done": "over",
    "terminated": ("agent", "dead"),
    "value": "v",
    "state_action_value": ("critic", "q"),
}


def test_all_nine_keys_can_be_renamed() -> None:
    sizes: dict[str, Any] = {"hidden_sizes": (8,)}
    value = TensorDictModule(MLP(OBSERVATION, 1, **sizes), in_keys=["observation"], out_keys=["v"])
    q = TensorDictModule(MLP(OBSERVATION + ACTION, 1, **sizes), ["observation", "act"], [("critic", "q")])
    loss = make_loss("continuous", qvalue_network=q, value_network=value)
    estimator = loss.value_estimator
    loss.set_keys(**RENAMED)
    assert estimator.tensor_keys.reward == ("agent", "r")
    batch = make_batch("continuous")
    renamed = TensorDict(
        {
            "observation": batch["observation"],
            "act": batch["action"],
            "is_weight": torch.rand(6),
            "next": {
                "observation": batch["next", "observation"],
                "agent": {"r": batch["next", "reward"], "dead": batch["next", "terminated"]},
                "over": batch["next", "done"],
            },
        },
        6,
    )
    outputs = loss(renamed)
    assert {("out", "lp"), ("out", "priority")} <= set(renamed.keys(True, True))
    tensors = keywords(renamed.exclude("out"))
    assert "next_agent_r" in tensors
    torch.testing.assert_close(loss(**tensors), tuple(outputs[key] for key in loss.out_keys))
    reference = make_loss("continuous", qvalue_network=None, value_network=value_function(OBSERVATION, **sizes))
    reference.load_state_dict(loss.state_dict() | {k: v for k, v in loss.state_dict().items() if "_value_est" in k})
    same = batch.clone().set("priority_weight", renamed["is_weight"])
    torch.testing.assert_close(reference(same)["loss_qvalue"], outputs["loss_qvalue"])


def test_none_restores_a_default_key() -> None:
    loss = make_loss("continuous")
    loss.set_keys(reward="r", priority=("a", "b"))
    loss.set_keys(reward=None)
    assert loss.tensor_keys.reward == "reward"
    assert loss.tensor_keys.priority == ("a", "b")


def test_an_unknown_key_is_refused_with_those_accepted_and_nothing_changes() -> None:
    loss = make_loss("continuous")
    with pytest.raises(ValueError, match=r"'rewards' is not an accepted key.*value, action, log_prob, priority"):
        loss.set_keys(action="a", rewards="r")
    assert loss.tensor_keys.action == "action"
    with pytest.raises(KeyError, match=r"does not write 'v'.*'state_value'"):
        loss.set_keys(action="a", value="v")
    assert loss.tensor_keys.action == "action"
    with pytest.raises(ValueError, match="reward must be a string"):
        loss.set_keys(reward=3)


def test_the_keys_of_a_batch_are_those_of_the_networks_and_the_layout(kind: str) -> None:
    assert set(make_loss(kind).in_keys) == {
        "observation",
        "action",
        ("next", "observation"),
        ("next", "reward"),
        ("next", "done"),
        ("next", "terminated"),
    }


def asymmetric_loss(**kwargs: Any) -> IQLLoss:
    """An actor that sees pixels-to-be, critics that see the simulator's state."""
    return make_loss(
        "continuous",
        actor_network=gaussian_actor(OBSERVATION, ACTION, in_keys=[("sensors", "camera")], hidden_sizes=(8,)),
        qvalue_network=critic(2, ACTION, in_keys=["state"], hidden_sizes=(8,)),
        value_network=value_function(2, in_keys=["state"], hidden_sizes=(8,)),
        **kwargs,
    )


def asymmetric_batch() -> TensorDict:
    batch = make_batch("continuous")
    batch["sensors", "camera"] = batch.pop("observation")
    batch["state"] = torch.randn(6, 2)
    batch["next"] = batch["next"].exclude("observation").set("state", torch.randn(6, 2))
    return batch


def test_actor_and_critics_may_read_different_observations() -> None:
    loss, batch = asymmetric_loss(), asymmetric_batch()
    assert ("next", "state") in loss.in_keys
    assert ("next", "sensors", "camera") not in loss.in_keys
    outputs = loss(batch)
    assert all(grad.any() for grad in gradients(loss, outputs).values())
    tensors = keywords(batch.exclude("td_error", "_log_prob"))
    torch.testing.assert_close(loss(**tensors), tuple(outputs.values()))
    # TorchRL asks for the actor's next observation: giving it changes nothing.
    torch.testing.assert_close(
        loss(**tensors, next_sensors_camera=torch.randn(6, OBSERVATION)), tuple(outputs.values())
    )


def test_a_value_network_is_built_on_the_actors_observations(kind: str) -> None:
    loss = make_loss(kind, value_network=None)
    assert loss.value_network.in_keys == ["observation"]
    assert next(loss.value_network.parameters()).shape == (256, OBSERVATION)
    outputs = loss(make_batch(kind))
    assert all(grad.any() for name, grad in gradients(loss, outputs).items() if name.startswith("value_network_params"))


def test_a_value_network_is_built_on_concatenated_observations_of_a_double_actor() -> None:
    actor = gaussian_actor(OBSERVATION + 2, ACTION, in_keys=["observation", "state"], hidden_sizes=(8,)).double()
    q = critic(OBSERVATION, ACTION, hidden_sizes=(8,)).double()
    loss = make_loss("continuous", actor_network=actor, qvalue_network=q, value_network=None)
    assert loss.value_network.in_keys == ["observation", "state"]
    assert next(loss.value_network.parameters()).dtype == torch.float64


def test_no_value_network_is_guessed_for_an_actor_that_does_not_start_linear() -> None:
    body = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten(-2), nn.Linear(OBSERVATION, ACTION))
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(GaussianHead(body, ACTION), in_keys=["observation"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=TanhMeanNormal),
    )
    with pytest.raises(ValueError, match="Conv1d: pass a value_network"):
        make_loss("continuous", actor_network=actor, value_network=None)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("listed", [False, True])
def test_the_critics_are_as_many_as_asked_and_all_different(kind: str, count: int, listed: bool) -> None:
    if listed:
        one = make_loss(kind, num_qvalue_nets=1).qvalue_network
        network: Any = [make_loss(kind, num_qvalue_nets=1).qvalue_network for _ in range(count)]
        assert type(one) is type(network[0])
    else:
        network = make_loss(kind, num_qvalue_nets=1).qvalue_network
    loss = make_loss(kind, qvalue_network=network, num_qvalue_nets=count)
    assert loss.qvalue_network_params.batch_size == (torch.Size([]) if count == 1 else torch.Size([count]))
    if count > 1:
        for weight in loss.qvalue_network_params.values(True, True):
            if weight.ndim > 2:
                assert all(not torch.equal(weight[i], weight[j]) for i in range(count) for j in range(i))
    assert all(grad.any() for grad in gradients(loss, loss(make_batch(kind))).values())


def test_a_duplicated_critic_is_initialised_by_its_own_reset_parameters() -> None:
    q = critic(OBSERVATION, ACTION, hidden_sizes=(8,))
    loss = make_loss("continuous", qvalue_network=q, num_qvalue_nets=3)
    weights = loss.qvalue_network_params["module", "layers", "2", "weight"]
    assert weights.shape == (3, 1, 8)
    # OrthogonalLinear: every row has norm sqrt(2), which no uniform draw has.
    torch.testing.assert_close(weights.norm(dim=-1), torch.full((3, 1), 2.0).sqrt())
    assert not loss.qvalue_network_params["module", "layers", "2", "bias"].any()


class Bare(nn.Module):
    """A critic that has no reset_parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OBSERVATION + ACTION, 1))

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return torch.cat([observation, action], -1) @ self.weight


def test_duplicated_critics_without_reset_parameters_still_differ() -> None:
    q = TensorDictModule(Bare(), ["observation", "action"], ["state_action_value"])
    loss = make_loss("continuous", qvalue_network=q)
    first, second = loss.qvalue_network_params["module", "weight"]
    assert not torch.equal(first, second)


def test_the_targets_are_equal_to_the_critics_and_have_no_gradient(kind: str) -> None:
    loss = make_loss(kind)
    pairs = zip(
        loss.qvalue_network_params.values(True, True),
        loss.target_qvalue_network_params.values(True, True),
        strict=True,
    )
    for source, target in pairs:
        assert torch.equal(source, target)
        assert source.data_ptr() != target.data_ptr()
        assert not target.requires_grad
    assert not any(name.startswith("target") for name, _ in loss.named_parameters())


def test_each_loss_trains_its_own_network_alone(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    for name, network in zip(LOSSES, ("actor", "qvalue", "value"), strict=True):
        grads = gradients(loss, loss(batch.clone()), lambda outputs, name=name: outputs[name])
        reached = {key.split("_network")[0] for key, grad in grads.items() if grad.any()}
        assert reached == {network}


def shared_trunk(separate_losses: bool, **kwargs: Any) -> tuple[IQLLoss, nn.Linear]:
    """Actor and V on one trunk."""
    trunk = nn.Linear(OBSERVATION, 8)
    features = TensorDictModule(trunk, in_keys=["observation"], out_keys=["features"])
    actor = ProbabilisticTensorDictSequential(
        features,
        TensorDictModule(GaussianHead(nn.Linear(8, ACTION), ACTION), ["features"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=TanhMeanNormal),
    )
    value = TensorDictSequential(features, TensorDictModule(nn.Linear(8, 1), ["features"], ["state_value"]))
    loss = make_loss("continuous", actor_network=actor, value_network=value, separate_losses=separate_losses, **kwargs)
    return loss, trunk


@pytest.mark.parametrize("separate", [False, True])
def test_a_trunk_of_actor_and_value_is_trained_by_both_losses_or_the_actors(separate: bool) -> None:
    loss, trunk = shared_trunk(separate)
    outputs = loss(make_batch("continuous"))
    by_actor, by_value = (
        torch.autograd.grad(outputs[name], trunk.weight, retain_graph=True, allow_unused=True)[0]
        for name in ("loss_actor", "loss_value")
    )
    assert by_actor.any()
    assert (by_value is None) == separate
    assert sum(parameter is trunk.weight for parameter in loss.parameters()) == 1
    in_value = [parameter is trunk.weight for parameter in loss.value_network_params.parameters()]
    assert any(in_value) != separate


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_what_trains_a_trunk_of_value_and_critic(separate: bool, count: int) -> None:
    trunk = nn.Linear(OBSERVATION, 8)
    features = TensorDictModule(trunk, in_keys=["observation"], out_keys=["features"])
    value = TensorDictSequential(features, TensorDictModule(nn.Linear(8, 1), ["features"], ["state_value"]))
    head = TensorDictModule(MLP(8 + ACTION, 1, (8,)), ["features", "action"], ["state_action_value"])
    loss = make_loss(
        "continuous",
        qvalue_network=TensorDictSequential(features, head),
        value_network=value,
        separate_losses=separate,
        num_qvalue_nets=count,
    )
    outputs = loss(make_batch("continuous"))
    by_value, by_critics = (
        torch.autograd.grad(outputs[name], trunk.weight, retain_graph=True, allow_unused=True)[0]
        for name in ("loss_value", "loss_qvalue")
    )
    assert by_value.any()
    # One critic is the module that was passed; two are copies of it, unless the losses are separate.
    assert (by_critics is not None) == (count == 1 and not separate)
    with torch.no_grad():
        trunk.weight.add_(1.0)
    seen = loss.qvalue_network_params["module", "0", "module", "weight"]
    assert torch.equal(seen[0] if count == 2 else seen, trunk.weight) == (separate or count == 1)


def test_critics_that_share_an_encoder_train_it_together() -> None:
    trunk = nn.Linear(OBSERVATION, 8)
    features = TensorDictModule(trunk, in_keys=["observation"], out_keys=["features"])
    heads = [TensorDictModule(MLP(8 + ACTION, 1, (8,)), ["features", "action"], ["state_action_value"]) for _ in "12"]
    loss = make_loss("continuous", qvalue_network=[TensorDictSequential(features, head) for head in heads])
    assert sum(parameter is trunk.weight for parameter in loss.parameters()) == 1
    outputs = loss(make_batch("continuous"))
    assert torch.autograd.grad(outputs["loss_qvalue"], trunk.weight)[0].any()
    assert loss.state_dict()["qvalue_network_params.module.0.module.weight"].shape == (2, 8, OBSERVATION)


def test_critics_of_which_some_are_the_same_are_refused() -> None:
    one, other = (critic(OBSERVATION, ACTION, hidden_sizes=(8,)) for _ in "12")
    with pytest.raises(ValueError, match=r"shares .* among some of its critics"):
        make_loss("continuous", qvalue_network=[one, one, other], num_qvalue_nets=3)


def test_the_same_critic_repeated_is_one_critic(kind: str) -> None:
    q = make_loss(kind, num_qvalue_nets=1).qvalue_network
    loss = make_loss(kind, qvalue_network=[q, q])
    single = make_loss(kind, qvalue_network=q, num_qvalue_nets=1)
    single.load_state_dict({k: t[0] if "qvalue" in k else t for k, t in loss.state_dict().items()})
    batch = make_batch(kind)
    twice, once = loss(batch.clone()), single(batch.clone())
    torch.testing.assert_close(twice["loss_qvalue"], 2 * once["loss_qvalue"])
    torch.testing.assert_close(twice["loss_value"], once["loss_value"])
    assert [id(p) for p in loss.qvalue_network.parameters()] == [id(p) for p in q.parameters()]


def test_looping_and_vectorising_over_critics_are_equal(kind: str) -> None:
    loss, batch = make_loss(kind, num_qvalue_nets=3), make_batch(kind)
    looped = loss(batch.clone())
    loss.vmap_randomness = "same"  # takes the vectorised way on a CPU, too
    vectorised = loss(batch.clone())
    torch.testing.assert_close(looped, vectorised)
    expected = gradients(loss, loss(batch.clone()))
    loss.deactivate_vmap = True
    torch.testing.assert_close(gradients(loss, loss(batch.clone())), expected)


def test_each_network_is_evaluated_once(kind: str) -> None:
    loss = make_loss(kind, num_qvalue_nets=1)
    calls: dict[str, int] = {}
    networks = {
        "actor": loss.actor_network,
        "value": loss.value_network,
        "critic": loss.qvalue_network,
        "target": loss.get_stateful_net("target_qvalue_network", copy=False),
    }
    for name, network in networks.items():
        first = next(m for m in network.modules() if isinstance(m, nn.Linear))
        first.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    loss(make_batch(kind))
    # V twice: at s and at s'.
    assert calls == {"actor": 1, "value": 2, "critic": 1, "target": 1}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("expectile", 1.5, r"expectile must be in \(0, 1"),
        ("expectile", -0.1, "expectile"),
        ("expectile", 0.0, "expectile"),
        ("temperature", -1.0, "temperature"),
        ("max_weight", 0.0, "max_weight"),
        ("loss_function", "l3", "loss_function must be one of 'l1', 'l2', 'smooth_l1'"),
        ("reduction", "avg", "reduction must be one of"),
        ("scalar_output_mode", "tensor", "scalar_output_mode must be one of"),
        ("num_qvalue_nets", 0, "num_qvalue_nets must be >= 1"),
    ],
)
def test_a_hyper_parameter_out_of_range_is_refused(kind: str, argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss(kind, **{argument: value})


def test_a_hyper_parameter_set_out_of_range_later_is_refused_by_the_next_call(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    for name, bad in {"expectile": 1.5, "temperature": -1.0, "loss_function": "l3", "reduction": "avg"}.items():
        good = getattr(loss, name)
        setattr(loss, name, bad)
        with pytest.raises(ValueError, match=name):
            loss(batch)
        setattr(loss, name, good)
    assert "td_error" not in batch.keys()


def test_expectile_one_is_for_continuous_actions_only() -> None:
    make_loss("continuous", expectile=1.0)
    with pytest.raises(ValueError, match=r"expectile must be in \(0, 1\) for discrete"):
        make_loss("discrete", expectile=1.0)


def test_deprecated_arguments_say_what_to_call_instead(kind: str) -> None:
    with pytest.raises(TypeError, match="make_value_estimator"):
        make_loss(kind, gamma=0.9)
    with pytest.raises(RuntimeError, match="set_keys"):
        make_loss(kind, priority_key="p")


def test_networks_that_are_no_tensordict_modules_are_refused() -> None:
    plain = nn.Linear(OBSERVATION, 1)
    for name in ("actor_network", "qvalue_network", "value_network"):
        with pytest.raises(TypeError, match=f"{name} must be a .*TensorDict.* got Linear"):
            make_loss("continuous", **{name: plain})
    with pytest.raises(ValueError, match="has 3 critics, but num_qvalue_nets is 2"):
        make_loss("continuous", qvalue_network=[critic(OBSERVATION, ACTION) for _ in range(3)])
    with pytest.raises(ValueError, match="all critics of qvalue_network must have the same parameters"):
        make_loss("continuous", qvalue_network=[critic(OBSERVATION, ACTION), critic(OBSERVATION, ACTION + 1)])


def test_a_loss_without_an_updater_warns_where_it_is_called(kind: str) -> None:
    loss, batch = make_loss(kind, updater=False), make_batch(kind)
    with pytest.warns(UserWarning, match="no SoftUpdate or HardUpdate") as caught:
        loss(batch)
    assert caught[0].filename == __file__
    loss.target_updater_attached()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(batch)


@pytest.mark.parametrize("space", ["one-hot", "one_hot", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_discrete_actions_of_every_form_give_the_same_losses(space: str | None, dtype: torch.dtype) -> None:
    categorical = make_loss("discrete")
    batch = make_batch("discrete", (3, 2))
    expected = categorical(batch.clone())
    column = batch.clone().set("action", batch["action"].unsqueeze(-1))
    torch.testing.assert_close(categorical(column), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if space is None else "error")
        one_hot = make_loss("discrete", action_space=space)
    one_hot.load_state_dict(categorical.state_dict())
    hot = batch.clone().set("action", nn.functional.one_hot(batch["action"], ACTIONS).to(dtype))
    torch.testing.assert_close(one_hot(hot), expected)


def test_a_distribution_over_one_hot_vectors_works_with_both_spaces() -> None:
    body = MLP(OBSERVATION, ACTIONS, (8,))
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(body, ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.OneHotCategorical),
    )
    reference = make_loss("discrete")
    loss = make_loss("discrete", actor_network=actor)
    body.load_state_dict(reference.actor_network[0].module.state_dict())
    batch = make_batch("discrete")
    torch.testing.assert_close(loss(batch.clone())["entropy"], reference(batch.clone())["entropy"])


def test_an_action_space_that_is_not_given_warns_and_means_one_hot() -> None:
    with pytest.warns(UserWarning, match="action_space was not given") as caught:
        loss = DiscreteIQLLoss(
            make_loss("discrete").actor_network, make_loss("discrete", num_qvalue_nets=1).qvalue_network
        )
    assert caught[0].filename == __file__
    assert loss.action_space == "one_hot"


@pytest.mark.parametrize("space", ["binary", "mult_one_hot", 3])
def test_an_unknown_action_space_is_refused(space: Any) -> None:
    with pytest.raises(ValueError, match="action_space must be 'categorical', 'one-hot'"):
        make_loss("discrete", action_space=space)


def test_the_discount_is_a_hyper_parameter_of_the_estimator(kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind)
    batch["next", "terminated"] = torch.ones_like(batch["next", "terminated"])
    terminal = loss(batch.clone())["loss_qvalue"]
    batch["next", "terminated"] = torch.zeros_like(batch["next", "terminated"])
    assert loss.make_value_estimator(gamma=0.0) is loss
    torch.testing.assert_close(loss(batch.clone())["loss_qvalue"], terminal)
    loss.make_value_estimator(loss.value_type, gamma=0.9)
    assert not torch.equal(loss(batch.clone())["loss_qvalue"], terminal)
    assert loss.value_estimator.gamma.item() == pytest.approx(0.9)


@pytest.mark.parametrize(
    "value_type", [ValueEstimators.GAE, ValueEstimators.VTrace, ValueEstimators.MAGAE, "gae", "nonsense", 3]
)
def test_other_estimators_are_not_implemented(value_type: Any) -> None:
    loss = make_loss("continuous")
    with pytest.raises(NotImplementedError, match="value_type must be one of TD0, TD1, TDLambda"):
        loss.make_value_estimator(value_type)
    assert loss.value_type is ValueEstimators.TD0


@pytest.mark.parametrize(
    ("value_type", "hyperparams", "error", "message"),
    [
        ("td0", {"gamma": 1.1}, ValueError, r"gamma must be in \[0, 1\]"),
        ("td0", {"lmbda": 0.9}, TypeError, "TD0 has no hyper-parameter lmbda"),
        ("tdlambda", {"lmbda": -0.1}, ValueError, "lmbda must be in"),
        ("td1", {"lambda_": 0.9}, TypeError, "it takes differentiable, gamma, time_dim"),
    ],
)
def test_a_wrong_hyper_parameter_of_an_estimator_is_refused(
    value_type: str, hyperparams: dict[str, float], error: type[Exception], message: str
) -> None:
    loss = make_loss("continuous")
    estimator = loss.value_estimator
    with pytest.raises(error, match=message):
        loss.make_value_estimator(value_type, **hyperparams)
    assert loss.value_estimator is estimator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_loss_does_not_round_the_discount(dtype: torch.dtype) -> None:
    loss = make_loss("continuous").to(dtype)
    assert loss.value_estimator.gamma.item() == pytest.approx(0.99, abs=1e-7)


@pytest.mark.parametrize("value_type", ["TD1", "TDLambda"])
def test_trajectory_estimators_refuse_shuffled_transitions(kind: str, value_type: str) -> None:
    loss = make_loss(kind)
    loss.make_value_estimator(ValueEstimators[value_type])
    batch = make_batch(kind, (6,))
    with pytest.raises(ValueError, match="needs trajectories"):
        loss(batch)
    named = batch.clone()
    named.names = ["time"]
    expected = loss(make_time_batch := named)["loss_qvalue"]
    assert make_time_batch.names == ["time"]
    loss.make_value_estimator(ValueEstimators[value_type], time_dim=0)
    torch.testing.assert_close(loss(batch)["loss_qvalue"], expected)


def test_time_may_be_any_dimension(kind: str) -> None:
    loss = make_loss(kind)
    loss.make_value_estimator("tdlambda")
    batch = make_batch(kind, (3, 4))
    expected = loss(batch.clone())
    loss.make_value_estimator("tdlambda", time_dim=0)
    torch.testing.assert_close(loss(batch.transpose(0, 1).clone()), expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=3), st.sampled_from(["continuous", "discrete"]))
def test_the_mean_losses_do_not_depend_on_the_shape_of_the_batch(shape: list[int], kind: str) -> None:
    loss, batch = make_loss(kind), make_batch(kind, tuple(shape))
    flat = batch.reshape(-1).clone()
    outputs = loss(batch)
    torch.testing.assert_close(outputs, loss(flat))
    assert batch["td_error"].shape == tuple(shape)
    torch.testing.assert_close(batch["td_error"].reshape(-1), flat["td_error"])


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.sampled_from(["continuous", "discrete"]))
def test_a_permutation_of_the_batch_permutes_what_is_written(order: list[int], kind: str) -> None:
    loss, batch = make_loss(kind, reduction="none"), make_batch(kind)
    permuted = batch[torch.tensor(order)].clone()
    outputs = loss(batch)
    torch.testing.assert_close(loss(permuted), outputs[torch.tensor(order)])
    torch.testing.assert_close(permuted["td_error"], batch["td_error"][order])


@settings(max_examples=25, deadline=None)
@given(st.floats(-1e8, 1e8), st.floats(-3, 3), st.sampled_from(["continuous", "discrete"]))
def test_losses_and_gradients_are_finite_for_any_finite_batch(scale: float, edge: float, kind: str) -> None:
    loss, batch = make_loss(kind, temperature=10.0), make_batch(kind)
    batch["next", "reward"] = batch["next", "reward"] * scale
    if kind == "continuous":
        batch["action"] = torch.full_like(batch["action"], edge)
    outputs = loss(batch)
    assert all(value.isfinite().all() for value in outputs.values())
    assert all(grad.isfinite().all() for grad in gradients(loss, outputs).values())


def test_temperature_zero_is_behaviour_cloning(kind: str) -> None:
    loss, batch = make_loss(kind, temperature=0.0), make_batch(kind)
    outputs = loss(batch)
    torch.testing.assert_close(outputs["loss_actor"], -batch["_log_prob"].mean())


def test_dropout_acts_in_training_mode_alone() -> None:
    actor = gaussian_actor(OBSERVATION, ACTION, dropout=0.5, hidden_sizes=(32,))
    loss, batch = make_loss("continuous", actor_network=actor), make_batch("continuous")
    assert not torch.equal(loss(batch)["loss_actor"], loss(batch)["loss_actor"])
    loss.eval()
    assert torch.equal(loss(batch)["loss_actor"], loss(batch)["loss_actor"])


@pytest.mark.parametrize("objective", ["expectile", "sparse", "exponential"])
def test_dropout_in_v_is_in_its_own_loss_alone(kind: str, objective: str) -> None:
    value = value_function(OBSERVATION, dropout=0.5, hidden_sizes=(32,))
    loss, batch = make_loss(kind, value_network=value, value_objective=objective), make_batch(kind)
    first, second = loss(batch.clone()), loss(batch.clone())
    alone, _ = loss.actor_loss(batch.clone())
    loss.eval()
    without = loss(batch.clone())
    assert not torch.equal(first["loss_value"], second["loss_value"])
    assert not torch.equal(first["loss_value"], without["loss_value"])
    for name in ("loss_actor", "loss_qvalue"):
        torch.testing.assert_close(first[name], without[name])
    torch.testing.assert_close(alone, without["loss_actor"])


def test_gradient_steps_lower_the_losses(kind: str) -> None:
    loss, batch = make_loss(kind, loss_function="l2"), make_batch(kind, (32,))
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-2)
    first = total(loss(batch)).item()
    for _ in range(100):
        optimiser.zero_grad()
        total(loss(batch)).backward()
        optimiser.step()
    assert total(loss(batch)).item() < first - 0.5


def test_a_functional_call_leaves_critics_that_share_a_module_with_value_as_they_were() -> None:
    trunk = nn.Linear(OBSERVATION, 8)
    features = TensorDictModule(trunk, in_keys=["observation"], out_keys=["features"])
    value = TensorDictSequential(features, TensorDictModule(nn.Linear(8, 1), ["features"], ["state_value"]))
    head = TensorDictModule(MLP(8 + ACTION, 1, (8,)), ["features", "action"], ["state_action_value"])
    critics = TensorDictSequential(features, head)
    loss = make_loss("continuous", qvalue_network=critics, value_network=value, num_qvalue_nets=1)
    batch = keywords(make_batch("continuous"))
    expected = loss(**batch)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in loss.named_parameters()}
    called = torch.func.functional_call(loss, zeros, kwargs=batch)
    assert not torch.equal(called[1], expected[1])
    torch.testing.assert_close(loss(**batch), expected)


def test_no_critic_at_all_is_refused_by_its_name() -> None:
    with pytest.raises(TypeError, match="qvalue_network must be a module or a list of them, got NoneType"):
        IQLLoss(gaussian_actor(3, 1), None, value_function(3))
