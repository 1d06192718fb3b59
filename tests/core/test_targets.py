"""SoftUpdate and HardUpdate."""

import copy
import pickle

import pytest
import torch
from conftest import ACTION, OBSERVATION, make_batch, make_loss, total
from tensordict.nn import TensorDictModule
from torch import nn
from torch.nn.utils import prune

from iql_plugins import HardUpdate, IQLLoss, SoftUpdate


def moved(loss: IQLLoss) -> IQLLoss:
    """The loss with all critics one away from their targets."""
    with torch.no_grad():
        for parameter in loss.qvalue_network.parameters():
            parameter.add_(1.0)
    return loss


def distances(loss: IQLLoss) -> set[float]:
    """How far the targets are from the critics, over all entries."""
    sources, targets = loss.qvalue_network_params.data, loss.target_qvalue_network_params.data
    difference = (sources - targets).values(True, True)
    return {round(x, 5) for tensor in difference for x in tensor.flatten().tolist()}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", [{"tau": 0.25}, {"eps": 0.75}])
def test_polyak_moves_the_targets_by_their_share(kind: str, count: int, options: dict[str, float]) -> None:
    loss = moved(make_loss(kind, num_qvalue_nets=count))
    updater = SoftUpdate(loss, **options)
    assert (updater.tau, updater.eps) == (0.25, 0.75)
    updater.step()
    assert distances(loss) == {0.75}
    updater.step()
    assert distances(loss) == {0.5625}


def test_polyak_moves_the_targets_of_a_shared_critic(kind: str) -> None:
    q = make_loss(kind, num_qvalue_nets=1).qvalue_network
    loss = moved(make_loss(kind, qvalue_network=[q, q]))
    updater = SoftUpdate(loss, tau=0.5)
    updater.step()
    assert distances(loss) == {0.5}
    # What a target of both is put together of may be another tensor the next time.
    for parameter in loss.qvalue_network.parameters():
        parameter.data = parameter.data + 0.5
    updater.step()
    assert distances(loss) == {0.5}


