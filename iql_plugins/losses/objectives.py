r"""The two choices that make an algorithm of the family: how V is learned, and how a policy is extracted from Q and V.

Each is an entry of a table. The loss composes one of each, and computes what they ask for once::

    @hookimpl
    def iql_objectives() -> list[ValueObjective | PolicyExtraction]:
        return [ValueObjective("median", loss=lambda of: of.advantage.abs(), weight=exponential_weight)]

    IQLLoss(actor, critic, value, value_objective="median")

An entry is there by its name everywhere that a hyper-parameter is: in the losses, in every adapter, on the command
line, in checkpoints, in compiled steps.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Protocol, TypeVar

from torch import Tensor

from iql_plugins.losses import functional
from iql_plugins.ranges import NON_NEGATIVE, POSITIVE, QUANTILE, Range

__all__ = [
    "SHIPPED",
    "Objective",
    "Option",
    "PolicyExtraction",
    "Quantities",
    "ValueObjective",
    "check_options",
    "exponential_weight",
    "options",
    "policy_extraction",
    "reads_temperature",
    "register",
    "value_objective",
]


class Quantities(Protocol):
    """What the losses of a batch are made of, each computed when it is first asked for, and once.

    ``*B`` is the batch's shape. ``target_q``, ``signal`` and ``target`` have no gradient; ``value``, ``advantage``,
    ``q``, ``log_prob`` and ``policy_q`` have that of their network.
    """

    @property
    def value(self) -> Tensor:
        """``[*B]`` V(s)."""

    @property
    def target_q(self) -> Tensor:
        """``[N, *B]`` Q(s, a) of the target critics."""

    @property
    def advantage(self) -> Tensor:
        """``[*B]`` min Q(s, a) of the target critics - V(s); gradients flow through V."""

    @property
    def signal(self) -> Tensor:
        """``[*B]`` the advantage without what ``noise_threshold`` takes for noise, nor gradient: weights are of it."""

    @property
    def weight(self) -> Tensor:
        """``[*B]`` of the action, as the value objective has it; without gradient."""

    @property
    def log_prob(self) -> Tensor:
        """``[*B]`` log-probability (nats) of the dataset's action."""

    @property
    def policy_q(self) -> Tensor:
        """``[*B]`` min Q(s, π(s)) of the critics at the policy's own action, for discrete actions its expectation.

        Gradients reach the policy, and no parameter of the critics.
        """

    @property
    def mask(self) -> Tensor | None:
        """``[*B]`` bool, True where a sample counts; None where all do. For what a loss takes of the whole batch."""

    def setting(self, name: str) -> Any:
        """A hyper-parameter of the loss, or an option of an objective."""


@dataclass(frozen=True)
class Option:
    """A hyper-parameter that an objective has, and no other one.

    Attributes:
        default: its value unless another one is given.
        range: the values that it may have.
        description: what it is.
    """

    default: float
    range: Range
    description: str


@dataclass(frozen=True, eq=False)
class ValueObjective:
    """How V is learned.

    Attributes:
        name: what users call it.
        loss: ``[*B]`` of V, per sample.
        weight: ``[*B]`` of the action in a policy extraction that weighs actions; without gradient.
        options: by name.
        remedy: what keeps V from growing by the errors of Q, as advice to a user whose values diverge; hyper-parameters
            are in backticks.
        softened_by: the option that makes the weights of actions more equal as it grows, if there is one.
        weighs_all: whether bad actions weigh something, too; where not, it is ordinary that few teach the policy.
    """

    name: str
    loss: Callable[[Quantities], Tensor]
    weight: Callable[[Quantities], Tensor]
    options: Mapping[str, Option] = field(default_factory=dict)
    remedy: str = "a lower `discount`"
    softened_by: str | None = None
    weighs_all: bool = True


@dataclass(frozen=True, eq=False)
class PolicyExtraction:
    """How the policy is learned from Q and V.

    Attributes:
        name: what users call it.
        loss: ``[*B]`` of the policy, per sample.
        options: by name.
        weighs: whether it weighs actions; if not, the health of a batch has all weigh the same.
    """

    name: str
    loss: Callable[[Quantities], Tensor]
    options: Mapping[str, Option] = field(default_factory=dict)
    weighs: bool = True


def exponential_weight(of: Quantities) -> Tensor:
    """``[*B]`` :func:`~iql_plugins.losses.functional.advantage_weight`: min(exp(temperature advantage), max_weight)."""
    return functional.advantage_weight(of.signal, of.setting("temperature"), of.setting("max_weight"))


