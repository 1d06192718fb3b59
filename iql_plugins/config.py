"""Every hyper-parameter of the algorithm once, checked, with the presets of the paper's authors and of CORL."""

import re
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from iql_plugins.architecture import ACTIVATIONS, ActivationName, Initialization, Role
from iql_plugins.losses.functional import LOSS_FUNCTION, LossFunction
from iql_plugins.losses.objectives import SHIPPED, PolicyExtraction, ValueObjective, check_options
from iql_plugins.ranges import (
    AUTOMATIC,
    COUNT,
    COUNTS,
    EXPECTILE,
    FINITE,
    FLAG,
    NON_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    TEMPERATURE,
    Range,
    choice,
)

__all__ = ["PRESETS", "Home", "IQLConfig", "check", "hyperparameters", "preset", "renamed"]

#: Of all critics together; the largest ensembles that are published have 500 of four each.
MOST_LAYERS = 4096

ActorSchedule = Literal["cosine", "constant"]
Compile = Literal["auto", "yes", "no"]
#: What takes a hyper-parameter: the loss's constructor; the estimator of Q's target; what builds networks; the
#: learner; who draws batches; who prepares the data.
Home = Literal["loss", "target", "networks", "learner", "batches", "data"]

_ACTOR_SCHEDULE, _COMPILE = choice(ActorSchedule), choice(Compile)
_ACTIVATION, _INITIALIZATION = choice(ActivationName), choice(Initialization)
_NAME = Range("a name", lambda value: isinstance(value, str))
_OPTIONS = Range("a mapping", lambda value: isinstance(value, Mapping))
_NONE = Range("None", lambda value: value is None)
_RETURN_RANGE = Range("'return_range'", lambda value: isinstance(value, str) and value == "return_range")


def _declared(default: Any, valid: Range, home: Home, description: str) -> Any:
    """A hyper-parameter; all that is known of it is derived from here."""
    return field(default=default, metadata={"range": valid, "home": home, "description": description})


def _entries(kind: type) -> str:
    """The objectives of a kind that ship, in words."""
    names = [f'"{entry.name}"' for entry in SHIPPED if isinstance(entry, kind)]
    return f"{', '.join(names)}, or a plugin's."


