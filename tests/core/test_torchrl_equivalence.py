"""Our losses against TorchRL's own, with the same weights on the same batch."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchrl.objectives
from conftest import ACTION, ACTIONS, OBSERVATION, gradients, keywords
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from tensordict.utils import NestedKey, unravel_key
from torch import nn
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import OneHot as OneHotSpec
from torchrl.modules import (
    IndependentNormal,
)
from torchrl_helpers import (
    FEATURES,
    KINDS,
    NESTED,
    RENAMED,
    assert_equal_results,
    batch_of,
    multi_agent_batch,
    multi_agent_networks,
    torchrl_networks,
)

import iql_plugins
import iql_torchrl
from iql_plugins.networks import categorical_actor, critic, discrete_critic, gaussian_actor, value_function

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater has been associated:UserWarning")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
LOSS_FUNCTIONS = ["l1", "l2", "smooth_l1"]
REDUCTIONS = ["mean", "sum", "none"]


def paper_networks(kind: str, *, squashed: bool = False) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Actor, critic and V of this package."""
    sizes = {"hidden_sizes": (FEATURES,)}
    if kind == "continuous":
        return (
            gaussian_actor(OBSERVATION, ACTION, squashed=squashed, **sizes),
            critic(OBSERVATION, ACTION, **sizes),
            value_function(OBSERVATION, **sizes),
        )
    return (
        categorical_actor(OBSERVATION, ACTIONS, **sizes),
        discrete_critic(OBSERVATION, ACTIONS, **sizes),
        value_function(OBSERVATION, **sizes),
    )


