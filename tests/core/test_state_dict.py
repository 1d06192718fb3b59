"""Saving, loading, copying and showing the parameters of a loss; the exchange of state dicts with TorchRL."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchrl.objectives
from conftest import ACTION, ACTIONS, OBSERVATION, gradients, make_batch, make_loss, total
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import Tensor, nn

import iql_plugins
from iql_plugins import IQLLoss, SoftUpdate
from iql_plugins.networks import categorical_actor, critic, discrete_critic, gaussian_actor, value_function

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater has been associated:UserWarning")

HIDDEN = {"hidden_sizes": (8,)}
ESTIMATORS = ["TD0", "TDLambda"]


def make_torchrl_loss(kind: str, *, num_qvalue_nets: int = 2) -> Any:
    """TorchRL's loss over networks as those of ``make_loss``, with other weights."""
    value = value_function(OBSERVATION, **HIDDEN)
    if kind == "discrete":
        actor, qvalue = (
            categorical_actor(OBSERVATION, ACTIONS, **HIDDEN),
            discrete_critic(OBSERVATION, ACTIONS, **HIDDEN),
        )
        return torchrl.objectives.DiscreteIQLLoss(
            actor, qvalue, value, action_space="categorical", num_qvalue_nets=num_qvalue_nets
        )
    actor, qvalue = gaussian_actor(OBSERVATION, ACTION, **HIDDEN), critic(OBSERVATION, ACTION, **HIDDEN)
    return torchrl.objectives.IQLLoss(actor, qvalue, value, num_qvalue_nets=num_qvalue_nets)


def make_estimator(loss: Any, name: str, **hyperparams: float) -> None:
    package = iql_plugins if isinstance(loss, IQLLoss) else torchrl.objectives
    loss.make_value_estimator(getattr(package.ValueEstimators, name), **hyperparams)


def randomise(loss: nn.Module) -> None:
    """Draws all of a loss's networks anew, so that targets differ from critics."""
    with torch.no_grad():
        for name, tensor in loss.state_dict().items():
            if not name.startswith("_value_estimator"):
                tensor.normal_()


def saved(loss: nn.Module) -> dict[str, Tensor]:
    """A copy of a loss's state dict."""
    return {name: tensor.clone() for name, tensor in loss.state_dict().items()}