@dataclass(frozen=True, kw_only=True)
class IQLConfig:
    """The hyper-parameters of a training; the defaults are those of the authors for locomotion, but for the schedule.

    The policy's rate stays: the authors' cosine brings nothing in what was measured (``tests/learning/README.md``), and
    costs something on Hopper. Presets with the authors' numbers have it.

    Raises:
        ValueError: for a value out of range; names it.
    """

    n_steps: int = _declared(
        1_000_000, COUNT, "learner", "gradient steps of the whole training, the horizon of the actor's schedule."
    )
    batch_size: int = _declared(256, COUNT, "batches", "transitions a step.")
    discount: float = _declared(0.99, SHARE, "target", "γ, what a reward is worth one step later, in [0, 1].")
    expectile: float = _declared(
        0.7, EXPECTILE, "loss", "τ of the returns that V is; in (0, 1], with discrete actions below 1."
    )
    temperature: float | str = _declared(
        3.0,
        TEMPERATURE | AUTOMATIC,
        "loss",
        "inverse temperature β >= 0, relative to the scale of returns; 0 is behaviour cloning. auto moves it until the "
        "effective sample size is 0.7 of a batch, auto_0.5 0.5. Sparse, exponential and ddpg_bc do without.",
    )
    max_weight: float = _declared(100.0, POSITIVE, "loss", "the largest weight of an action in the policy's loss.")
    loss_function: LossFunction | str = _declared(
        "l2",
        LOSS_FUNCTION,
        "loss",
        "distance of Q to its target; huber_20 is Huber's, quadratic below 20.",
    )
    value_objective: str = _declared("expectile", _NAME, "loss", f"how V is learned: {_entries(ValueObjective)}")
    policy_extraction: str = _declared(
        "awr", _NAME, "loss", f"how the policy is learned from Q and V: {_entries(PolicyExtraction)}"
    )
    objective_options: Mapping[str, float] = field(
        default_factory=dict,
        hash=False,
        metadata={
            "range": _OPTIONS,
            "home": "loss",
            "description": "hyper-parameters that these two alone have, by name.",
        },
    )
    n_critics: int = _declared(2, COUNT, "networks", "number of critics.")
    hidden_sizes: tuple[int, ...] = _declared(
        (256, 256), COUNTS, "networks", "widths of the hidden layers, in every network."
    )
    actor_hidden_sizes: tuple[int, ...] | None = _declared(
        None, COUNTS | _NONE, "networks", "widths of the actor's; None for hidden_sizes."
    )
    critic_hidden_sizes: tuple[int, ...] | None = _declared(
        None, COUNTS | _NONE, "networks", "widths of the critics' and V's; None for hidden_sizes."
    )
    activation: ActivationName = _declared(
        "relu", _ACTIVATION, "networks", "what comes behind each hidden layer of every perceptron."
    )
    actor_layer_norm: bool = _declared(
        False, FLAG, "networks", "whether LayerNorm comes before each activation of the actor."
    )
    critic_layer_norm: bool = _declared(
        False, FLAG, "networks", "whether LayerNorm comes before each activation of the critics and of V."
    )
    value_layer_norm: bool | None = _declared(
        None, FLAG | _NONE, "networks", "whether it comes before each activation of V; None for critic_layer_norm."
    )
    actor_dropout: float = _declared(
        0.0, PROBABILITY, "networks", "probability of dropping a hidden unit of the actor while it trains."
    )
    value_dropout: float = _declared(
        0.0,
        PROBABILITY,
        "networks",
        "probability of dropping a hidden unit of V in V's own loss; targets and advantages are without.",
    )
    initialization: Initialization = _declared(
        "orthogonal",
        _INITIALIZATION,
        "networks",
        'of the perceptrons: "orthogonal" of gain √2, the authors\', or "torch", torch\'s own.',
    )
    squashed: bool = _declared(
        False, FLAG, "networks", "whether the policy squashes its samples, and not its mean alone as the paper's does."
    )
    actor_learning_rate: float = _declared(3e-4, NON_NEGATIVE, "learner", "Adam's rate for the policy.")
    critic_learning_rate: float = _declared(3e-4, NON_NEGATIVE, "learner", "Adam's rate for the critics.")
    value_learning_rate: float = _declared(3e-4, NON_NEGATIVE, "learner", "Adam's rate for V.")
    actor_schedule: ActorSchedule = _declared(
        "constant",
        _ACTOR_SCHEDULE,
        "learner",
        '"cosine" takes the policy\'s rate to 0 at n_steps and holds it there; "constant".',
    )
    polyak: float = _declared(
        0.005, SHARE, "learner", "share of the critics in each update of their targets, in [0, 1]."
    )
    max_grad_norm: float | None = _declared(
        None, POSITIVE | _NONE, "learner", "the largest norm of each network's gradient; None for no clipping."
    )
    normalize_observations: bool = _declared(
        False, FLAG, "data", "whether to standardise observations by the dataset's mean and deviation."
    )
    reward_scale: float | Literal["return_range"] = _declared(
        1.0,
        POSITIVE | _RETURN_RANGE,
        "data",
        'factor of rewards, or "return_range": 1000 over the range of the dataset\'s returns.',
    )
    reward_shift: float = _declared(0.0, FINITE, "data", "added to the scaled rewards.")
    clip_all_actions: bool = _declared(
        False,
        FLAG,
        "data",
        "whether to train on data of which most actions are beyond the environment's bounds, or one is by an order of "
        "magnitude. Fewer are clipped in any case, as environments clip them.",
    )
    compile: Compile = _declared(
        "auto",
        _COMPILE,
        "learner",
        'whether to compile losses and gradients: "yes", "no", or "auto": if there is a compiler and the training is '
        "long enough for it.",
    )

    def __post_init__(self) -> None:
        check(**self.of())
        check_options(
            self.value_objective, self.policy_extraction, self.objective_options, self.temperature, self.n_critics
        )
        for name in ("hidden_sizes", "actor_hidden_sizes", "critic_hidden_sizes"):
            if (sizes := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(sizes))
        object.__setattr__(self, "objective_options", dict(self.objective_options))
        layers = self.n_critics * (len(self.sizes_of("critic")) + 1)
        if layers > MOST_LAYERS:
            name = "hidden_sizes" if self.critic_hidden_sizes is None else "critic_hidden_sizes"
            raise ValueError(f"n_critics and {name} must make at most {MOST_LAYERS} layers of critics, got {layers}")
        if len(self.sizes_of("actor")) > MOST_LAYERS:
            raise ValueError(f"actor_hidden_sizes must make at most {MOST_LAYERS} layers")

    def replace(self, **changes: Any) -> "IQLConfig":
        """A copy with some hyper-parameters changed.

        Raises:
            TypeError: for a name that is none of them; lists them.
        """
        _check_names(changes)
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The hyper-parameters as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def of(self, *homes: Home) -> dict[str, Any]:
        """The hyper-parameters that these take, by name."""
        return {name: copy(getattr(self, name)) for name in hyperparameters(*homes)}

    def sizes_of(self, role: Role) -> tuple[int, ...]:
        """Widths of the hidden layers of a network; V has those of the critics."""
        own = self.actor_hidden_sizes if role == "actor" else self.critic_hidden_sizes
        return self.hidden_sizes if own is None else own

    def layer_norm_of(self, role: Role) -> bool:
        """Whether a network has LayerNorm; V has it as the critics do, unless it is said of V."""
        if role == "actor":
            return self.actor_layer_norm
        own = self.value_layer_norm if role == "value" else None
        return self.critic_layer_norm if own is None else own

    def network(self, role: Role) -> dict[str, Any]:
        """The arguments of a builder of :mod:`iql_plugins.networks`; ``networks_for`` takes the actor's dropout."""
        options = {
            "hidden_sizes": self.sizes_of(role),
            "activation": ACTIVATIONS[self.activation],
            "layer_norm": self.layer_norm_of(role),
            "initialization": self.initialization,
        }
        return options | ({"dropout": self.value_dropout} if role == "value" else {})

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "IQLConfig":
        """The hyper-parameters of :meth:`to_json`.

        Raises:
            TypeError: for a name that is no hyper-parameter.
            ValueError: for a value out of range.
        """
        _check_names(document)
        return cls(**document)