class Recurrent(nn.Module):
    """A critic that has one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(OBSERVATION + ACTION, OBSERVATION + ACTION)
        self.second = self.first
        self.out = nn.Linear(OBSERVATION + ACTION, 1)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(torch.cat([observation, action], -1)).relu()).relu())


@pytest.mark.parametrize("count", [1, 2])
def test_polyak_moves_a_layer_of_two_names_once(count: int) -> None:
    critic = TensorDictModule(Recurrent(), ["observation", "action"], ["state_action_value"])
    loss = moved(make_loss("continuous", qvalue_network=critic, num_qvalue_nets=count))
    SoftUpdate(loss, tau=0.25).step()
    assert distances(loss) == {0.75}


def test_critics_that_were_given_other_parameters_are_refused(kind: str) -> None:
    loss = make_loss(kind, num_qvalue_nets=1)
    layer = next(module for module in loss.qvalue_network.modules() if isinstance(module, nn.Linear))
    prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(RuntimeError, match=r"the targets have no 'module.*weight_orig'"):
        SoftUpdate(loss, tau=0.5).step()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("change", ["loaded tensors", "other data", "another dtype", "copy", "pickle"])
def test_tensors_that_are_replaced_between_updates_are_the_ones_that_move(kind: str, count: int, change: str) -> None:
    loss = make_loss(kind, num_qvalue_nets=count)
    updater = SoftUpdate(loss, tau=0.25)
    updater.step()
    if change == "loaded tensors":
        loss.load_state_dict({name: tensor.clone() for name, tensor in loss.state_dict().items()}, assign=True)
    elif change == "other data":
        for parameter in loss.parameters():
            parameter.data = parameter.data.clone()
    elif change == "another dtype":
        loss.double()
    else:
        updater = copy.deepcopy(updater) if change == "copy" else pickle.loads(pickle.dumps(updater))
        loss = updater.loss_module
    with torch.no_grad():
        for parameter in loss.qvalue_network.parameters():
            parameter.add_(1.0)
    before = [(target.clone(), source.detach().clone()) for target, source in loss.target_pairs()[0]]
    updater.step()
    for (target, _), (old, source) in zip(loss.target_pairs()[0], before, strict=True):
        torch.testing.assert_close(target, old.lerp(source, 0.25))


@pytest.mark.parametrize("interval", [1, 3])
def test_a_hard_update_fires_at_every_interval(kind: str, interval: int) -> None:
    loss = make_loss(kind)
    updater = HardUpdate(loss, value_network_update_interval=interval)
    fired = []
    for _ in range(9):
        moved(loss)
        updater.step()
        fired.append(distances(loss) == {0.0})
    assert fired == ([False] * (interval - 1) + [True]) * (9 // interval)


@pytest.mark.parametrize("make", [lambda loss: SoftUpdate(loss, tau=0.5), HardUpdate])
def test_a_new_updater_leaves_the_targets_as_they_are(kind: str, make) -> None:
    loss = moved(make_loss(kind))
    make(loss)
    assert distances(loss) == {1.0}


def test_a_resumed_run_continues_as_if_it_had_not_stopped(kind: str) -> None:
    def state(loss: IQLLoss, optimiser: torch.optim.Optimizer, updater: HardUpdate) -> dict:
        return copy.deepcopy({"l": loss.state_dict(), "o": optimiser.state_dict(), "u": updater.state_dict()})

    def run(loss: IQLLoss, optimiser: torch.optim.Optimizer, updater: HardUpdate, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            optimiser.zero_grad()
            total(loss(make_batch(kind))).backward()
            optimiser.step()
            updater.step()

    def new() -> tuple[IQLLoss, torch.optim.Optimizer, HardUpdate]:
        loss = make_loss(kind)
        return loss, torch.optim.Adam(loss.parameters()), HardUpdate(loss, value_network_update_interval=4)

    whole, parts = new(), new()
    parts[0].load_state_dict(whole[0].state_dict())
    run(*whole, 0, 10)
    run(*parts, 0, 6)
    saved, resumed = state(*parts), new()
    for part, key in zip(resumed, "lou", strict=True):
        part.load_state_dict(saved[key])
    run(*resumed, 6, 10)
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, resumed[0].state_dict()[name]), name


class Normalised(nn.Module):
    """A critic with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(OBSERVATION), nn.Linear(OBSERVATION, 4)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(observation))


def test_running_statistics_are_copied() -> None:
    q = TensorDictModule(Normalised(), ["observation"], ["state_action_value"])
    loss = make_loss("discrete", qvalue_network=q, num_qvalue_nets=1)
    updater = SoftUpdate(loss, tau=0.005)
    loss(make_batch("discrete"))
    updater.step()
    target = loss.target_qvalue_network_params["module", "norm", "running_mean"]
    assert target.any()
    assert torch.equal(target, loss.qvalue_network_params["module", "norm", "running_mean"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of eps and tau"),
        ({"eps": 0.9, "tau": 0.1}, "exactly one of eps and tau"),
        ({"eps": 0.005}, r"eps must be in \[0.5, 1\], got 0.005; did you mean tau=0.005"),
        ({"eps": 1.1}, "eps must be in"),
        ({"tau": -0.1}, "tau must be in"),
        ({"tau": 1.1}, "tau must be in"),
    ],
)
def test_a_share_out_of_range_is_refused_before_the_loss_counts_as_updated(options: dict, message: str) -> None:
    loss = make_loss("continuous", updater=False)
    with pytest.raises(ValueError, match=message):
        SoftUpdate(loss, **options)
    with pytest.warns(UserWarning, match="no SoftUpdate or HardUpdate"):
        loss(make_batch("continuous"))


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="value_network_update_interval must be >= 1, got 0"):
        HardUpdate(make_loss("continuous"), value_network_update_interval=0)


def test_only_a_loss_has_targets() -> None:
    with pytest.raises(TypeError, match="loss_module must be an IQLLoss, got Linear"):
        SoftUpdate(nn.Linear(1, 1), tau=0.1)


def test_the_state_of_an_updater_is_checked() -> None:
    updater = HardUpdate(make_loss("continuous"))
    with pytest.raises(KeyError, match=r"has .*counter.*, got"):
        updater.load_state_dict({"count": 3})
    assert updater.counter == 0