def pair(kind: str, networks: Any, *, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[Any, Any]:
    """Our loss and TorchRL's with equal weights; their target critics differ from the critics.

    Args:
        kind: one of ``KINDS``.
        networks: makes actor, critic(s) and V.
        dtype: of both losses.
        **kwargs: of both losses.
    """
    discrete = kind != "continuous"
    if discrete:
        kwargs.setdefault("action_space", kind)
    if kwargs.get("reduction") == "none":
        kwargs.setdefault("scalar_output_mode", "exclude")
    name = "DiscreteIQLLoss" if discrete else "IQLLoss"
    ours = getattr(iql_plugins, name)(*networks(), **kwargs).to(dtype)
    theirs = getattr(torchrl.objectives, name)(*networks(), **kwargs).to(dtype)
    ours.target_updater_attached()
    state = ours.state_dict()
    for key, tensor in state.items():
        if key.startswith("target_"):
            state[key] = tensor + 0.1 * torch.randn_like(tensor)
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    return ours, theirs


def make_estimator(losses: tuple[Any, Any], name: str, **hyperparams: Any) -> None:
    """The same value estimator for our loss and TorchRL's."""
    for loss, module in zip(losses, (iql_plugins, torchrl.objectives), strict=True):
        loss.make_value_estimator(getattr(module.ValueEstimators, name), **hyperparams)


def settings(dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """Every loss function with every reduction; in float32 each of both at least once."""
    if dtype == torch.float64:
        return itertools.product(LOSS_FUNCTIONS, REDUCTIONS)
    return zip(LOSS_FUNCTIONS, REDUCTIONS, strict=True)


@pytest.mark.parametrize("separate_losses", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("shared", [False, True], ids=["own_trunks", "shared_trunk"])
@pytest.mark.parametrize(
    ("estimator", "shape"),
    [("TD0", (4,)), ("TD0", (2, 3)), ("TD1", (2, 3)), ("TDLambda", (2, 3))],
    ids=["td0", "td0_of_trajectories", "td1", "tdlambda"],
)
@pytest.mark.parametrize("critics", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_written_entries_equal_torchrls(
    kind: str,
    dtype: torch.dtype,
    critics: int,
    estimator: str,
    shape: tuple[int, ...],
    shared: bool,
    separate_losses: bool,
) -> None:
    losses = pair(
        kind,
        lambda: torchrl_networks(kind, shared=shared),
        dtype=dtype,
        num_qvalue_nets=critics,
        separate_losses=separate_losses,
        scalar_output_mode="exclude",
        expectile=0.7,
        temperature=0.5,
    )
    make_estimator(losses, estimator, gamma=0.9)
    batch = batch_of(kind, shape, dtype)
    for loss_function, reduction in settings(dtype):
        for loss in losses:
            loss.loss_function, loss.reduction = loss_function, reduction
        assert_equal_results(losses, batch, TOLERANCE[dtype])


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_built_under_a_default_dtype_of_float64_equal_torchrls(kind: str, estimator: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        losses = pair(kind, lambda: torchrl_networks(kind), dtype=torch.float64)
        make_estimator(losses, estimator)
        batch = batch_of(kind, (2, 3), torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal_results(losses, batch, 1e-10)


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_moved_to_float64_with_their_estimator_equal_torchrls(kind: str, estimator: str) -> None:
    losses = pair(kind, lambda: torchrl_networks(kind))
    make_estimator(losses, estimator)
    for loss in losses:
        loss.double()
    assert_equal_results(losses, batch_of(kind, (2, 6), torch.float64), 1e-10)


@pytest.mark.parametrize("reduction", [None, *REDUCTIONS])
@pytest.mark.parametrize("loss_function", LOSS_FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_the_constructor_mean_what_they_mean_in_torchrl(
    kind: str, loss_function: str, reduction: str | None
) -> None:
    losses = pair(kind, lambda: torchrl_networks(kind), loss_function=loss_function, reduction=reduction)
    assert_equal_results(losses, batch_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_default_arguments_are_torchrls(kind: str) -> None:
    assert_equal_results(pair(kind, lambda: torchrl_networks(kind)), batch_of(kind))


@pytest.mark.parametrize("temperature", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_temperature_and_expectile_mean_what_they_mean_in_torchrl(
    kind: str, expectile: float, temperature: float
) -> None:
    losses = pair(
        kind, lambda: torchrl_networks(kind), dtype=torch.float64, expectile=expectile, temperature=temperature
    )
    assert_equal_results(losses, batch_of(kind, (6,), torch.float64), 1e-10)


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
@pytest.mark.parametrize("hyperparams", [{}, {"gamma": 0.3}, {"gamma": 0.5}, {"gamma": 1.0}], ids=str)
def test_hyperparameters_of_an_estimator_mean_what_they_mean_in_torchrl(
    estimator: str, hyperparams: dict[str, float]
) -> None:
    losses = pair("continuous", lambda: torchrl_networks("continuous"), dtype=torch.float64)
    make_estimator(losses, estimator, **hyperparams)
    assert_equal_results(losses, batch_of("continuous", (2, 5), torch.float64), 1e-10)


@pytest.mark.parametrize("lmbda", [0.3, 0.7, 1.0])
def test_lambda_means_what_it_means_in_torchrl(lmbda: float) -> None:
    losses = pair("continuous", lambda: torchrl_networks("continuous"), dtype=torch.float64)
    make_estimator(losses, "TDLambda", gamma=0.9, lmbda=lmbda)
    assert_equal_results(losses, batch_of("continuous", (3, 9), torch.float64), 1e-10)


@pytest.mark.parametrize("squashed", [False, True], ids=["tanh_mean", "squashed"])
@pytest.mark.parametrize("critics", [1, 2])
def test_the_papers_policies_work_in_torchrls_loss_and_give_the_same(critics: int, squashed: bool) -> None:
    losses = pair(
        "continuous",
        lambda: paper_networks("continuous", squashed=squashed),
        dtype=torch.float64,
        num_qvalue_nets=critics,
    )
    assert_equal_results(losses, batch_of("continuous", (2, 3), torch.float64), 1e-10)


@pytest.mark.parametrize("critics", [1, 2])
def test_the_papers_categorical_policy_works_in_torchrls_loss_and_gives_the_same(critics: int) -> None:
    losses = pair("categorical", lambda: paper_networks("categorical"), dtype=torch.float64, num_qvalue_nets=critics)
    assert_equal_results(losses, batch_of("categorical", (2, 3), torch.float64), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_plain_tensordict_modules_give_the_same(kind: str) -> None:
    def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
        _, qvalue, value = paper_networks(kind)
        size = 2 * ACTION if kind == "continuous" else ACTIONS
        body, names = nn.Sequential(nn.Linear(OBSERVATION, size)), ["logits"]
        distribution: type = torch.distributions.OneHotCategorical
        if kind == "continuous":
            body, names = body.append(NormalParamExtractor()), ["loc", "scale"]
            distribution = IndependentNormal
        elif kind == "categorical":
            distribution = torch.distributions.Categorical
        actor = ProbabilisticTensorDictSequential(
            TensorDictModule(body, in_keys=["observation"], out_keys=names),
            ProbabilisticTensorDictModule(in_keys=names, out_keys=["action"], distribution_class=distribution),
        )
        return actor, qvalue, value

    losses = pair(kind, networks, dtype=torch.float64)
    assert_equal_results(losses, batch_of(kind, (2, 3), torch.float64), 1e-10)


@pytest.mark.parametrize("deactivate_vmap", [False, True])
@pytest.mark.parametrize("critics", [1, 3])
def test_losses_without_vmap_equal_torchrls(critics: int, deactivate_vmap: bool) -> None:
    losses = pair(
        "continuous",
        lambda: torchrl_networks("continuous"),
        num_qvalue_nets=critics,
        deactivate_vmap=deactivate_vmap,
    )
    assert_equal_results(losses, batch_of("continuous"))


@pytest.mark.parametrize("kind", KINDS)
def test_different_critics_of_a_list_keep_their_weights_as_in_torchrl(kind: str) -> None:
    actor, qvalue, value = torchrl_networks(kind)
    critics = [qvalue, torchrl_networks(kind)[1]]
    name = "IQLLoss" if kind == "continuous" else "DiscreteIQLLoss"
    kwargs = {} if kind == "continuous" else {"action_space": kind}
    ours, theirs = (
        getattr(module, name)(actor, critics, value, **kwargs) for module in (iql_plugins, torchrl.objectives)
    )
    ours.target_updater_attached()
    assert_equal_results((ours, theirs), batch_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_given_twice_gives_torchrls_losses(kind: str) -> None:
    actor, qvalue, value = torchrl_networks(kind)
    name = "IQLLoss" if kind == "continuous" else "DiscreteIQLLoss"
    kwargs = {} if kind == "continuous" else {"action_space": kind}
    ours, theirs = (
        getattr(module, name)(actor, [qvalue, qvalue], value, **kwargs) for module in (iql_plugins, torchrl.objectives)
    )
    ours.target_updater_attached()
    batch = batch_of(kind)
    torch.testing.assert_close(dict(ours(batch).items()), dict(theirs(batch).items()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("separate_losses", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize("sharers", ["actor_and_critic", "value_and_critic", "all"])
def test_a_trunk_that_critics_share_is_trained_as_in_torchrl(sharers: str, critics: int, separate_losses: bool) -> None:
    def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
        actor, qvalue, value = torchrl_networks("categorical")
        trunk = qvalue.module[0]
        if sharers != "value_and_critic":
            actor.module[0].module[0] = trunk
        if sharers != "actor_and_critic":
            value.module[0] = trunk
        return actor, qvalue, value

    losses = pair(
        "categorical", networks, dtype=torch.float64, num_qvalue_nets=critics, separate_losses=separate_losses
    )
    assert_equal_results(losses, batch_of("categorical", dtype=torch.float64), 1e-10)


@pytest.mark.parametrize(
    ("kind", "spec"), [("one-hot", OneHotSpec(ACTIONS)), ("categorical", CategoricalSpec(ACTIONS))], ids=KINDS[1:]
)
def test_an_action_space_may_be_torchrls_spec(kind: str, spec: Any) -> None:
    losses = pair(kind, lambda: torchrl_networks(kind), action_space=spec)
    assert_equal_results(losses, batch_of(kind))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_keyword_tensors_return_torchrls_tuple(kind: str, reduction: str) -> None:
    ours, theirs = pair(kind, lambda: torchrl_networks(kind), reduction=reduction)
    tensors = keywords(batch_of(kind))
    if reduction == "none":
        # TorchRL's dispatch asks for the entropy, which it does not have without a reduction.
        theirs.select_out_keys(*ours.out_keys)
    results_of_ours, results_of_theirs = ours(**tensors), theirs(**tensors)
    assert isinstance(results_of_ours, tuple)
    torch.testing.assert_close(results_of_ours, results_of_theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "out_keys", [("loss_value", "loss_actor"), ("loss_qvalue",), ("entropy", "loss_qvalue", "loss_actor", "loss_value")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_selected_out_keys_return_torchrls_selection(kind: str, out_keys: tuple[str, ...]) -> None:
    losses = pair(kind, lambda: torchrl_networks(kind))
    batch = batch_of(kind)
    for loss in losses:
        assert loss.select_out_keys(*out_keys) is loss
    of_ours, of_theirs = (loss(**keywords(batch)) for loss in losses)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-6, atol=1e-6)
    of_ours, of_theirs = (dict(loss(batch.copy()).items()) for loss in losses)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-6, atol=1e-6)
    assert tuple(losses[0].out_keys) == tuple(losses[1].out_keys) == out_keys
    for loss in losses:
        loss.reset_out_keys()
    assert list(losses[0].out_keys) == list(losses[1].out_keys)


@pytest.mark.parametrize("estimator", ["TD0", "TDLambda"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_alone_equals_torchrls(kind: str, reduction: str, estimator: str) -> None:
    losses = pair(kind, lambda: torchrl_networks(kind), dtype=torch.float64, reduction=reduction)
    make_estimator(losses, estimator)
    for name in ("actor_loss", "qvalue_loss", "value_loss"):
        batch = batch_of(kind, (2, 3), torch.float64)
        batches = [batch.copy(), batch.copy()]
        of_ours, of_theirs = (getattr(loss, name)(batch) for loss, batch in zip(losses, batches, strict=True))
        torch.testing.assert_close(of_ours, of_theirs, rtol=1e-10, atol=1e-10)
        of_ours, of_theirs = (
            gradients(loss, value.sum(), lambda value: value)
            for loss, (value, _) in zip(losses, (of_ours, of_theirs), strict=True)
        )
        torch.testing.assert_close(of_ours, of_theirs, rtol=1e-10, atol=1e-10)
        of_ours, of_theirs = (
            {key: batch[key] for key in ("_log_prob", "td_error") if key in batch} for batch in batches
        )
        torch.testing.assert_close(of_ours, of_theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keys_first", [True, False], ids=["keys_first", "estimator_first"])
@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
@pytest.mark.parametrize("keys", [RENAMED, NESTED], ids=["renamed", "nested"])
@pytest.mark.parametrize("kind", KINDS)
def test_renamed_keys_are_read_and_written_as_in_torchrl(
    kind: str, keys: dict[str, NestedKey], estimator: str, keys_first: bool
) -> None:
    prefix = ("agent",) if keys is NESTED else ()
    network_keys = {name: keys[name] for name in ("value", "state_action_value", "action")}
    losses = pair(kind, lambda: torchrl_networks(kind, prefix=prefix, **network_keys), dtype=torch.float64)
    # TorchRL cannot make an estimator while it does not know the name of the value.
    before = keys if keys_first else {"value": keys["value"]}
    for loss in losses:
        loss.set_keys(**before)
    make_estimator(losses, estimator)
    for loss in losses:
        loss.set_keys(**keys)
    batch = batch_of(kind, (2, 3), torch.float64)
    renamed = TensorDict({keys["action"]: batch["action"]}, batch.shape)
    renamed[(*prefix, "observation")] = batch["observation"]
    renamed[("next", *prefix, "observation")] = batch["next", "observation"]
    for name in ("reward", "done", "terminated"):
        renamed[unravel_key(("next", keys[name]))] = batch["next", name]
    assert_equal_results(losses, renamed, 1e-10)
    assert in_keys(losses[0]) == in_keys(losses[1])
    if estimator != "TD0":
        make_estimator(losses, estimator, time_dim=1)
    of_ours, of_theirs = (loss(**keywords(renamed)) for loss in losses)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-10, atol=1e-10)


def test_a_key_set_to_none_is_the_default_again_as_in_torchrl() -> None:
    losses = pair("continuous", lambda: torchrl_networks("continuous"))
    for loss in losses:
        loss.set_keys(priority="prio")
        loss.set_keys(priority=None)
        assert loss.tensor_keys.priority == "td_error"
    assert_equal_results(losses, batch_of("continuous"))


def in_keys(loss: Any) -> set[NestedKey]:
    return {unravel_key(key) for key in loss.in_keys}


@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_in_keys_and_out_keys_are_torchrls(kind: str, critics: int) -> None:
    ours, theirs = pair(kind, lambda: torchrl_networks(kind), num_qvalue_nets=critics)
    assert in_keys(ours) == in_keys(theirs)
    assert list(ours.out_keys) == list(theirs.out_keys)


@pytest.mark.parametrize("expectile", [None, 0.1, 0.5, 0.9])
def test_loss_value_diff_is_torchrls(expectile: float | None) -> None:
    diff = torch.cat([torch.randn(20, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    kwargs = {} if expectile is None else {"expectile": expectile}
    of_ours = iql_plugins.IQLLoss.loss_value_diff(diff, **kwargs)
    of_theirs = torchrl.objectives.IQLLoss.loss_value_diff(diff, **kwargs)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("critics", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_have_torchrls_names_and_shapes(kind: str, critics: int) -> None:
    ours, theirs = pair(kind, lambda: torchrl_networks(kind), num_qvalue_nets=critics)
    shapes = [{name: parameter.shape for name, parameter in loss.named_parameters()} for loss in (ours, theirs)]
    assert shapes[0] == shapes[1]


# Agents


MULTI_AGENT = pytest.mark.parametrize(
    "agents",
    [{"shared": shared, "centralised": centralised} for shared in (True, False) for centralised in (False, True)],
    ids=["shared", "shared_centralised", "independent", "independent_centralised"],
)


@MULTI_AGENT
@pytest.mark.parametrize("critics", [1, 2, 3])
def test_networks_of_several_agents_equal_torchrls(agents: dict[str, bool], critics: int) -> None:
    losses = pair("continuous", lambda: multi_agent_networks(**agents), num_qvalue_nets=critics)
    names = [[name for name, _ in loss.named_parameters()] for loss in losses]
    assert names[0] == names[1]
    assert_equal_results(losses, multi_agent_batch((4,)))


@MULTI_AGENT
@pytest.mark.parametrize("critics", [1, 2])
def test_the_state_of_several_agents_moves_to_torchrl_and_back(agents: dict[str, bool], critics: int) -> None:
    ours, theirs = pair("continuous", lambda: multi_agent_networks(**agents), num_qvalue_nets=critics)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            tensor.add_(0.1 * torch.randn_like(tensor))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert_equal_results((ours, theirs), multi_agent_batch((4,)))


@MULTI_AGENT
def test_a_list_of_multi_agent_critics_equals_torchrls_stacked_ones(agents: dict[str, bool]) -> None:
    # TorchRL itself cannot call a list of them; what it has duplicated, it can.
    actor, first, value = multi_agent_networks(**agents)
    critics = [first, multi_agent_networks(**agents)[1]]
    ours = iql_plugins.IQLLoss(actor, critics, value)
    ours.target_updater_attached()
    theirs = torchrl.objectives.IQLLoss(*multi_agent_networks(**agents))
    theirs.load_state_dict(ours.state_dict())
    assert_equal_results((ours, theirs), multi_agent_batch((4,)))


@pytest.mark.parametrize("name", ["TD0", "TD1", "TDLambda"])
@pytest.mark.parametrize("hyperparams", [{}, {"time_dim": -1}, {"time_dim": 1}, {"time_dim": 0}], ids=str)
def test_targets_of_agents_along_trajectories_equal_torchrls(name: str, hyperparams: dict[str, int]) -> None:
    hyperparams = {} if name == "TD0" else hyperparams
    losses = pair("continuous", lambda: multi_agent_networks(shared=True, centralised=False), dtype=torch.float64)
    make_estimator(losses, name, gamma=0.9, **hyperparams)
    batch = multi_agent_batch((3, 5), torch.float64)
    assert_equal_results(losses, batch, 1e-10)
    ours, theirs = (loss.qvalue_loss(batch.copy()) for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    if hyperparams.get("time_dim", 0) >= 0 and (hyperparams or name == "TD0"):
        of_ours, of_theirs = (loss(**keywords(batch)) for loss in losses)
        torch.testing.assert_close(of_ours, of_theirs, rtol=1e-10, atol=1e-10)


def test_actions_that_are_not_one_hot_are_weights_in_the_adapter_as_in_torchrl_and_refused_by_the_core() -> None:
    ours, theirs = pair("one-hot", lambda: torchrl_networks("one-hot"))
    batch = batch_of("one-hot")
    batch["action"] = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]])
    adapter = iql_torchrl.DiscreteIQLLoss.from_core(ours)
    assert_equal_results((adapter, theirs), batch)
    with pytest.raises(ValueError, match="must be one-hot"):
        ours(batch)