# For help() and for the command line's, which reads it.
IQLConfig.__doc__ = (IQLConfig.__doc__ or "").replace(
    "    Raises:",
    "    Attributes:\n"
    + "".join(f"        {each.name}: {each.metadata['description']}\n" for each in fields(IQLConfig))
    + "\n    Raises:",
)


def check(**values: object) -> None:
    """Raises ``ValueError`` that names the first of these hyper-parameters which is out of its range."""
    for each in fields(IQLConfig):
        if each.name in values:
            each.metadata["range"].check(each.name, values[each.name])


def renamed(error: ValueError, names: Mapping[str, str]) -> ValueError:
    """An error about a hyper-parameter, by the name that users of a framework know.

    >>> renamed(ValueError("discount must be in [0, 1], got 2.0"), {"discount": "gamma"})
    ValueError('gamma must be in [0, 1], got 2.0')
    """
    return ValueError(re.sub(r"^\w+", lambda found: names.get(found[0], found[0]), str(error)))


def hyperparameters(*homes: Home) -> tuple[str, ...]:
    """The names of those that one of these takes; of all of them without an argument.

    >>> hyperparameters("target", "batches")
    ('batch_size', 'discount')
    """
    return tuple(each.name for each in fields(IQLConfig) if not homes or each.metadata["home"] in homes)


_PAPER = "-paper"
_LOCOMOTION = {"expectile": 0.7, "temperature": 3.0, "reward_scale": "return_range"}
_COSINE = {"actor_schedule": "cosine"}
#: What each preset changes of the defaults. Sources: the authors' configurations, but for ``locomotion``:
#: its observations are standardised, and its policy's rate stays, because that brings more on such data
#: (``tests/learning/README.md``); ``locomotion-paper`` is theirs in that, too. CORL's for maze2d. ``pendulum`` is ours,
#: for the dataset that ships: small networks, few steps, and the cosine that the documented figures were made with.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "locomotion": {**_LOCOMOTION, "normalize_observations": True},
        f"locomotion{_PAPER}": {**_LOCOMOTION, **_COSINE},
        "antmaze": {"expectile": 0.9, "temperature": 10.0, "reward_shift": -1.0, **_COSINE},
        "antmaze-finetune": {"expectile": 0.9, "temperature": 10.0, "reward_shift": -1.0},
        "kitchen": {"expectile": 0.7, "temperature": 0.5, "actor_dropout": 0.1, **_COSINE},
        "adroit": {"expectile": 0.7, "temperature": 0.5, "actor_dropout": 0.1, **_COSINE},
        "maze2d": {"expectile": 0.7, "temperature": 3.0, "normalize_observations": True, **_COSINE},
        "pendulum": {
            **_COSINE,
            "n_steps": 4000,
            "hidden_sizes": (128, 128),
            "actor_learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "value_learning_rate": 1e-3,
            "normalize_observations": True,
            "reward_scale": "return_range",
        },
    }
)


