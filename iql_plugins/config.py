"""Every hyper-parameter of the algorithm once, checked, with the presets of the paper's authors and of CORL."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from iql_plugins.functional import (
    LossFunction,
    check_choice,
    check_expectile,
    check_max_weight,
    check_temperature,
)

__all__ = ["PRESETS", "IQLConfig", "preset"]

#: Of all critics together; the largest ensembles that are published have 500 of four each.
MOST_LAYERS = 4096

ActorSchedule = Literal["cosine", "constant"]
Compile = Literal["auto", "yes", "no"]


@dataclass(frozen=True, kw_only=True)
class IQLConfig:
    """The hyper-parameters of a training; the defaults are those of the authors for locomotion.

    Attributes:
        n_steps: gradient steps of the whole training, the horizon of the actor's schedule.
        batch_size: transitions a step.
        discount: γ, what a reward is worth one step later, in [0, 1].
        expectile: τ of the returns that V is; in (0, 1], with discrete actions below 1.
        temperature: inverse temperature β >= 0, relative to the scale of returns; 0 is behaviour cloning.
        max_weight: the largest weight of an action in the policy's loss.
        loss_function: distance of Q to its target: "l1", "l2" or "smooth_l1".
        n_critics: number of critics.
        hidden_sizes: widths of the hidden layers, in every network.
        actor_dropout: probability of dropping a hidden unit of the actor while it trains.
        squashed: whether the policy squashes its samples, and not its mean alone as the paper's does.
        actor_learning_rate: Adam's rate for the policy.
        critic_learning_rate: Adam's rate for the critics.
        value_learning_rate: Adam's rate for V.
        actor_schedule: "cosine" takes the policy's rate to 0 at n_steps and holds it there; "constant".
        polyak: share of the critics in each update of their targets, in [0, 1].
        max_grad_norm: the largest norm of each network's gradient; None for no clipping.
        normalize_observations: whether to standardise observations by the dataset's mean and deviation.
        reward_scale: factor of rewards, or "return_range": 1000 over the range of the dataset's returns.
        reward_shift: added to the scaled rewards.
        clip_all_actions: whether to train on data of which most actions are beyond the environment's bounds, or one is
            by an order of magnitude. Fewer are clipped in any case, as environments clip them.
        compile: whether to compile losses and gradients: "yes", "no", or "auto": if there is a compiler
            and the training is long enough for it.

    Raises:
        ValueError: for a value out of range; names it.
    """

    n_steps: int = 1_000_000
    batch_size: int = 256
    discount: float = 0.99
    expectile: float = 0.7
    temperature: float = 3.0
    max_weight: float = 100.0
    loss_function: LossFunction = "l2"
    n_critics: int = 2
    hidden_sizes: tuple[int, ...] = (256, 256)
    actor_dropout: float = 0.0
    squashed: bool = False
    actor_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    value_learning_rate: float = 3e-4
    actor_schedule: ActorSchedule = "cosine"
    polyak: float = 0.005
    max_grad_norm: float | None = None
    normalize_observations: bool = False
    reward_scale: float | Literal["return_range"] = 1.0
    reward_shift: float = 0.0
    clip_all_actions: bool = False
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        check_expectile(self.expectile)
        check_temperature(self.temperature)
        check_max_weight(self.max_weight)
        check_choice("loss_function", self.loss_function, LossFunction)
        check_choice("actor_schedule", self.actor_schedule, ActorSchedule)
        check_choice("compile", self.compile, Compile)
        for name in ("n_steps", "batch_size", "n_critics"):
            _check(name, getattr(self, name), _is_count(getattr(self, name)), "an integer >= 1")
        sizes: Any = self.hidden_sizes
        valid = isinstance(sizes, list | tuple) and all(map(_is_count, sizes))
        _check("hidden_sizes", sizes, valid, "a tuple of integers >= 1")
        object.__setattr__(self, "hidden_sizes", tuple(sizes))
        layers = self.n_critics * (len(sizes) + 1)
        if layers > MOST_LAYERS:
            raise ValueError(
                f"n_critics and hidden_sizes must make at most {MOST_LAYERS} layers of critics, got {layers}"
            )
        for name in ("squashed", "normalize_observations", "clip_all_actions"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        for name in ("discount", "polyak"):
            _check(name, getattr(self, name), 0.0 <= getattr(self, name) <= 1.0, "in [0, 1]")
        _check("actor_dropout", self.actor_dropout, 0.0 <= self.actor_dropout < 1.0, "in [0, 1)")
        for name in ("actor_learning_rate", "critic_learning_rate", "value_learning_rate"):
            _check(name, getattr(self, name), 0.0 <= getattr(self, name) < math.inf, "a finite number >= 0")
        if self.max_grad_norm is not None:
            _check("max_grad_norm", self.max_grad_norm, 0.0 < self.max_grad_norm < math.inf, "a finite number > 0")
        if self.reward_scale != "return_range":
            number: Any = self.reward_scale
            valid = isinstance(number, int | float) and 0.0 < number < math.inf
            _check("reward_scale", self.reward_scale, valid, "a finite number > 0 or 'return_range'")
        _check("reward_shift", self.reward_shift, math.isfinite(self.reward_shift), "a finite number")

    def replace(self, **changes: Any) -> "IQLConfig":
        """A copy with some hyper-parameters changed.

        Raises:
            TypeError: for a name that is none of them; lists them.
        """
        _check_names(changes)
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The hyper-parameters as JSON values."""
        return asdict(self) | {"hidden_sizes": list(self.hidden_sizes)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "IQLConfig":
        """The hyper-parameters of :meth:`to_json`.

        Raises:
            TypeError: for a name that is no hyper-parameter.
            ValueError: for a value out of range.
        """
        _check_names(document)
        return cls(**{**document, "hidden_sizes": tuple(document.get("hidden_sizes", cls.hidden_sizes))})


#: What each preset changes of the defaults. Sources: the authors' configurations; CORL's for maze2d. ``pendulum`` is
#: ours, for the dataset that ships: small networks, few steps.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "locomotion": {"expectile": 0.7, "temperature": 3.0, "reward_scale": "return_range"},
        "antmaze": {"expectile": 0.9, "temperature": 10.0, "reward_shift": -1.0},
        "antmaze-finetune": {
            "expectile": 0.9,
            "temperature": 10.0,
            "reward_shift": -1.0,
            "actor_schedule": "constant",
        },
        "kitchen": {"expectile": 0.7, "temperature": 0.5, "actor_dropout": 0.1},
        "adroit": {"expectile": 0.7, "temperature": 0.5, "actor_dropout": 0.1},
        "maze2d": {"expectile": 0.7, "temperature": 3.0, "normalize_observations": True},
        "pendulum": {
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


def preset(name: str, **changes: Any) -> IQLConfig:
    """A preset's hyper-parameters, some of them changed.

    >>> preset("antmaze", n_steps=10).temperature
    10.0

    Raises:
        ValueError: for a name that is no preset; lists them.
        TypeError: for a change of what is no hyper-parameter.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return IQLConfig().replace(**{**PRESETS[name], **changes})


def _check(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_names(changes: Mapping[str, Any]) -> None:
    names = [field.name for field in fields(IQLConfig)]
    if unknown := sorted(changes.keys() - set(names)):
        raise TypeError(f"{', '.join(unknown)}: no hyper-parameter of IQL; they are {', '.join(names)}")