def _expectile_regression(of: Quantities) -> Tensor:
    return functional.expectile_loss(of.advantage, of.setting("expectile"))


def _quantile_regression(of: Quantities) -> Tensor:
    return functional.quantile_loss(of.advantage, of.setting("quantile"))


def _gumbel_regression(of: Quantities) -> Tensor:
    return functional.gumbel_loss(of.advantage, of.setting("loss_temperature"), of.setting("max_clip"), mask=of.mask)


def _sparse_regression(of: Quantities) -> Tensor:
    return functional.sparse_loss(of.advantage, of.value, of.setting("alpha"))


def _sparse_weight(of: Quantities) -> Tensor:
    return functional.sparse_weight(of.signal, of.setting("max_weight"))


def _exponential_regression(of: Quantities) -> Tensor:
    return functional.exponential_loss(of.advantage, of.value, of.setting("alpha"), mask=of.mask)


def _sharp_exponential_weight(of: Quantities) -> Tensor:
    """``[*B]`` min(exp(10 advantage / alpha), max_weight): ``actor.py``, lines 18 to 21, of github.com/ryanxhr/IVR."""
    return functional.advantage_weight(of.signal, 10.0 / of.setting("alpha"), of.setting("max_weight"))


def _advantage_weighted_regression(of: Quantities) -> Tensor:
    return functional.weighted_log_likelihood(of.log_prob, of.weight)


def _ddpg_bc(of: Quantities) -> Tensor:
    return functional.ddpg_bc_loss(of.policy_q, of.log_prob, of.setting("bc_coefficient"), mask=of.mask)


Objective = ValueObjective | PolicyExtraction
_Kind = TypeVar("_Kind", ValueObjective, PolicyExtraction)
_LARGER_ALPHA = "a larger alpha among the `objective_options`, or a lower `discount`"
#: The entries that need no plugin.
SHIPPED = (
    ValueObjective(
        "expectile",
        _expectile_regression,
        exponential_weight,
        remedy="a lower `expectile` or `discount`",
    ),
    ValueObjective(
        "quantile",
        _quantile_regression,
        exponential_weight,
        {"quantile": Option(0.7, QUANTILE, "τ of the returns that V is, in (0, 1).")},
        "a lower quantile among the `objective_options`, or a lower `discount`",
    ),
    ValueObjective(
        "gumbel",
        _gumbel_regression,
        exponential_weight,
        {
            "loss_temperature": Option(1.0, POSITIVE, "β > 0 of V, in return units; small, V is close to the maximum."),
            "max_clip": Option(7.0, POSITIVE, "the largest exponent, advantage / loss_temperature, that counts."),
        },
        "a larger loss_temperature or a smaller max_clip among the `objective_options`, or `critic_layer_norm`",
    ),
    ValueObjective(
        "sparse",
        _sparse_regression,
        _sparse_weight,
        {"alpha": Option(1.0, POSITIVE, "α > 0, in return units; small, V is close to the maximum.")},
        _LARGER_ALPHA,
        softened_by="alpha",
        weighs_all=False,
    ),
    ValueObjective(
        "exponential",
        _exponential_regression,
        _sharp_exponential_weight,
        {"alpha": Option(2.0, POSITIVE, "α > 0, in return units; small, V is close to the maximum.")},
        _LARGER_ALPHA,
        softened_by="alpha",
    ),
    PolicyExtraction(
        "awr",
        _advantage_weighted_regression,
        {
            "noise_threshold": Option(
                0.0, NON_NEGATIVE, "κ >= 0: advantages within κ times the critics' disagreement count as none."
            )
        },
    ),
    PolicyExtraction(
        "ddpg_bc",
        _ddpg_bc,
        {"bc_coefficient": Option(0.3, NON_NEGATIVE, "α >= 0, what behaviour cloning counts beside the critics.")},
        weighs=False,
    ),
)
# Filled at once, not by register(): that asks for the hyper-parameters, whose module needs this one.
_TABLES: dict[type, dict[str, Any]] = {
    kind: {entry.name: entry for entry in SHIPPED if isinstance(entry, kind)}
    for kind in (ValueObjective, PolicyExtraction)
}
_KINDS = {ValueObjective: "value_objective", PolicyExtraction: "policy_extraction"}
#: Kind and name of the entries that are a plugin's: whoever asks the plugins again gets them again.
_OF_PLUGINS: set[tuple[type, str]] = set()
_LOCK = RLock()