_IVR_ANTMAZE = dict.fromkeys(("actor_learning_rate", "critic_learning_rate", "value_learning_rate"), 2e-4)
#: What the authors of an objective change of a preset: the configurations and scripts of github.com/ryanxhr/IVR
#: for "sparse" and "exponential", which have none for antmaze-finetune: there they are antmaze's; those of
#: github.com/Div99/XQL for "gumbel" (``offline/reproduce``, the consistent ones; its README for antmaze-finetune;
#: the critics' loss: ``offline/critic.py``, line 126).
#: For "ddpg_bc" the scale of behaviour cloning of GCIQL in github.com/seohongpark/ogbench
#: (``impls/hyperparameters.sh``, lines 6 to 97 for point mazes, and 110 to 201 for those of ants, but for data that
#: explore); what else is there is of goals and of wider networks.
#: Under ``""`` what they have everywhere; of the other presets they have no numbers.
OF_OBJECTIVES: Mapping[tuple[str, str], Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        ("value_objective", "gumbel"): {
            "": {"value_layer_norm": True, "loss_function": "huber_20"},
            "locomotion": {"objective_options": {"loss_temperature": 2.0}},
            "antmaze": {"objective_options": {"loss_temperature": 0.6}, "actor_schedule": "constant"},
            "antmaze-finetune": {"objective_options": {"loss_temperature": 0.8, "max_clip": 5.0}},
            "kitchen": {"objective_options": {"loss_temperature": 5.0}},
            "adroit": {"objective_options": {"loss_temperature": 5.0}},
        },
        ("value_objective", "sparse"): {
            "": {"value_layer_norm": True},
            "locomotion": {"objective_options": {"alpha": 1.0}},
            "antmaze": {"objective_options": {"alpha": 0.1}, **_IVR_ANTMAZE},
            "antmaze-finetune": {"objective_options": {"alpha": 0.1}, **_IVR_ANTMAZE},
            "kitchen": {"objective_options": {"alpha": 0.5}},
        },
        ("value_objective", "exponential"): {
            "": {"value_layer_norm": True},
            "locomotion": {"objective_options": {"alpha": 2.0}},
            "antmaze": {"objective_options": {"alpha": 0.5}, **_IVR_ANTMAZE},
            "antmaze-finetune": {"objective_options": {"alpha": 0.5}, **_IVR_ANTMAZE},
            "kitchen": {"objective_options": {"alpha": 2.0}},
        },
        ("policy_extraction", "ddpg_bc"): {
            "antmaze": {"objective_options": {"bc_coefficient": 0.3}},
            "maze2d": {"objective_options": {"bc_coefficient": 0.003}},
        },
    }
)


def preset(name: str, **changes: Any) -> IQLConfig:
    """A preset's hyper-parameters, some of them changed; with another objective, those that its authors take there.

    >>> preset("antmaze", n_steps=10).temperature
    10.0
    >>> preset("antmaze", value_objective="sparse").objective_options
    {'alpha': 0.1}
    >>> preset("maze2d", policy_extraction="ddpg_bc").objective_options
    {'bc_coefficient': 0.003}

    Raises:
        ValueError: for a name that is no preset; lists them.
        TypeError: for a change of what is no hyper-parameter.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    settings: dict[str, Any] = dict(PRESETS[name])
    options: dict[str, float] = {}
    for kind in ("value_objective", "policy_extraction"):
        of_objective = OF_OBJECTIVES.get((kind, changes.get(kind, "")), {})
        for own in (of_objective.get("", {}), of_objective.get(name.removesuffix(_PAPER), {})):
            settings |= own
            options |= own.get("objective_options", {})
    options |= changes.get("objective_options", {})
    return IQLConfig().replace(**{**settings, **changes, "objective_options": options})


def _check_names(changes: Mapping[str, Any]) -> None:
    names = hyperparameters()
    if unknown := sorted(changes.keys() - set(names)):
        raise TypeError(f"{', '.join(unknown)}: no hyper-parameter of IQL; they are {', '.join(names)}")
