"""The losses as TorchRL's ``LossModule``: in the place of TorchRL's own, with all that TorchRL does to a loss."""

import copy
import doctest
import importlib.util
import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchrl.data.replay_buffers.samplers.prioritized as prioritized
import torchrl.objectives
from conftest import gradients, keywords, make_batch, total
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    NormalParamExtractor,
    TensorDictModule,
    TensorDictSequential,
    composite_lp_aggregate,
    set_composite_lp_aggregate,
)
from torch import Tensor, nn
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    MultiStep,
    OneHot,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.envs import (
    CatTensors,
    Compose,
    ExplorationType,
    PendulumEnv,
    StepCounter,
    TransformedEnv,
    UnsqueezeTransform,
    set_exploration_type,
)
from torchrl.envs.utils import exploration_type
from torchrl.modules import (
    IndependentNormal,
    LSTMModule,
    ProbabilisticActor,
    ValueOperator,
    recurrent_mode,
)
from torchrl.objectives import HardUpdate, LossModule, SoftUpdate, ValueEstimators
from torchrl.objectives.value import TD0Estimator, TD1Estimator, TDLambdaEstimator, ValueEstimatorBase
from torchrl_helpers import (
    ACTION,
    ACTIONS,
    KINDS,
    NESTED,
    OBSERVATION,
    RENAMED,
    JoinedSequential,
    assert_equal_results,
    batch_of,
    multi_agent_batch,
    multi_agent_networks,
    torchrl_networks,
)

import iql_plugins
import iql_torchrl
import iql_torchrl.losses
from iql_torchrl import plugin

ROOT = Path(__file__).parents[2]
Networks = tuple[nn.Module, nn.Module, nn.Module]


def make_loss(package: Any, kind: str = "continuous", networks: Networks | None = None, **kwargs: Any) -> Any:
    """A loss of ``torchrl.objectives`` or of ``iql_torchrl``."""
    if kind != "continuous":
        kwargs.setdefault("action_space", kind)
    name = "IQLLoss" if kind == "continuous" else "DiscreteIQLLoss"
    return getattr(package, name)(*(networks or torchrl_networks(kind)), **kwargs)


def pair(
    kind: str = "continuous", networks: Callable[[], Networks] | None = None, *, updated: bool = True, **kwargs: Any
) -> tuple[Any, Any]:
    """Our loss and TorchRL's, of equal weights, with targets that differ from the critics."""
    losses = tuple(
        make_loss(package, kind, networks() if networks else None, **kwargs)
        for package in (iql_torchrl, torchrl.objectives)
    )
    state = losses[0].state_dict()
    for key, tensor in state.items():
        if key.startswith("target_"):
            state[key] = tensor + 0.1 * torch.randn_like(tensor)
    for loss in losses:
        loss.load_state_dict(state)
        if updated:
            loss._has_update_associated["qvalue_network"] = True
    return losses


def renamed_batch(batch: TensorDict, **names: str) -> TensorDict:
    batch = batch.copy()
    for name, other in names.items():
        batch["next", other] = batch["next"].pop(name)
    return batch


# What it is


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_loss_modules_and_the_cores(kind: str) -> None:
    loss = make_loss(iql_torchrl, kind)
    assert isinstance(loss, LossModule)
    assert isinstance(loss, iql_torchrl.IQLLoss)
    assert isinstance(loss, iql_plugins.IQLLoss)
    assert isinstance(loss, iql_plugins.DiscreteIQLLoss) == (kind != "continuous")


@pytest.mark.parametrize("name", ["IQLLoss", "DiscreteIQLLoss"])
@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning", "ignore:action_space was not:UserWarning")
def test_torchrls_own_examples_run_with_nothing_but_the_import_changed(name: str) -> None:
    documentation = inspect.getdoc(getattr(torchrl.objectives, name))
    assert documentation is not None
    source = documentation.replace("from torchrl.objectives.iql import", "from iql_torchrl import")
    test = doctest.DocTestParser().get_doctest(source, {}, name, None, None)
    results = doctest.DocTestRunner(verbose=False).run(test, clear_globs=False)
    assert results.attempted > 30
    assert results.failed == 0
    assert type(test.globs["loss"]) is getattr(iql_torchrl, name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_attributes_that_users_read_are_torchrls(kind: str) -> None:
    ours, theirs = pair(kind)
    for name in ("actor_network", "qvalue_network", "value_network"):
        assert isinstance(getattr(ours, name), nn.Module)
        for prefix in ("", "target_"):
            params, expected = (getattr(loss, f"{prefix}{name}_params") for loss in (ours, theirs))
            assert params.batch_size == expected.batch_size
            assert set(params.keys(True, True)) == set(expected.keys(True, True))
            torch.testing.assert_close(params.data.to_dict(), expected.data.to_dict())
    for name in (
        "temperature", "expectile", "loss_function", "reduction", "num_qvalue_nets", "deactivate_vmap", "delay_qvalue",
        "scalar_output_mode", "loss_mask_key", "default_value_estimator", "SUPPORTED_VALUE_ESTIMATORS", "value_type",
        "deterministic_sampling_mode", "functional", "out_keys", "use_prioritized_weights",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in vars(theirs.tensor_keys):
        assert getattr(ours.tensor_keys, name) == getattr(theirs.tensor_keys, name)
    assert vars(ours.value_estimator.tensor_keys) == vars(theirs.value_estimator.tensor_keys)
    assert ours.value_estimator.gamma == theirs.value_estimator.gamma
    if kind != "continuous":
        assert ours.action_space == theirs.action_space


def test_optimisers_of_the_parameters_that_are_shown_train_the_loss() -> None:
    loss, _ = pair()
    before = {name: parameter.clone() for name, parameter in loss.named_parameters()}
    shown = [
        *loss.actor_network_params.flatten_keys().values(),
        *loss.qvalue_network_params.values(True, True),
        *loss.value_network_params.flatten_keys().values(),
    ]
    optimizer = torch.optim.Adam(shown, lr=0.1)
    total(loss(batch_of("continuous"))).backward()
    optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in loss.named_parameters())


# The losses


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("estimator", "shape"), [("TD0", (4,)), ("TD1", (2, 3)), ("TDLambda", (2, 3))])
@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_written_entries_equal_torchrls(
    kind: str, critics: int, estimator: str, shape: tuple[int, ...], reduction: str
) -> None:
    losses = pair(
        kind, num_qvalue_nets=critics, expectile=0.7, temperature=3.0, reduction=reduction, scalar_output_mode="exclude"
    )
    for loss in losses:
        loss.make_value_estimator(ValueEstimators[estimator], gamma=0.9)
        loss.double()
    assert_equal_results(losses, batch_of(kind, shape, torch.float64), 1e-10)