def register(*entries: Objective) -> None:
    """Adds entries to the tables of this process. Those of installed plugins are found by themselves.

    Raises:
        TypeError: for anything else.
        ValueError: for a name that is taken, or an option that has the name of a hyper-parameter.
    """
    with _LOCK:
        _check(entries, {(kind, name) for kind, table in _TABLES.items() for name in table})
        for entry in entries:
            _TABLES[type(entry)][entry.name] = entry


def _register_plugins() -> None:
    """Adds the entries of installed plugins that are not in the tables yet."""
    # Whoever has the name of an entry that ships needs no plugins, and no pluggy.
    from iql_plugins import plugins

    taken = {(kind, name) for kind, table in _TABLES.items() for name in table} - _OF_PLUGINS
    found = plugins.host().objectives(lambda entries: _check(entries, taken))
    with _LOCK:
        for entry in found:
            _TABLES[type(entry)].setdefault(entry.name, entry)
            _OF_PLUGINS.add((type(entry), entry.name))


def _check(entries: Iterable[object], taken: Set[tuple[type, str]]) -> None:
    taken = set(taken)
    for entry in entries:
        if not isinstance(entry, ValueObjective | PolicyExtraction):
            raise TypeError(f"an objective must be a ValueObjective or a PolicyExtraction, got {type(entry).__name__}")
        key = type(entry), entry.name
        if key in taken:
            raise ValueError(f"the {_KINDS[key[0]]} {entry.name!r} is there already: take another name")
        taken.add(key)
        option = entry.softened_by if isinstance(entry, ValueObjective) else None
        if option is not None and option not in entry.options:
            raise ValueError(f"softened_by of {entry.name!r} must be one of its options, got {option!r}")
        if entry.options:
            from iql_plugins.config import hyperparameters

            if shared := sorted(entry.options.keys() & set(hyperparameters())):
                raise ValueError(f"an option of {entry.name!r} has the name of a hyper-parameter: {', '.join(shared)}")


def value_objective(name: str) -> ValueObjective:
    """The entry of that name.

    Raises:
        ValueError: if there is none; lists those that there are.
    """
    return _entry(ValueObjective, name)


def policy_extraction(name: str) -> PolicyExtraction:
    """The entry of that name.

    Raises:
        ValueError: if there is none; lists those that there are.
    """
    return _entry(PolicyExtraction, name)


def _entry(kind: type[_Kind], name: object) -> _Kind:
    table: dict[str, _Kind] = _TABLES[kind]
    if name not in table:
        _register_plugins()
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{_KINDS[kind]} must be one of {', '.join(map(repr, table))}, got {name!r}")
    return table[name]


def options(value: str, policy: str) -> dict[str, Option]:
    """The options of two objectives, by name.

    Raises:
        ValueError: for a name that is none, and for two that have an option of one name.
    """
    of_value, of_policy = value_objective(value).options, policy_extraction(policy).options
    if shared := sorted(of_value.keys() & of_policy.keys()):
        raise ValueError(f"{value!r} and {policy!r} both have the option {', '.join(shared)}: they do not go together")
    return {**of_value, **of_policy}


def reads_temperature(value: str, policy: str) -> bool:
    """Whether actions weigh what the temperature makes of their advantages.

    Raises:
        ValueError: for a name that is none.
    """
    return value_objective(value).weight is exponential_weight and policy_extraction(policy).weighs


def check_options(value: str, policy: str, given: Mapping[str, Any], temperature: float | str, n_critics: int) -> None:
    """Checks what objectives are given.

    Raises:
        ValueError: for an objective that is none, an option that the two do not have, one out of range, an automatic
            temperature that they do not read, or a threshold of noise that a single critic does not tell.
    """
    own = options(value, policy)
    for name, setting in given.items():
        if name not in own:
            have = (
                f"those of {value!r} and {policy!r} are {', '.join(own)}"
                if own
                else f"{value!r} and {policy!r} have none"
            )
            raise ValueError(f"objective_options has {name!r}: {have}")
        own[name].range.check(name, setting)
    if isinstance(temperature, str) and not reads_temperature(value, policy):
        raise ValueError(
            f"temperature={temperature!r} does not go with {value!r} and {policy!r}, which do without a temperature: "
            "leave it a number, or take 'expectile', 'quantile' or 'gumbel' with 'awr'"
        )
    if given.get("noise_threshold", 0.0) and n_critics == 1:
        raise ValueError("noise_threshold is relative to how far critics are apart: it needs two at least, got 1")