def contents(loss: IQLLoss) -> dict[str, Tensor]:
    """A copy of all that a loss holds, whether its state dict has it or not."""
    tensors = {**dict(loss.named_parameters()), **dict(loss.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()} | saved(loss)


def losses_of(loss: Any, kind: str) -> dict[str, Tensor]:
    """What a loss returns for a batch of trajectories, always the same one."""
    torch.manual_seed(1)
    return dict(loss(make_batch(kind, (3, 4))).items())


def assert_same_losses(first: Any, second: Any, kind: str) -> None:
    torch.testing.assert_close(losses_of(first, kind), losses_of(second, kind), rtol=1e-6, atol=1e-6)


# The exchange with TorchRL


@pytest.mark.parametrize("ours_used", [False, True], ids=["ours_new", "ours_used"])
@pytest.mark.parametrize("theirs_used", [False, True], ids=["theirs_new", "theirs_used"])
@pytest.mark.parametrize("estimator", [None, *ESTIMATORS])
@pytest.mark.parametrize("critics", [1, 2])
def test_a_state_dict_of_torchrl_loads_strictly_and_gives_its_losses(
    kind: str, critics: int, estimator: str | None, theirs_used: bool, ours_used: bool
) -> None:
    ours, theirs = make_loss(kind, num_qvalue_nets=critics), make_torchrl_loss(kind, num_qvalue_nets=critics)
    randomise(theirs)
    for loss, used in ((ours, ours_used), (theirs, theirs_used)):
        if estimator is not None:
            make_estimator(loss, estimator)
        if used:
            losses_of(loss, kind)
    result = ours.load_state_dict(saved(theirs), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_losses(ours, theirs, kind)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("estimator", [None, *ESTIMATORS])
@pytest.mark.parametrize("critics", [1, 2])
def test_torchrl_loads_our_state_dict_strictly_and_gives_our_losses(
    kind: str, critics: int, estimator: str | None, used: bool
) -> None:
    ours, theirs = make_loss(kind, num_qvalue_nets=critics), make_torchrl_loss(kind, num_qvalue_nets=critics)
    randomise(ours)
    for loss in (ours, theirs):
        if estimator is not None:
            make_estimator(loss, estimator)
        if used:
            losses_of(loss, kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    result = theirs.load_state_dict(saved(ours), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_losses(ours, theirs, kind)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_discount_is_taken_over_from_torchrls_state(kind: str, estimator: str) -> None:
    ours, theirs = make_loss(kind), make_torchrl_loss(kind)
    hyperparams = {"gamma": 0.5} | ({"lmbda": 0.25} if estimator == "TDLambda" else {})
    make_estimator(theirs, estimator, **hyperparams)
    make_estimator(ours, estimator)
    ours.load_state_dict(theirs.state_dict())
    assert {name: buffer.item() for name, buffer in ours.value_estimator.named_buffers()} == hyperparams
    assert_same_losses(ours, theirs, kind)


def test_an_estimator_that_a_state_dict_lacks_keeps_its_discount(kind: str) -> None:
    ours = make_loss(kind)
    make_estimator(ours, "TD0", gamma=0.5)
    ours.load_state_dict(make_torchrl_loss(kind).state_dict())
    assert ours.value_estimator.gamma.item() == 0.5


def test_a_state_dict_of_another_estimator_is_refused_with_a_hint(kind: str) -> None:
    theirs = make_torchrl_loss(kind)
    make_estimator(theirs, "TDLambda")
    with pytest.raises(RuntimeError, match=r"_value_estimator\.lmbda.*make_value_estimator"):
        make_loss(kind).load_state_dict(theirs.state_dict())


def test_a_single_critic_loads_the_shapes_of_torchrls_older_versions(kind: str) -> None:
    ours, theirs = make_loss(kind, num_qvalue_nets=1), make_torchrl_loss(kind, num_qvalue_nets=1)
    randomise(theirs)
    legacy = {name: tensor[None] if "qvalue_network" in name else tensor for name, tensor in saved(theirs).items()}
    ours.load_state_dict(legacy)
    assert_same_losses(ours, theirs, kind)


def test_an_updated_target_travels_in_the_state_dict(kind: str) -> None:
    ours = make_loss(kind)
    randomise(ours)
    SoftUpdate(ours, tau=0.3).step()
    other = make_loss(kind)
    other.load_state_dict(saved(ours))
    SoftUpdate(other, tau=0.3)
    torch.testing.assert_close(saved(other), saved(ours), rtol=0, atol=0)


# Refused state dicts


def without(key: str) -> Callable[[dict[str, Tensor]], str]:
    def change(state: dict[str, Tensor]) -> str:
        del state[key]
        return key

    return change


def with_unexpected(state: dict[str, Tensor]) -> str:
    state["qvalue_network_params.module.layers.9.weight"] = torch.zeros(1)
    return "qvalue_network_params.module.layers.9.weight"


def with_a_shape(key: str) -> Callable[[dict[str, Tensor]], str]:
    def change(state: dict[str, Tensor]) -> str:
        state[key] = torch.zeros(3, 3, 3, 3)
        return key

    return change


FIRST = "actor_network_params.module.0.module."
LAST = "target_qvalue_network_params.module.layers.2.bias"
MIDDLE = "qvalue_network_params.module.layers.0.weight"


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize(
    "change",
    [
        without(MIDDLE),
        without(LAST),
        without("value_network_params.module.layers.0.bias"),
        with_unexpected,
        with_a_shape(MIDDLE),
        with_a_shape(LAST),
    ],
    ids=["no_weight", "no_last", "no_value", "unexpected", "shape", "last_shape"],
)
def test_a_state_dict_that_does_not_fit_names_the_key_and_changes_nothing(
    kind: str, change: Callable[[dict[str, Tensor]], str], used: bool
) -> None:
    loss, other = make_loss(kind), make_loss(kind)
    randomise(other)
    if used:
        losses_of(loss, kind)
    before = contents(loss)
    state = saved(other)
    key = change(state)
    with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
        loss.load_state_dict(state)
    torch.testing.assert_close(contents(loss), before, rtol=0, atol=0)


def test_a_refused_load_leaves_the_given_state_dict_as_it_was(kind: str) -> None:
    state = saved(make_loss(kind))
    with_unexpected(state)
    keys = list(state)
    with pytest.raises(RuntimeError, match="unexpected"):
        make_loss(kind).load_state_dict(state)
    assert list(state) == keys


def test_a_load_leaves_the_given_state_dict_as_it_was(kind: str) -> None:
    state = saved(make_loss(kind))
    keys = list(state)
    make_loss(kind).load_state_dict(state)
    assert list(state) == keys


def test_a_load_that_is_not_strict_takes_what_fits_and_reports_the_rest(kind: str) -> None:
    loss, other = make_loss(kind), make_loss(kind)
    randomise(other)
    before, state = saved(loss), saved(other)
    missing = without(MIDDLE)(state)
    unexpected = with_unexpected(state)
    result = loss.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([missing], [unexpected])
    expected = saved(other) | {missing: before[missing]}
    torch.testing.assert_close(saved(loss), expected, rtol=0, atol=0)


def test_a_wrong_shape_is_refused_although_a_load_is_not_strict(kind: str) -> None:
    loss, other = make_loss(kind), make_loss(kind)
    randomise(other)
    before, state = contents(loss), saved(other)
    key = with_a_shape(LAST)(state)
    with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
        loss.load_state_dict(state, strict=False)
    torch.testing.assert_close(contents(loss), before, rtol=0, atol=0)


def test_a_load_that_is_refused_does_not_add_the_estimator_to_the_state_dict(kind: str) -> None:
    loss, other = make_loss(kind), make_loss(kind)
    losses_of(other, kind)
    state = saved(other)
    assert "_value_estimator.gamma" in state
    with_a_shape(MIDDLE)(state)
    with pytest.raises(RuntimeError, match="must have shape"):
        loss.load_state_dict(state)
    assert "_value_estimator.gamma" not in loss.state_dict()


def test_to_look_at_the_estimator_does_not_add_it_to_the_state_dict(kind: str) -> None:
    loss = make_loss(kind)
    before = list(loss.state_dict())
    assert loss.value_estimator.gamma.item() == pytest.approx(0.99)
    assert list(loss.state_dict()) == before
    loss.value_estimator.gamma.fill_(0.5)
    other = make_loss(kind)
    other.load_state_dict(loss.state_dict())
    assert other.value_estimator.gamma.item() == 0.5, "what was set is saved"
    loss = make_loss(kind)
    loss.make_value_estimator()
    assert "_value_estimator.gamma" in loss.state_dict()


# As part of a larger module


class Holder(nn.Module):
    """An algorithm that owns a loss and something else."""

    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.loss = make_loss(kind, **kwargs)
        self.later = nn.Linear(2, 2)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("critics", [1, 2])
def test_a_loss_inside_a_module_is_saved_and_loaded_with_it(kind: str, critics: int, used: bool) -> None:
    holder, other = Holder(kind, num_qvalue_nets=critics), Holder(kind, num_qvalue_nets=critics)
    randomise(other.loss)
    if used:
        losses_of(other.loss, kind)
    assert [key for key in other.state_dict() if key.startswith("loss.")] == [
        f"loss.{k}" for k in other.loss.state_dict()
    ]
    holder.load_state_dict(other.state_dict())
    torch.testing.assert_close(saved(holder), saved(other), rtol=0, atol=0)
    assert_same_losses(holder.loss, other.loss, kind)


@pytest.mark.parametrize("change", [without, with_a_shape])
def test_a_module_refuses_a_state_dict_that_does_not_fit_its_loss(
    kind: str, change: Callable[[str], Callable[[dict[str, Tensor]], str]]
) -> None:
    holder = Holder(kind)
    state = saved(Holder(kind))
    key = change(f"loss.{MIDDLE}")(state)
    with pytest.raises(RuntimeError, match=key.removeprefix("loss.").replace(".", r"\.")):
        holder.load_state_dict(state)


def test_a_module_refuses_an_unexpected_key_of_its_loss(kind: str) -> None:
    holder = Holder(kind)
    state = saved(holder)
    state["loss.qvalue_network_params.module.nothing"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"qvalue_network_params\.module\.nothing"):
        holder.load_state_dict(state)


# Tied critics


class Torso(nn.Module):
    """A critic's layers over a trunk that it may share."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(8, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.head(self.trunk(torch.cat([observation, action], -1)).tanh())


def shared_trunk_critics(count: int = 2) -> list[nn.Module]:
    trunk = nn.Linear(OBSERVATION + ACTION, 8)
    return [
        TensorDictModule(Torso(trunk), in_keys=["observation", "action"], out_keys=["state_action_value"])
        for _ in range(count)
    ]


def shared_trunk_loss(separate_losses: bool) -> IQLLoss:
    """A loss whose actor and V share their first layer."""
    actor, value = categorical_actor(OBSERVATION, ACTIONS, **HIDDEN), value_function(OBSERVATION, **HIDDEN)
    value.module.layers[0] = actor.module[0].module.layers[0]
    return make_loss("discrete", actor_network=actor, value_network=value, separate_losses=separate_losses)


def tied_loss(count: int = 2) -> IQLLoss:
    """A loss whose critics are one and the same."""
    return make_loss(
        "continuous", qvalue_network=[critic(OBSERVATION, ACTION, **HIDDEN)] * count, num_qvalue_nets=count
    )


def test_a_critic_given_twice_is_kept_once_and_trained() -> None:
    qvalue = critic(OBSERVATION, ACTION, **HIDDEN)
    loss = make_loss("continuous", qvalue_network=[qvalue, qvalue])
    own = {name: p for name, p in loss.named_parameters() if name.startswith("qvalue_network_params")}
    assert {name: p.shape for name, p in own.items()} == {
        f"qvalue_network_params.{name}": p.shape for name, p in qvalue.named_parameters()
    }
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in own.items()}
    total(loss(make_batch("continuous"))).backward()
    optimizer.step()
    assert all(not torch.equal(own[name], before[name]) for name in own)


@pytest.mark.parametrize("count", [2, 3])
def test_the_gradient_of_a_tied_critic_is_that_of_all_its_uses(count: int) -> None:
    loss = tied_loss(count)
    single = make_loss("continuous", num_qvalue_nets=1)
    single.load_state_dict({key: t[0] if "qvalue" in key else t for key, t in saved(loss).items()})
    batch = make_batch("continuous")
    of_tied = gradients(loss, loss(batch.copy()), lambda outputs: outputs["loss_qvalue"])
    of_single = gradients(single, single(batch.copy()), lambda outputs: outputs["loss_qvalue"])
    torch.testing.assert_close(of_tied, {name: count * grad for name, grad in of_single.items()})


def test_tied_critics_are_saved_contiguously_for_each_critic_and_loaded_back() -> None:
    loss, other = tied_loss(), tied_loss()
    state = loss.state_dict()
    assert all(t.shape[0] == 2 and t.is_contiguous() for key, t in state.items() if "qvalue_network" in key)
    state = saved(loss)
    for key, tensor in state.items():
        state[key] = tensor + 1
    other.load_state_dict(state)
    torch.testing.assert_close(saved(other), state, rtol=0, atol=0)


def test_tied_critics_load_the_state_dict_of_torchrls() -> None:
    qvalue = critic(OBSERVATION, ACTION, **HIDDEN)
    actor, value = gaussian_actor(OBSERVATION, ACTION, **HIDDEN), value_function(OBSERVATION, **HIDDEN)
    theirs = torchrl.objectives.IQLLoss(actor, [qvalue, qvalue], value)
    ours = tied_loss()
    ours.load_state_dict(saved(theirs))
    assert_same_losses(ours, theirs, "continuous")


def test_critics_that_differ_are_refused_by_tied_ones_and_change_nothing() -> None:
    loss = tied_loss()
    before = contents(loss)
    state = {key: tensor + 1 for key, tensor in saved(loss).items()}
    state[MIDDLE][1] += 1
    with pytest.raises(RuntimeError, match=MIDDLE.replace(".", r"\.")):
        loss.load_state_dict(state)
    torch.testing.assert_close(contents(loss), before, rtol=0, atol=0)


def test_targets_of_tied_critics_follow_them() -> None:
    loss = tied_loss()
    with torch.no_grad():
        for parameter in loss.qvalue_network.parameters():
            parameter.add_(1.0)
    SoftUpdate(loss, tau=1.0).step()
    state = loss.state_dict()
    for key in state:
        if key.startswith("qvalue_network_params"):
            torch.testing.assert_close(state[f"target_{key}"], state[key], rtol=0, atol=0)


def test_critics_that_share_a_trunk_keep_and_train_it_once() -> None:
    critics = shared_trunk_critics(3)
    loss = make_loss("continuous", qvalue_network=critics, num_qvalue_nets=3)
    shapes = {name: tuple(p.shape) for name, p in loss.named_parameters() if name.startswith("qvalue_network_params")}
    assert shapes == {
        "qvalue_network_params.module.trunk.weight": (8, OBSERVATION + ACTION),
        "qvalue_network_params.module.trunk.bias": (8,),
        "qvalue_network_params.module.head.weight": (3, 1, 8),
        "qvalue_network_params.module.head.bias": (3, 1),
    }
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    before = saved(loss)
    total(loss(make_batch("continuous"))).backward()
    optimizer.step()
    after = loss.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in after if key.startswith("qvalue_network_params"))


def test_critics_that_share_a_trunk_are_saved_and_loaded_as_torchrls() -> None:
    critics = shared_trunk_critics()
    actor, value = gaussian_actor(OBSERVATION, ACTION, **HIDDEN), value_function(OBSERVATION, **HIDDEN)
    theirs = torchrl.objectives.IQLLoss(actor, critics, value)
    ours = make_loss("continuous", qvalue_network=shared_trunk_critics())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(saved(theirs))
    assert_same_losses(ours, theirs, "continuous")
    torch.testing.assert_close(saved(ours), saved(theirs), rtol=0, atol=0)


# Copies


@pytest.mark.parametrize("make", [make_loss, lambda kind: tied_loss()], ids=["stacked", "tied"])
def test_a_copied_optimiser_trains_the_copied_loss_and_not_the_original(make: Callable[[str], IQLLoss]) -> None:
    loss = make("continuous")
    holder = {
        "loss": loss,
        "optimizer": torch.optim.SGD(loss.parameters(), lr=0.1),
        "updater": SoftUpdate(loss, tau=0.5),
    }
    original = saved(loss)
    copied = copy.deepcopy(holder)
    torch.testing.assert_close(saved(copied["loss"]), original, rtol=0, atol=0)
    total(copied["loss"](make_batch("continuous"))).backward()
    copied["optimizer"].step()
    copied["updater"].step()
    trained = {
        key: not torch.equal(t, original[key]) for key, t in copied["loss"].state_dict().items() if key in original
    }
    assert all(trained.values()), trained
    torch.testing.assert_close({key: loss.state_dict()[key] for key in original}, original, rtol=0, atol=0)


@pytest.mark.parametrize("separate_losses", [False, True])
def test_a_copy_of_a_loss_shares_modules_as_the_original_does(separate_losses: bool) -> None:
    loss = shared_trunk_loss(separate_losses)
    copied = copy.deepcopy(loss)
    torch.testing.assert_close(contents(copied), contents(loss), rtol=0, atol=0)
    assert {id(parameter) for parameter in copied.parameters()}.isdisjoint(id(p) for p in loss.parameters())
    batch = make_batch("discrete")
    torch.testing.assert_close(gradients(copied, copied(batch.copy())), gradients(loss, loss(batch.copy())))


@pytest.mark.parametrize("make", [make_loss, lambda kind: tied_loss()], ids=["stacked", "tied"])
def test_a_pickled_loss_gives_the_same_losses(make: Callable[[str], IQLLoss]) -> None:
    loss = make("continuous")
    make_estimator(loss, "TDLambda", gamma=0.5, lmbda=0.25)
    loss.set_keys(priority="prio")
    loaded = pickle.loads(pickle.dumps(loss))
    assert loaded.tensor_keys == loss.tensor_keys
    torch.testing.assert_close(contents(loaded), contents(loss), rtol=0, atol=0)
    assert_same_losses(loaded, loss, "continuous")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_moves_parameters_and_targets_to_a_dtype_and_keeps_the_discount(kind: str, dtype: torch.dtype) -> None:
    loss = make_loss(kind).to(dtype)
    assert {tensor.dtype for tensor in loss.state_dict().values()} == {dtype}
    assert loss.value_estimator.gamma.item() == pytest.approx(0.99, abs=1e-7)


def test_a_moved_loss_is_trained_by_an_optimiser_of_its_parameters(kind: str, device: torch.device) -> None:
    loss = make_loss(kind).to(device)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    before = saved(loss)
    batch = make_batch(kind, device=device)
    total(loss(batch)).backward()
    optimizer.step()
    state = loss.state_dict()
    assert all(torch.equal(state[key], before[key]) == key.startswith("target_") for key in before)


# Initialisation


@pytest.mark.parametrize("copied", [None, True, False])
@pytest.mark.parametrize("name", ["actor_network", "value_network", "qvalue_network", "target_qvalue_network"])
def test_a_stateful_net_holds_the_tensors_of_the_loss(kind: str, name: str, copied: bool | None) -> None:
    loss = make_loss(kind)
    network = loss.get_stateful_net(name, copy=copied)
    with torch.no_grad():
        for _, tensor in (*network.named_parameters(), *network.named_buffers()):
            tensor.fill_(0.125)
    changed = {key for key, tensor in loss.state_dict().items() if (tensor == 0.125).all()}
    assert changed == {key for key in loss.state_dict() if key.startswith(f"{name}_params.")}


@pytest.mark.parametrize("name", ["actor_network", "value_network", "qvalue_network", "target_qvalue_network"])
def test_from_stateful_net_takes_the_values_of_a_network(kind: str, name: str) -> None:
    loss, other = make_loss(kind), make_loss(kind)
    randomise(other)
    before = saved(loss)
    loss.from_stateful_net(name, other.get_stateful_net(name))
    expected = {key: other.state_dict()[key] if key.startswith(f"{name}_params.") else t for key, t in before.items()}
    torch.testing.assert_close(saved(loss), expected, rtol=0, atol=0)


def test_a_stateful_net_that_does_not_fit_is_refused_and_changes_nothing(kind: str) -> None:
    loss = make_loss(kind)
    before = contents(loss)
    with pytest.raises(RuntimeError, match=r"value_network.*module\.layers\.0\.weight must have shape"):
        loss.from_stateful_net("value_network", value_function(OBSERVATION, hidden_sizes=(3,)))
    with pytest.raises(RuntimeError, match=r"value_network.*module\.layers\.4\.weight"):
        loss.from_stateful_net("value_network", value_function(OBSERVATION, hidden_sizes=(8, 8)))
    torch.testing.assert_close(contents(loss), before, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["get_stateful_net", "from_stateful_net"])
def test_an_unknown_network_name_is_refused(kind: str, method: str) -> None:
    arguments = [] if method == "get_stateful_net" else [nn.Linear(1, 1)]
    with pytest.raises(ValueError, match=r"network_name must be one of actor_network, .*'critic'"):
        getattr(make_loss(kind), method)("critic", *arguments)


@pytest.mark.parametrize("critics", [1, 2, 3])
def test_resetting_draws_each_critic_differently_and_copies_them_into_the_targets(kind: str, critics: int) -> None:
    loss = make_loss(kind, num_qvalue_nets=critics)
    before = saved(loss)
    loss.reset_parameters_recursive()
    after = loss.state_dict()
    weights = [key for key in after if key.endswith("weight")]
    assert not any(torch.equal(after[key], before[key]) for key in weights)
    for key in weights:
        if critics > 1 and "qvalue_network" in key:
            assert len({tuple(critic.flatten().tolist()) for critic in after[key]}) == critics
    for key in after:
        if key.startswith("qvalue_network_params"):
            assert torch.equal(after[f"target_{key}"], after[key])


def test_resetting_tied_critics_draws_one_for_all() -> None:
    loss = tied_loss()
    before = saved(loss)
    loss.reset_parameters_recursive()
    after = loss.state_dict()
    assert not torch.equal(after[MIDDLE], before[MIDDLE])
    assert torch.equal(after[MIDDLE][0], after[MIDDLE][1])
    assert torch.equal(after[f"target_{MIDDLE}"], after[MIDDLE])


def test_resetting_critics_that_share_a_trunk_draws_the_trunk_anew_and_each_head_differently() -> None:
    loss = make_loss("continuous", qvalue_network=shared_trunk_critics())
    before = saved(loss)
    loss.reset_parameters_recursive()
    after = loss.state_dict()
    trunk, head = (f"qvalue_network_params.module.{name}.weight" for name in ("trunk", "head"))
    assert not torch.equal(after[trunk], before[trunk])
    assert torch.equal(after[trunk][0], after[trunk][1])
    assert not torch.equal(after[head][0], after[head][1])


@pytest.mark.parametrize("critics", [2, 4])
def test_a_single_critic_is_duplicated_with_weights_of_their_own(kind: str, critics: int) -> None:
    weight = make_loss(kind, num_qvalue_nets=critics).state_dict()[MIDDLE]
    assert len({tuple(critic.flatten().tolist()) for critic in weight}) == critics


# TorchRL's view of the parameters


@pytest.mark.parametrize("name", ["actor_network", "value_network", "qvalue_network", "target_qvalue_network"])
@pytest.mark.parametrize("critics", [1, 2])
def test_the_view_of_a_network_has_torchrls_entries(kind: str, critics: int, name: str) -> None:
    ours = getattr(make_loss(kind, num_qvalue_nets=critics), f"{name}_params")
    theirs = getattr(make_torchrl_loss(kind, num_qvalue_nets=critics), f"{name}_params")
    assert isinstance(ours, TensorDictParams)
    assert ours.batch_size == theirs.batch_size == torch.Size([critics] if critics > 1 and "qvalue" in name else [])
    shapes = [{key: t.shape for key, t in view.items(True, True)} for view in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_a_change_in_place_through_a_view_reaches_the_loss(kind: str) -> None:
    loss = make_loss(kind)
    before = losses_of(loss, kind)
    loss.qvalue_network_params.data.mul_(2.0)
    after = losses_of(loss, kind)
    assert not torch.equal(after["loss_qvalue"], before["loss_qvalue"])
    assert torch.equal(after["loss_value"], before["loss_value"])
    loss.target_qvalue_network_params.data.mul_(2.0)
    assert not torch.equal(losses_of(loss, kind)["loss_value"], before["loss_value"])


@pytest.mark.parametrize("name", ["actor_network", "value_network", "qvalue_network", "target_qvalue_network"])
def test_an_entry_of_a_view_cannot_be_replaced(kind: str, name: str) -> None:
    loss = make_loss(kind)
    view = getattr(loss, f"{name}_params")
    key = next(iter(view.keys(True, True)))
    before = contents(loss)
    with pytest.raises(RuntimeError, match=r"lock|replaced"):
        view[key] = torch.zeros_like(view[key])
    with pytest.raises(RuntimeError, match=r"lock|replaced"):
        view.set(key, torch.zeros_like(view[key]))
    with pytest.raises(RuntimeError, match=r"lock|replaced"):
        del view[key]
    torch.testing.assert_close(contents(loss), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["qvalue_network_params", "target_qvalue_network_params", "value_network"])
def test_a_network_cannot_be_replaced_by_assignment(kind: str, name: str) -> None:
    loss = make_loss(kind)
    before = contents(loss)
    with pytest.raises((AttributeError, RuntimeError), match=name):
        setattr(loss, name, getattr(make_loss(kind), name))
    torch.testing.assert_close(contents(loss), before, rtol=0, atol=0)


def test_only_the_targets_view_has_no_gradient(kind: str) -> None:
    loss = make_loss(kind)
    for name in ("actor_network", "value_network", "qvalue_network"):
        assert all(tensor.requires_grad for tensor in getattr(loss, f"{name}_params").values(True, True))
        assert not any(t.requires_grad for t in getattr(loss, f"target_{name}_params").values(True, True))


def test_networks_without_a_target_show_their_own_values_as_target(kind: str) -> None:
    loss = make_loss(kind)
    with torch.no_grad():
        for parameter in loss.value_network.parameters():
            parameter.fill_(0.5)
    assert all((tensor == 0.5).all() for tensor in loss.target_value_network_params.values(True, True))


def test_parameters_of_a_view_exclude_what_the_actor_trains_alone() -> None:
    for separate_losses, count in ((False, 4), (True, 2)):
        loss = shared_trunk_loss(separate_losses)
        of_actor, of_value = (
            {id(parameter) for parameter in getattr(loss, f"{name}_params").parameters()}
            for name in ("actor_network", "value_network")
        )
        assert (len(of_actor), len(of_value)) == (4, count)
        assert len(of_actor & of_value) == count - 2


def test_views_are_cloned_indexed_applied_and_swapped_into_modules_as_torchrls(kind: str) -> None:
    loss = make_loss(kind)
    view, state = loss.qvalue_network_params, saved(loss)
    first = view[0]
    assert first.batch_size == torch.Size([])
    assert torch.equal(first["module", "layers", "0", "weight"], state[MIDDLE][0])
    assert not view.data["module", "layers", "0", "weight"].requires_grad
    cloned = view.data.clone().zero_()
    assert cloned["module", "layers", "0", "weight"].shape == state[MIDDLE].shape
    doubled = view.apply(lambda tensor: tensor.detach() * 2)
    assert torch.equal(doubled["module", "layers", "0", "weight"], state[MIDDLE] * 2)
    batch = make_batch(kind)
    single = (
        discrete_critic(OBSERVATION, ACTIONS, **HIDDEN) if kind == "discrete" else critic(OBSERVATION, ACTION, **HIDDEN)
    )
    with first.to_module(single):
        value = single(batch.copy())["state_action_value"]
    with torch.no_grad():
        for parameter, source in zip(single.parameters(), view[0].values(True, True), strict=True):
            parameter.copy_(source)
    torch.testing.assert_close(single(batch.copy())["state_action_value"], value)
    torch.testing.assert_close(saved(loss), state, rtol=0, atol=0)


def test_a_clone_of_a_view_is_not_the_losss(kind: str) -> None:
    loss = make_loss(kind)
    state = saved(loss)
    loss.value_network_params.clone().data.zero_()
    torch.testing.assert_close(saved(loss), state, rtol=0, atol=0)


def test_gradients_of_a_view_are_those_of_the_loss(kind: str) -> None:
    loss = make_loss(kind)
    total(loss(make_batch(kind))).backward()
    grads = loss.qvalue_network_params.grad
    assert torch.equal(grads["module", "layers", "0", "weight"], dict(loss.named_parameters())[MIDDLE].grad)


@pytest.mark.parametrize("assign", [False, True])
def test_a_load_keeps_shared_networks_shared(assign: bool) -> None:
    loss, source = shared_trunk_loss(True), shared_trunk_loss(True)
    names = [name for name, _ in loss.named_parameters()]
    loss.load_state_dict(saved(source), assign=assign)
    assert [name for name, _ in loss.named_parameters()] == names
    trunk = [loss.actor_network[0].module.layers[0], loss.value_network.module.layers[0]]
    assert trunk[0].weight is trunk[1].weight


def test_a_state_dict_in_which_shared_tensors_differ_is_refused() -> None:
    loss = shared_trunk_loss(True)
    before, bad = saved(loss), saved(shared_trunk_loss(True))
    bad["value_network_params.module.layers.0.weight"] += 1
    with pytest.raises(
        RuntimeError, match=r"differs in actor_network_params\..* and value_network_params\..*one tensor"
    ):
        loss.load_state_dict(bad)
    for name, tensor in loss.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_shared_networks_stay_shared_when_a_loss_leaves_the_meta_device() -> None:
    with torch.device("meta"):
        loss = shared_trunk_loss(True)
    loss.to_empty(device="cpu")
    source = shared_trunk_loss(True)
    loss.load_state_dict(source.state_dict())
    assert loss.actor_network[0].module.layers[0].weight is loss.value_network.module.layers[0].weight
    batch = make_batch("discrete")
    torch.testing.assert_close(loss(batch.clone()), source(batch.clone()))
    assert loss.value_estimator.gamma.item() == pytest.approx(0.99)


def test_a_loss_inside_a_module_is_loaded_whole_or_not_at_all() -> None:
    holder = nn.ModuleDict({"loss": make_loss("continuous")})
    state = {name: tensor + 1 for name, tensor in holder.state_dict().items()}
    del state["loss.qvalue_network_params.module.layers.0.weight"]
    before = contents(holder["loss"])
    with pytest.raises(RuntimeError, match=r"it has no qvalue_network_params\.module\.layers\.0\.weight"):
        holder.load_state_dict(state)
    for name, tensor in contents(holder["loss"]).items():
        assert torch.equal(tensor, before[name])
    assert holder.load_state_dict({}, strict=False).missing_keys


def test_buffers_that_only_torchrl_saves_are_passed_over() -> None:
    actor = gaussian_actor(OBSERVATION, ACTION, low=torch.full((ACTION,), -2.0), high=torch.full((ACTION,), 2.0))
    loss = make_loss("continuous", actor_network=actor)
    assert not any(name.endswith("low") for name in loss.state_dict())
    state = saved(loss) | {"actor_network_params.module.1.low": torch.zeros(ACTION)}
    loss.load_state_dict(state)
    assert loss.actor_network[1].low[0] == -2.0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda q: setattr(q, "in_keys", ["action", "observation"]), "in_keys"),
        (lambda q: q.requires_grad_(False), "trainable parameters"),
        (lambda q: q.module.layers.__setitem__(1, nn.Tanh()), "modules"),
    ],
)
def test_critics_that_one_module_cannot_stand_for_are_refused(change: Callable[[Any], Any], what: str) -> None:
    critics = [critic(OBSERVATION, ACTION, **HIDDEN) for _ in range(2)]
    change(critics[1])
    with pytest.raises(ValueError, match=f"all critics of qvalue_network must have the same {what}"):
        make_loss("continuous", qvalue_network=critics)