@pytest.mark.parametrize("separate_losses", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trunk_that_actor_and_value_share_is_trained_as_in_torchrl(kind: str, separate_losses: bool) -> None:
    losses = pair(kind, lambda: torchrl_networks(kind, shared=True), separate_losses=separate_losses)
    assert_equal_results(losses, batch_of(kind))


@pytest.mark.parametrize("name", ["actor_loss", "qvalue_loss", "value_loss"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_alone_equals_torchrls(kind: str, name: str) -> None:
    losses = pair(kind)
    batch = batch_of(kind)
    (ours, _), (theirs, _) = (getattr(loss, name)(batch.copy()) for loss in losses)
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (gradients(loss, value, lambda x: x) for loss, value in zip(losses, (ours, theirs), strict=True))
    torch.testing.assert_close(ours, theirs)


def test_a_batch_without_terminated_is_refused() -> None:
    loss, _ = pair()
    batch = batch_of("continuous")
    del batch["next", "terminated"]
    with pytest.raises(KeyError, match="terminated"):
        loss(batch)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("one-hot", OneHot(ACTIONS)), ("categorical", Categorical(ACTIONS)), ("categorical", "composite")],
)
def test_an_action_space_may_be_torchrls_spec(kind: str, spec: Any) -> None:
    space = Composite(action=Categorical(ACTIONS)) if spec == "composite" else spec
    losses = pair(kind, action_space=space)
    assert_equal_results(losses, batch_of(kind))


# TorchRL's modes


class Recorder(nn.Module):
    """Notes the modes that are in force when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: set[Any] = set()

    def forward(self, *inputs: Tensor) -> Tensor:
        self.modes.add((exploration_type(), recurrent_mode()))
        return inputs[0]


@pytest.mark.parametrize("name", ["forward", "actor_loss", "qvalue_loss", "value_loss"])
@pytest.mark.parametrize("mode", [None, ExplorationType.MEAN])
@pytest.mark.parametrize("kind", ["continuous", "categorical"])
def test_calls_run_in_the_losss_exploration_type_and_in_recurrent_mode(
    kind: str, mode: ExplorationType | None, name: str
) -> None:
    recorder = Recorder()
    actor, qvalue, value = torchrl_networks(kind)
    networks = [
        TensorDictSequential(TensorDictModule(recorder, in_keys=["observation"], out_keys=["observation"]), network)
        for network in (qvalue, value)
    ]
    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(recorder, actor[0].module), ["observation"], actor[0].out_keys),
        in_keys=actor[0].out_keys,
        distribution_class=actor[-1].distribution_class,
    )
    loss = make_loss(iql_torchrl, kind, (actor, *networks))
    SoftUpdate(loss, tau=0.1)
    if mode is not None:
        loss.deterministic_sampling_mode = mode
    with set_exploration_type(ExplorationType.RANDOM):
        getattr(loss, name)(batch_of(kind))
        assert exploration_type() == ExplorationType.RANDOM
    assert recorder.modes == {(mode or ExplorationType.DETERMINISTIC, True)}
    assert not recurrent_mode()


def recurrent_networks() -> Networks:
    """An actor and a V with an LSTM each."""
    qvalue = torchrl_networks("continuous")[1]
    keys = {"actor": ["recurrent_h", "recurrent_c"], "value": ["value_h", "value_c"]}
    lstms = [
        LSTMModule(
            input_size=OBSERVATION,
            hidden_size=4,
            in_keys=["observation", *names],
            out_keys=[f"{network}_features", *(("next", name) for name in names)],
        )
        for network, names in keys.items()
    ]
    head = nn.Sequential(nn.Linear(4, 2 * ACTION), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictSequential(lstms[0], TensorDictModule(head, ["actor_features"], ["loc", "scale"])),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    value = TensorDictSequential(lstms[1], ValueOperator(nn.Linear(4, 1), in_keys=["value_features"]))
    return actor, qvalue, value


@pytest.mark.parametrize("bounded", [True, False])
def test_critics_are_asked_about_the_policys_action_within_its_spec(bounded: bool) -> None:
    head = nn.Linear(OBSERVATION, 2 * ACTION)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 5.0)
    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(head, NormalParamExtractor()), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-1.0, 1.0, (ACTION,)) if bounded else None,
        distribution_class=IndependentNormal,
    )
    asked = []

    class Critic(nn.Linear):
        def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
            asked.append(action)
            return super().forward(torch.cat([observation, action], -1))

    qvalue = ValueOperator(Critic(OBSERVATION + ACTION, 1), in_keys=["observation", "action"])
    networks = actor, qvalue, torchrl_networks("continuous")[2]
    loss = make_loss(iql_torchrl, "continuous", networks, policy_extraction="ddpg_bc")
    loss.target_updater_attached()
    loss(batch_of("continuous"))
    assert max(action.max().item() for action in asked) == (1.0 if bounded else 5.0)
    asked.clear()
    loss.to("meta")(batch_of("continuous").to("meta"))
    assert all(action.is_meta for action in asked)
    assert all(bound.is_meta for bounds in loss._action_bounds.values() for bound in bounds)


def test_recurrent_networks_run_over_trajectories_as_in_torchrl() -> None:
    losses = pair(networks=recurrent_networks)
    batch = batch_of("continuous", (2, 7))
    is_init = torch.zeros(2, 7, 1, dtype=torch.bool)
    is_init[:, 0] = is_init[1, 3] = True
    batch["is_init"], batch["next", "is_init"] = is_init, torch.zeros_like(is_init)
    for name in ("recurrent_h", "recurrent_c", "value_h", "value_c"):
        batch[name], batch["next", name] = torch.zeros(2, 7, 1, 4), torch.randn(2, 7, 1, 4)
    assert_equal_results(losses, batch)
    in_sequence = losses[0](batch.copy())
    batch["is_init"] = torch.ones_like(is_init)
    assert not torch.isclose(losses[0](batch)["loss_actor"], in_sequence["loss_actor"])


def composite_networks() -> Networks:
    """A policy of two parts, and a critic of both."""
    body = TensorDictModule(nn.Linear(OBSERVATION, 4), ["observation"], ["hidden"])
    names = [("params", part, name) for part in ("arm", "leg") for name in ("loc", "scale")]
    split = TensorDictModule(
        lambda x: (x[..., :1], x[..., 1:2].exp(), x[..., 2:3], x[..., 3:].exp()), ["hidden"], names
    )
    actor = ProbabilisticActor(
        TensorDictSequential(body, split),
        in_keys=["params"],
        distribution_class=CompositeDistribution,
        distribution_kwargs={"distribution_map": {"arm": IndependentNormal, "leg": IndependentNormal}},
    )
    qvalue = TensorDictModule(
        JoinedSequential(nn.Linear(OBSERVATION + 2, 1)),
        ["observation", ("action", "arm"), ("action", "leg")],
        ["state_action_value"],
    )
    return actor, qvalue, ValueOperator(nn.Linear(OBSERVATION, 1), in_keys=["observation"])


@pytest.fixture
def composite_batch() -> TensorDict:
    """Actions of two parts."""
    batch = batch_of("continuous")
    batch["action"] = TensorDict({"arm": torch.randn(4, 1), "leg": torch.randn(4, 1)}, [4])
    return batch


def test_an_ordinary_policy_is_the_same_with_composite_log_probs_set_off() -> None:
    losses = pair()
    with set_composite_lp_aggregate(False):
        assert_equal_results(losses, batch_of("continuous"))


def test_the_losses_of_a_composite_policys_parts_are_summed(composite_batch: TensorDict) -> None:
    ours, theirs = losses = pair(networks=composite_networks)
    with set_composite_lp_aggregate(True):
        assert_equal_results(losses, composite_batch)
    with set_composite_lp_aggregate(False):
        of_ours, of_theirs = ours(composite_batch.copy()), theirs(composite_batch.copy())
        assert not composite_lp_aggregate()
    torch.testing.assert_close(of_ours["loss_actor"], sum(of_theirs["loss_actor"].values()))
    torch.testing.assert_close(of_ours["loss_qvalue"], of_theirs["loss_qvalue"])


def test_a_masked_part_of_a_composite_action_reaches_no_gradient(composite_batch: TensorDict) -> None:
    loss, _ = pair(networks=composite_networks)
    with set_composite_lp_aggregate(True):
        expected = loss(composite_batch[:3].clone())
        composite_batch["shifted_valid"] = torch.tensor([True, True, True, False])
        composite_batch["action", "leg"][3] = torch.nan
        outputs = loss(composite_batch)
    torch.testing.assert_close(dict(outputs.items()), dict(expected.items()))
    assert all(gradient.isfinite().all() for gradient in gradients(loss, outputs).values())


# Updaters


@pytest.mark.parametrize("cast", [False, True], ids=["as_built", "cast_after_the_updater"])
@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize(
    "make", [lambda loss: SoftUpdate(loss, tau=0.1), lambda loss: HardUpdate(loss, value_network_update_interval=2)]
)
def test_torchrls_updaters_move_the_targets_as_in_torchrl(make: Callable[[Any], Any], critics: int, cast: bool) -> None:
    losses = pair(num_qvalue_nets=critics, updated=False)
    updaters = [make(loss) for loss in losses]
    if cast:
        for loss in losses:
            loss.double()
    for step in range(7):
        torch.manual_seed(step)
        noise = torch.randn_like(losses[0].qvalue_network_params.data)
        for loss, updater in zip(losses, updaters, strict=True):
            loss.qvalue_network_params.data.add_(noise)
            updater.step()
        ours, theirs = (loss.target_qvalue_network_params.data.to_dict() for loss in losses)
        torch.testing.assert_close(ours, theirs)
    dtypes = {tensor.dtype for tensor in losses[0].target_qvalue_network_params.values(True, True)}
    assert dtypes == {torch.float64 if cast else torch.float32}


def test_an_updaters_targets_are_those_that_the_loss_evaluates_after_a_cast() -> None:
    loss, _ = pair(updated=False)
    updater = SoftUpdate(loss, tau=0.5)
    batch = batch_of("continuous", dtype=torch.float64)
    loss.double()
    loss.qvalue_network_params.data.add_(1.0)
    before = loss.value_loss(batch.copy())[0]
    updater.step()
    assert not torch.isclose(before, loss.value_loss(batch.copy())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_updater_goes_on_after_weights_were_assigned(dtype: torch.dtype) -> None:
    loss, other = pair(updated=False)
    updater = SoftUpdate(loss, tau=0.5)
    parameter = next(loss.qvalue_network.parameters())
    state = {name: tensor.to(dtype) + 1.0 for name, tensor in other.state_dict().items()}
    loss.load_state_dict(state, assign=True)
    torch.testing.assert_close(dict(loss.state_dict()), state)
    assert next(loss.qvalue_network.parameters()) is parameter
    target = loss.target_qvalue_network_params.data.clone()
    loss.qvalue_network_params.data.copy_(target + 1.0)
    updater.step()
    torch.testing.assert_close(loss.target_qvalue_network_params.data.to_dict(), (target + 0.5).to_dict())


def test_the_cores_updater_works_as_well() -> None:
    loss, _ = pair(updated=False)
    updater = iql_plugins.SoftUpdate(loss, tau=1.0)
    loss.qvalue_network_params.data.add_(1.0)
    updater.step()
    torch.testing.assert_close(
        loss.target_qvalue_network_params.data.to_dict(), loss.qvalue_network_params.data.to_dict()
    )


# Value estimators


@pytest.mark.parametrize("name", ["TD0", "TD1", "TDLambda"])
def test_an_estimator_made_by_name_has_torchrls_interface(name: str) -> None:
    for loss in (losses := pair()):
        loss.make_value_estimator(ValueEstimators[name], gamma=0.9, device="cpu")
    ours, theirs = (loss.value_estimator for loss in losses)
    assert type(ours) is type(theirs)
    assert losses[0].value_type == losses[1].value_type == ValueEstimators[name]
    assert losses[0]._value_estimator is losses[0].value_estimator
    assert ours.in_keys == theirs.in_keys
    batch = batch_of("continuous", (2, 3))
    torch.testing.assert_close(ours(batch.copy())["advantage"], theirs(batch.copy())["advantage"])
    assert losses[0].make_value_estimator(losses[0].value_type, gamma=0.5).value_estimator.gamma == 0.5


@pytest.mark.parametrize("name", ["TD1", "TDLambda"])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("names", [None, "time"])
def test_time_is_the_last_batch_dimension_or_the_one_of_that_name(
    name: str, shape: tuple[int, ...], names: str | None
) -> None:
    for loss in (losses := pair()):
        loss.make_value_estimator(ValueEstimators[name], gamma=0.9)
    batch = batch_of("continuous", shape)
    if names is not None:
        batch.names = ["time", *[None] * (len(shape) - 1)]
    assert_equal_results(losses, batch)
    ours, theirs = (loss.qvalue_loss(batch.copy())[0] for loss in losses)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("how", ["name", "class"])
@pytest.mark.parametrize("hyperparams", [{}, {"time_dim": -1}, {"time_dim": 0}], ids=str)
@pytest.mark.parametrize(("name", "kind"), [("TD1", TD1Estimator), ("TDLambda", TDLambdaEstimator)])
def test_time_of_agents_is_that_of_the_batch_size(
    name: str, kind: type[ValueEstimatorBase], hyperparams: dict[str, int], how: str
) -> None:
    given = {"gamma": 0.9, **({"lmbda": 0.8} if name == "TDLambda" else {}), **hyperparams}
    for loss in (losses := pair(networks=lambda: multi_agent_networks(shared=False, centralised=False))):
        if how == "name":
            loss.make_value_estimator(name, **given)
        else:
            loss.make_value_estimator(kind, value_network=loss.value_network, **given)
    batch = multi_agent_batch((3, 5))
    assert_equal_results(losses, batch)
    ours, theirs = (loss(**keywords(batch)) for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("critics", [1, 2])
def test_targets_of_several_agents_follow_torchrls_updater(critics: int, shared: bool) -> None:
    losses = pair(
        networks=lambda: multi_agent_networks(shared=shared, centralised=True), updated=False, num_qvalue_nets=critics
    )
    for loss in losses:
        updater = SoftUpdate(loss, tau=0.3)
        loss.qvalue_network_params.data.add_(1.0)
        updater.step()
    torch.testing.assert_close(dict(losses[0].state_dict()), dict(losses[1].state_dict()))
    assert_equal_results(losses, multi_agent_batch((4,)))


ESTIMATORS: dict[str, tuple[type[ValueEstimatorBase], dict[str, Any]]] = {
    "td0": (TD0Estimator, {}),
    "td1": (TD1Estimator, {}),
    "tdlambda": (TDLambdaEstimator, {"lmbda": 0.8}),
    "standardised_rewards": (TD0Estimator, {"average_rewards": True}),
    "renamed": (TD0Estimator, {}),
}


@pytest.mark.parametrize("how", ["class", "object", "assigned"])
@pytest.mark.parametrize("case", ESTIMATORS)
def test_an_estimator_of_the_users_makes_the_target_by_its_own_equation(case: str, how: str) -> None:
    kind, hyperparams = ESTIMATORS[case]
    for loss in (losses := pair()):
        if how == "class":
            loss.make_value_estimator(kind, gamma=0.9, value_network=loss.value_network, **hyperparams)
        else:
            estimator = kind(gamma=0.9, value_network=loss.value_network, **hyperparams)
            if how == "object":
                assert loss.make_value_estimator(estimator) is loss
            else:
                loss._value_estimator = estimator
            assert loss.value_estimator is estimator
        if case == "renamed":
            loss.value_estimator.set_keys(reward="gain")
    batch = batch_of("continuous", (2, 5))
    if case == "renamed":
        batch = renamed_batch(batch, reward="gain")
    assert_equal_results(losses, batch)
    ours, theirs = (loss.state_dict() for loss in losses)
    torch.testing.assert_close(dict(ours), dict(theirs))


def test_the_equation_of_a_users_estimator_is_used_and_no_other() -> None:
    class Constant(TD0Estimator):
        def value_estimate(self, tensordict: TensorDict, **kwargs: Any) -> Tensor:
            return torch.full_like(tensordict["next", "reward"], 7.0)

    loss, _ = pair(loss_function="l2", num_qvalue_nets=1)
    loss.value_estimator = Constant(gamma=0.9, value_network=loss.value_network)
    assert loss.value_type is Constant
    batch = batch_of("continuous")
    q = loss.qvalue_network(batch.copy())["state_action_value"]
    torch.testing.assert_close(loss(batch)["loss_qvalue"], (q - 7.0).square().mean())


def test_rewards_without_a_last_dimension_are_not_broadcast_by_a_users_estimator() -> None:
    loss, _ = pair()
    loss.make_value_estimator(TD0Estimator, gamma=0.9, value_network=loss.value_network)
    batch = batch_of("continuous")
    expected = loss(batch.copy())
    for name in ("reward", "done", "terminated"):
        batch["next", name] = batch["next", name].squeeze(-1)
    torch.testing.assert_close(dict(loss(batch).items()), dict(expected.items()))


def test_n_step_transitions_are_discounted_by_a_users_estimator() -> None:
    by_name, _ = pair()
    by_object = copy.deepcopy(by_name)
    by_name.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    by_object.make_value_estimator(TD0Estimator, gamma=0.9, value_network=by_object.value_network)
    batch = batch_of("continuous")
    batch["steps_to_next_obs"] = torch.tensor([[1], [3], [2], [3]])
    torch.testing.assert_close(by_object(batch.copy())["loss_qvalue"], by_name(batch.copy())["loss_qvalue"])
    batch["next", "discount"] = torch.full((4, 1), 0.5)
    with pytest.raises(ValueError, match="discount"):
        by_object(batch)


@pytest.mark.parametrize(
    ("hyperparams", "own"),
    [({"vectorized": False}, False), ({"device": "cpu"}, False), ({"average_rewards": True}, True)],
    ids=["vectorized", "device", "average_rewards"],
)
def test_hyperparameters_of_torchrls_estimators_mean_what_they_mean_there(
    hyperparams: dict[str, Any], own: bool
) -> None:
    for loss in (losses := pair()):
        loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, **hyperparams)
        assert loss.value_type == ValueEstimators.TDLambda
    assert_equal_results(losses, batch_of("continuous", (2, 5)))
    assert (losses[0]._modules["_value_estimator"] is losses[0].value_estimator) == own


@pytest.mark.parametrize("change", ["in_place", "replaced", "loaded"])
def test_a_discount_that_is_changed_on_the_estimator_is_the_one_in_force(change: str) -> None:
    losses = pair()
    for loss in losses:
        loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9)
        if change == "in_place":
            loss.value_estimator.gamma.fill_(0.5)
        elif change == "replaced":
            loss.value_estimator.gamma = torch.tensor(0.5)
        else:
            loss.load_state_dict(loss.state_dict() | {"_value_estimator.gamma": torch.tensor(0.5)})
        assert loss.value_estimator.gamma == 0.5
    assert_equal_results(losses, batch_of("continuous", (2, 5)))


def test_a_cast_to_half_precision_leaves_the_discount_alone() -> None:
    loss, _ = pair()
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    loss.bfloat16()
    assert loss.value_estimator.gamma == torch.tensor(0.99)


def test_setting_the_estimator_to_none_makes_the_default_again() -> None:
    loss, _ = pair()
    loss.make_value_estimator(ValueEstimators.TD1, gamma=0.5)
    loss._value_estimator = None
    assert loss.value_type == ValueEstimators.TD0
    assert loss.value_estimator.gamma == torch.tensor(0.99)


@pytest.mark.parametrize("estimator", ["TD0", "own"])
@pytest.mark.parametrize("keys", [RENAMED, NESTED], ids=["renamed", "nested"])
@pytest.mark.parametrize("keys_first", [True, False])
def test_the_estimators_keys_follow_the_losss(keys: dict[str, Any], keys_first: bool, estimator: str) -> None:
    prefix = ("agent",) if keys is NESTED else ()
    names = {name: keys[name] for name in ("value", "state_action_value", "action")}
    for loss in (losses := pair(networks=lambda: torchrl_networks("continuous", prefix=prefix, **names))):
        loss.set_keys(**(keys if keys_first else {"value": keys["value"]}))
        if estimator == "own":
            loss.make_value_estimator(ValueEstimators.TD0, average_rewards=True)
        else:
            loss.make_value_estimator()
        loss.set_keys(**keys)
        for name in ("value", "reward", "done", "terminated"):
            assert getattr(loss.value_estimator.tensor_keys, name) == keys[name]
    batch = batch_of("continuous", (2, 3))
    renamed = TensorDict({keys["action"]: batch["action"]}, batch.shape)
    renamed[(*prefix, "observation")] = batch["observation"]
    renamed[("next", *prefix, "observation")] = batch["next", "observation"]
    for name in ("reward", "done", "terminated"):
        key = keys[name] if isinstance(keys[name], tuple) else (keys[name],)
        renamed["next", *key] = batch["next", name]
    assert_equal_results(losses, renamed)


def test_keys_set_on_the_estimator_are_read_as_in_torchrl() -> None:
    for loss in (losses := pair()):
        loss.value_estimator.set_keys(reward="gain", done="over", terminated="dead")
    batch = renamed_batch(batch_of("continuous"), reward="gain", done="over", terminated="dead")
    assert_equal_results(losses, batch)


def test_state_dicts_interchange_with_torchrls_once_an_estimator_was_made() -> None:
    ours, theirs = pair()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for loss in (ours, theirs):
        loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert "_value_estimator.lmbda" in ours.state_dict()
    theirs.value_estimator.gamma.fill_(0.25)
    ours.load_state_dict(theirs.state_dict())
    assert ours.value_estimator.gamma == 0.25


def test_functional_call_takes_the_discount_by_its_name() -> None:
    loss, _ = pair()
    loss.make_value_estimator(gamma=0.9)
    batch = batch_of("continuous")
    changed = dict(loss.named_parameters()) | {"_value_estimator.gamma": torch.tensor(0.1)}
    outputs = torch.func.functional_call(loss, changed, (batch.copy(),))
    assert loss.value_estimator.gamma == torch.tensor(0.9)
    loss.make_value_estimator(gamma=0.1)
    torch.testing.assert_close(outputs["loss_qvalue"], loss(batch)["loss_qvalue"])


def test_a_copy_shares_nothing_with_the_loss() -> None:
    loss, _ = pair()
    loss.make_value_estimator(gamma=0.9)
    twin = copy.deepcopy(loss)
    twin.value_estimator.gamma.fill_(0.1)
    assert loss.value_estimator.gamma == torch.tensor(0.9)
    assert twin.value_estimator.value_network is twin.value_network
    batch = batch_of("continuous")
    assert twin(batch.copy())["loss_qvalue"] != loss(batch.copy())["loss_qvalue"]


# Warnings and errors


def test_a_loss_without_an_updater_warns_where_torchrls_does() -> None:
    losses = pair(updated=False)
    batch = batch_of("continuous")
    calls: list[Callable[[Any], Any]] = [
        lambda loss: loss(batch.copy()),
        lambda loss: loss.actor_loss(batch.copy()),
        lambda loss: loss.value_loss(batch.copy()),
        lambda loss: loss.qvalue_loss(batch.copy()),
        lambda loss: loss.target_qvalue_network_params,
        lambda loss: loss.qvalue_network_params,
        lambda loss: loss.target_value_network_params,
        lambda loss: loss.state_dict(),
        lambda loss: copy.deepcopy(loss),
        lambda loss: SoftUpdate(loss, tau=0.1),
        lambda loss: loss(batch.copy()),
        lambda loss: loss.target_qvalue_network_params,
    ]
    for index, call in enumerate(calls):
        messages = []
        for loss in losses:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call(loss)
            messages.append({str(warning.message) for warning in caught if warning.category is UserWarning})
        assert messages[0] == messages[1], index
        assert bool(messages[0]) == (index in (0, 1, 2, 4)), index


def test_the_warning_is_off_where_torchrls_warnings_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torchrl.objectives.common, torchrl._utils):
        monkeypatch.setattr(module, "rl_warnings", lambda: False)
    loss, _ = pair(updated=False)
    loss(batch_of("continuous"))
    assert loss.target_qvalue_network_params is not None


@pytest.mark.parametrize("package", [iql_torchrl, torchrl.objectives], ids=["ours", "torchrls"])
@pytest.mark.parametrize("kind", ["continuous", "one-hot"])
def test_an_entropy_that_is_left_out_is_warned_of_at_construction(kind: str, package: Any) -> None:
    with pytest.warns(UserWarning, match="scalar_output_mode") as caught:
        loss = make_loss(package, kind, reduction="none")
    assert caught[-1].filename == __file__
    SoftUpdate(loss, tau=0.1)
    assert set(loss(batch_of(kind)).keys()) == {"loss_actor", "loss_qvalue", "loss_value"}
    make_loss(package, kind, reduction="none", scalar_output_mode="exclude")


@pytest.mark.parametrize("package", [iql_torchrl, torchrl.objectives], ids=["ours", "torchrls"])
def test_an_action_space_that_is_not_given_is_warned_of(package: Any) -> None:
    with pytest.warns(UserWarning, match="action_space was not"):
        loss = package.DiscreteIQLLoss(*torchrl_networks("one-hot"))
    assert loss.action_space == "one_hot"


ERRORS: dict[str, tuple[type[Exception], Callable[[Any], Any]]] = {
    "gamma": (TypeError, lambda package: make_loss(package, gamma=0.9)),
    "priority_key": (RuntimeError, lambda package: make_loss(package, priority_key="td")),
    "expectile": (ValueError, lambda package: make_loss(package, "one-hot", expectile=1.0)),
    "action_space": (ValueError, lambda package: make_loss(package, "one-hot", action_space="multi")),
    "list_of_critics": (
        RuntimeError,
        lambda package: package.IQLLoss(*(n := torchrl_networks("continuous"))[:1], [n[1]] * 3, n[2]),
    ),
    "unknown_key": (ValueError, lambda package: make_loss(package).set_keys(nothing="x")),
    "unwritten_value": (KeyError, lambda package: with_estimator(package).set_keys(value="x")),
    "unwritten_value_first": (KeyError, lambda package: with_renamed_value(package).make_value_estimator()),
    "unwritten_value_read": (KeyError, lambda package: with_renamed_value(package).value_estimator),
    "gae": (NotImplementedError, lambda package: make_loss(package).make_value_estimator(ValueEstimators.GAE)),
    "vtrace": (NotImplementedError, lambda package: make_loss(package).make_value_estimator(ValueEstimators.VTrace)),
    "unknown_name": (KeyError, lambda package: make_loss(package).make_value_estimator("monte carlo")),
    "no_estimator": (TypeError, lambda package: make_loss(package).make_value_estimator(3)),
    "no_hyperparameter": (TypeError, lambda package: make_loss(package).make_value_estimator(lmbda=0.5)),
    "vmap_randomness": (ValueError, lambda package: make_loss(package).set_vmap_randomness("some")),
    "loss_mask_key": (ValueError, lambda package: setattr(make_loss(package), "loss_mask_key", 3)),
    "device": (RuntimeError, lambda package: make_loss(package).device),
    "other_network": (
        RuntimeError,
        lambda package: make_loss(package).from_stateful_net("actor_network", nn.Linear(2, 2)),
    ),
    "loss_function": (NotImplementedError, lambda package: called(make_loss(package, loss_function="huber"))),
    "reduction": (NotImplementedError, lambda package: called(make_loss(package, reduction="median"))),
}


def with_estimator(package: Any) -> Any:
    loss = make_loss(package)
    loss.make_value_estimator()
    return loss


def with_renamed_value(package: Any) -> Any:
    loss = make_loss(package)
    loss.set_keys(value="other")
    return loss


def called(loss: Any) -> Any:
    loss._has_update_associated["qvalue_network"] = True
    return loss(batch_of("continuous"))


@pytest.mark.parametrize("package", [iql_torchrl, torchrl.objectives], ids=["ours", "torchrls"])
@pytest.mark.parametrize("case", ERRORS)
def test_what_torchrl_refuses_is_refused_by_the_same_error(case: str, package: Any) -> None:
    error, provoke = ERRORS[case]
    with pytest.raises(error):
        provoke(package)


def test_a_refused_estimator_leaves_the_old_one() -> None:
    loss, _ = pair()
    loss.make_value_estimator(ValueEstimators.TD1, gamma=0.5)
    for refused in (ValueEstimators.GAE, "monte carlo", 3):
        with pytest.raises((NotImplementedError, KeyError, TypeError)):
            loss.make_value_estimator(refused)
    with pytest.raises(ValueError, match="gamma"):
        loss.make_value_estimator(ValueEstimators.TD0, gamma=1.5)
    with pytest.raises(TypeError, match="value_estimator must be"):
        loss.value_estimator = 3
    assert loss.value_type == ValueEstimators.TD1
    assert loss.value_estimator.gamma == 0.5


# Replay buffers


class SegmentTree:
    """TorchRL's own, of its compiled extension, which does not load beside every release of torch."""

    def __init__(self, size: int, reduce: Callable[[Tensor], Tensor], initial: float) -> None:
        self.values, self.reduce = torch.full((size,), initial), reduce

    def __getitem__(self, index: Any) -> Tensor:
        return self.values[torch.as_tensor(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.values[torch.as_tensor(index)] = torch.as_tensor(value, dtype=self.values.dtype)

    def query(self, start: int, stop: int) -> float:
        return self.reduce(self.values[start:stop]).item()

    def scan_lower_bound(self, mass: Any) -> Tensor:
        return torch.searchsorted(self.values.cumsum(0), torch.as_tensor(mass, dtype=self.values.dtype))


@pytest.fixture
def _segment_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    if prioritized.SumSegmentTreeFp32 is None:
        for size in ("Fp32", "Fp64"):
            monkeypatch.setattr(
                prioritized, f"SumSegmentTree{size}", lambda size: SegmentTree(size, torch.sum, 0.0), raising=False
            )
            monkeypatch.setattr(
                prioritized,
                f"MinSegmentTree{size}",
                lambda size: SegmentTree(size, torch.min, torch.inf),
                raising=False,
            )


@pytest.mark.usefixtures("_segment_trees")
@pytest.mark.parametrize("kind", ["continuous", "categorical"])
def test_a_prioritised_buffer_takes_the_priorities_and_gives_the_weights(kind: str) -> None:
    torch.manual_seed(0)
    buffer = TensorDictPrioritizedReplayBuffer(
        alpha=1.0, beta=1.0, eps=0.0, storage=LazyTensorStorage(8), batch_size=256
    )
    buffer.extend(batch_of(kind, (8,)))
    loss, _ = pair(kind)
    sample = buffer.sample()
    loss(sample)
    buffer.update_tensordict_priority(sample)
    priority = dict(zip(sample["index"].tolist(), sample["td_error"], strict=True))
    assert priority.keys() == set(range(8))
    # With both exponents 1, a transition weighs the inverse of its priority.
    sample = buffer.sample()
    expected = min(priority.values()) / torch.stack([priority[index] for index in sample["index"].tolist()])
    torch.testing.assert_close(sample["priority_weight"], expected)
    weighted = loss(sample.copy())["loss_value"]
    loss.use_prioritized_weights = False
    plain = loss(sample.copy())["loss_value"]
    loss.reduction = "none"
    losses = loss.value_loss(sample.copy())[0]
    torch.testing.assert_close(plain, losses.mean())
    weight = sample["priority_weight"].view_as(losses)
    torch.testing.assert_close(weighted, (weight * losses).sum() / weight.sum())


def test_multi_step_transitions_are_discounted_n_times() -> None:
    batch = batch_of("continuous", (2, 6))
    batch["next", "terminated"].zero_()
    gamma, steps = 0.9, 3
    transformed = MultiStep(gamma=gamma, n_steps=steps)(batch.copy())
    loss, _ = pair(loss_function="l2", num_qvalue_nets=1, reduction="none", scalar_output_mode="exclude")
    loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
    td_error = transformed.copy()
    loss(td_error)
    with torch.no_grad():
        value = loss.value_network(transformed["next"].copy())["state_value"]
        q = loss.qvalue_network(transformed.copy())["state_action_value"]
    n = transformed["steps_to_next_obs"].view_as(value)
    assert set(n.flatten().tolist()) == {1, 2, 3}
    target = transformed["next", "reward"] + gamma**n * value
    torch.testing.assert_close(td_error["td_error"], (q - target).square().squeeze(-1))


# Trainers


def pendulum() -> TransformedEnv:
    """TorchRL's own pendulum, with an observation and a time limit."""
    return TransformedEnv(
        PendulumEnv(device="cpu"),
        Compose(
            UnsqueezeTransform(dim=-1, in_keys=["th", "thdot"], in_keys_inv=["th", "thdot"]),
            CatTensors(in_keys=["th", "thdot"], out_key="observation", del_keys=False, dim=-1),
            StepCounter(max_steps=20),
        ),
    )


def pendulum_networks() -> Networks:
    head = nn.Sequential(nn.Linear(2, 2), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(head, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    qvalue = ValueOperator(nn.Linear(3, 1), in_keys=["observation", "action"])
    qvalue.module = JoinedSequential(nn.Linear(3, 1))
    return actor, qvalue, ValueOperator(nn.Linear(2, 1), in_keys=["observation"])


@pytest.fixture
def trainers() -> Iterator[ModuleType]:
    """``torchrl.trainers``, which warns of itself when it is imported and when it runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchrl.collectors
        import torchrl.trainers.algorithms

        yield torchrl.trainers


def make_trainer(trainers: ModuleType, name: str, loss: Any, **kwargs: Any) -> Any:
    """A trainer that collects 60 frames, and takes three steps of batches of 10 on every 20."""
    collector = torchrl.collectors.Collector(
        pendulum(), loss.actor_network, frames_per_batch=20, total_frames=60, exploration_type=ExplorationType.RANDOM
    )
    updater = SoftUpdate(loss, tau=0.5)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=10)
    options: dict[str, Any] = {
        "collector": collector,
        "total_frames": 60,
        "frame_skip": 1,
        "optim_steps_per_batch": 3,
        "loss_module": loss,
        "optimizer": torch.optim.Adam(loss.parameters(), lr=1e-2),
        "progress_bar": False,
        "seed": 0,
    }
    if name == "IQLTrainer":
        return trainers.algorithms.IQLTrainer(
            **options, replay_buffer=buffer, target_net_updater=updater, enable_logging=False, **kwargs
        )
    trainer = trainers.Trainer(**options, **kwargs)
    trainers.ReplayBufferTrainer(buffer, batch_size=10, flatten_tensordicts=True).register(trainer)
    trainer.register_op("post_optim", trainers.TargetNetUpdaterHook(updater))
    return trainer


@pytest.mark.parametrize("name", ["Trainer", "IQLTrainer"])
def test_torchrls_trainers_train_the_loss_as_they_train_torchrls(trainers: ModuleType, name: str) -> None:
    losses = []
    state = make_loss(iql_torchrl, networks=pendulum_networks()).state_dict()
    for package in (iql_torchrl, torchrl.objectives):
        loss = make_loss(package, networks=pendulum_networks())
        loss.load_state_dict(state)
        torch.manual_seed(0)
        trainer = make_trainer(trainers, name, loss)
        trainer.train()
        assert trainer._optim_count == 9
        losses.append(loss)
    ours, theirs = (dict(loss.state_dict()) for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(not torch.equal(ours[key], tensor) for key, tensor in state.items())


def test_a_trainers_checkpoint_restores_the_loss(trainers: ModuleType, tmp_path: Path) -> None:
    from torchrl.checkpoint import Checkpoint

    loss = make_loss(iql_torchrl, networks=pendulum_networks())
    options = {"checkpoint": Checkpoint(), "save_trainer_file": tmp_path / "trainer", "save_trainer_interval": 1}
    make_trainer(trainers, "IQLTrainer", loss, **options).train()
    other = make_loss(iql_torchrl, networks=pendulum_networks())
    other.make_value_estimator()
    make_trainer(trainers, "IQLTrainer", other, checkpoint=Checkpoint()).load_from_file(tmp_path / "trainer")
    torch.testing.assert_close(dict(other.state_dict()), dict(loss.state_dict()))


# torch.compile


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("estimator", ["by_name", "own"])
def test_a_compiled_loss_has_no_graph_break_and_equals_the_eager_one(kind: str, estimator: str) -> None:
    loss, _ = pair("continuous" if kind == "continuous" else "categorical")
    if estimator == "own":
        loss.make_value_estimator(TD0Estimator, gamma=0.9, value_network=loss.value_network)
    batch = make_batch(kind)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")(batch.copy())
    torch.testing.assert_close(dict(compiled.items()), dict(loss(batch.copy()).items()))


# Compiling meets deprecated attributes inside tensordict.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_compiled_update_with_torchrls_updater_equals_the_eager_one() -> None:
    eager, _ = pair(updated=False)
    eager.make_value_estimator()
    compiled = copy.deepcopy(eager)
    torch.compiler.reset()

    def update_of(loss: Any) -> Callable[[TensorDict], TensorDict]:
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        updater = SoftUpdate(loss, tau=0.1)

        def update(batch: TensorDict) -> TensorDict:
            optimizer.zero_grad(set_to_none=True)
            outputs = loss(batch)
            total(outputs).backward()
            optimizer.step()
            updater.step()
            return outputs.detach()

        return update

    updates = [update_of(eager), torch.compile(update_of(compiled), backend="eager")]
    for _ in range(3):
        batch = batch_of("continuous")
        outputs = [dict(update(batch.copy()).items()) for update in updates]
        torch.testing.assert_close(*outputs)
    torch.testing.assert_close(dict(compiled.state_dict()), dict(eager.state_dict()))


# The example


@pytest.fixture
def example() -> ModuleType:
    """``examples/torchrl_offline.py`` as a module."""
    spec = importlib.util.spec_from_file_location("torchrl_offline", ROOT / "examples" / "torchrl_offline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_offline_script_gives_torchrls_losses_for_100_steps(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = example.train(steps=100, seed=0)
    assert example.IQLLoss is iql_torchrl.IQLLoss
    monkeypatch.setattr(example, "IQLLoss", torchrl.objectives.IQLLoss)
    _, theirs = example.train(steps=100, seed=0)
    assert len(ours) == len(theirs) == 100
    for key in ("loss_actor", "loss_qvalue", "loss_value", "entropy"):
        of_ours, of_theirs = (torch.tensor([losses[key] for losses in history]) for history in (ours, theirs))
        torch.testing.assert_close(of_ours, of_theirs, rtol=1e-5, atol=1e-5)
    assert ours[0]["loss_qvalue"] != ours[-1]["loss_qvalue"]


def test_the_script_evaluates_what_it_trained(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["torchrl_offline.py", "--steps", "2"])
    example.main()
    torch.set_num_threads(threads)
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("mean return ")
    assert -2000 < float(last.split()[-1]) < -50


# The plugin


def test_a_sample_of_a_replay_buffer_is_in_the_key_layout_already() -> None:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=5)
    buffer.extend(batch_of("continuous", (20,)))
    sample = buffer.sample()
    assert plugin.iql_map_batch(sample) is sample
    loss, _ = pair()
    assert loss(sample)["loss_value"].isfinite()


def test_the_weights_of_a_sample_with_its_information_come_along() -> None:
    sample = batch_of("continuous")
    weight = torch.rand(4)
    mapped = plugin.iql_map_batch((sample, {"priority_weight": weight, "index": torch.arange(4)}))
    assert mapped is not None
    assert mapped["priority_weight"] is weight
    assert "priority_weight" not in sample.keys()
    assert plugin.iql_map_batch((sample, {"index": torch.arange(4)})) is sample


@pytest.mark.parametrize("batch", [{"observation": torch.zeros(2, 3)}, (1, 2), [], None, ()])
def test_another_frameworks_batch_is_none_of_ours(batch: object) -> None:
    assert plugin.iql_map_batch(batch) is None


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False
    )


def test_mapping_batches_imports_no_torchrl_and_without_it_the_command_that_installs_it_is_named() -> None:
    code = (
        "import sys, iql_torchrl.plugin as p; assert p.iql_map_batch(3) is None; assert 'torchrl' not in sys.modules; "
        "sys.modules['torchrl'] = None; from iql_torchrl import IQLLoss"
    )
    finished = run_python(code)
    assert finished.returncode == 1
    assert "AssertionError" not in finished.stderr
    assert "ImportError: iql_torchrl needs TorchRL: pip install 'iql-plugins[torchrl]'" in finished.stderr
