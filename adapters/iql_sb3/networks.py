"""The loss's networks as Stable-Baselines3's users know them: an actor, critics, features extractors."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.optim import Optimizer

from iql_plugins.data.normalizers import Normalizers
from iql_plugins.losses.iql import IQLLoss
from iql_plugins.networks.builders import check_loaded, uninitialized
from iql_plugins.networks.calls import distribution, outputs
from iql_plugins.networks.encoders import ObservationEncoder
from iql_plugins.spaces import Discrete, Spaces
from iql_sb3.optimizers import NetworkOptimizer

if TYPE_CHECKING:
    from iql_sb3.policies import IQLPolicy

__all__ = ["Actor", "Critic", "FeaturesEncoder", "Inputs", "Loaded"]


class Inputs:
    """From observations as Stable-Baselines3 hands them over to what the networks read.

    Args:
        known: the spaces.
        normalizers: standardise the observations.
    """

    def __init__(self, known: Spaces, normalizers: Normalizers) -> None:
        self.spaces = known
        self.normalizers = normalizers

    def __call__(self, observation: PyTorchObs) -> dict[NestedKey, Tensor]:
        """``[B, *obs]`` by observation key."""
        return {key: self.network(key, observation[key[-1]] if isinstance(key, tuple) else observation)
                for key in self.spaces.observations}  # fmt: skip

    def network(self, key: NestedKey, value: Any) -> Tensor:
        """``[B, *obs]`` in the networks' units, for one of the layout's observation keys."""
        space = self.spaces.observations[key]
        if isinstance(space, Discrete):
            index: Tensor = value.unsqueeze(-1) if value.ndim == 1 else value
            return index
        if space.dtype == "float32":
            value = value.to(torch.get_default_dtype())
        return self.normalizers.observation(key, value)


class FeaturesEncoder(ObservationEncoder):
    """A features extractor, with Stable-Baselines3's preprocessing, in the place of the core's own encoder.

    Args:
        keys: the observations' keys, in the order in which :meth:`forward` takes them.
        observation_space: the environment's.
        extractor: what turns preprocessed observations into features.
        normalize_images: whether pixels are divided by 255.
    """

    def __init__(
        self,
        keys: Sequence[NestedKey],
        observation_space: spaces.Space[Any],
        extractor: BaseFeaturesExtractor,
        normalize_images: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.spaces = tuple(keys)
        self.observation_space = observation_space
        self.extractor = extractor
        self.normalize_images = normalize_images
        self.size = extractor.features_dim

    def forward(self, *observations: Tensor) -> Tensor:
        """``[B, features]`` of one tensor ``[B, *obs]`` for each key."""
        keys: Any = self.spaces
        given: Any = observations[0]
        if isinstance(self.observation_space, spaces.Dict):
            given = {key[-1]: tensor for key, tensor in zip(keys, observations, strict=True)}
        features: Tensor = self.extractor(preprocess_obs(given, self.observation_space, self.normalize_images))
        return features


class Loaded(BaseModel):
    """What :meth:`load` makes of a file, which has all weights: none is drawn before."""

    @classmethod
    def load(cls, path: str, device: torch.device | str = "auto") -> Any:
        """As any model's.

        Raises:
            RuntimeError: if the file has other names or shapes than the networks, or not all of them.
        """
        with uninitialized():
            model = super().load(path, device)
        check_loaded(model)
        return model


class _View(Loaded):
    """A network of the loss as Stable-Baselines3's users call it; it holds the loss's own module.

    Args:
        policy: whose loss it is, or what builds one like it: a file has no policy.
        name: the network's in the loss.

    Attributes:
        features_extractor: what observations go through first; None where that is an encoder of the core's. Where N
            critics have one each, its parameters are those of all of them, and calling it is calling the first one's.
    """

    def __init__(self, policy: "IQLPolicy | partial[IQLPolicy]", name: str) -> None:
        policy = policy() if isinstance(policy, partial) else policy
        super().__init__(
            policy.observation_space,
            policy.action_space,
            policy.features_extractor_class,
            policy.features_extractor_kwargs,
            normalize_images=policy.normalize_images,
        )
        self._name = name
        self.network = policy.loss.get_stateful_net(name, copy=False)
        self.normalizers = policy.normalizers
        self.inputs = policy.inputs
        # No submodules: the policy has the view, and the network has the extractor.
        self.__dict__["_policy"] = policy
        self.__dict__["features_extractor"] = self._extractor()

    @property
    def optimizer(self) -> Optimizer:
        """What of a model's optimiser trains the network. Targets, and networks without a model, have none."""
        optimizer: Optimizer | None = self.__dict__.get("_optimizer")
        if optimizer is None:
            raise AttributeError("optimizer")
        return optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, NetworkOptimizer):
            raise AttributeError(
                f"{type(optimizer).__name__} would train nothing, the model's learner has one optimiser for all "
                "networks: give optimizer_class and optimizer_kwargs in policy_kwargs, or write into its param_groups"
            )
        self.__dict__["_optimizer"] = optimizer

    def train(self, mode: bool = True) -> Any:
        """As any module's. A training goes on with all networks in their training mode, whoever switched one."""
        if not mode and self._name != "target_qvalue_network":
            self._owner.training = False
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; what a state of an earlier release does not have, the normalisers', stays as it is."""
        if not any(name.startswith("normalizers.") for name in state_dict):
            own = self.normalizers.state_dict(prefix="normalizers.")
            state_dict = {**own, **state_dict}
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def _owner(self) -> "IQLPolicy":
        policy: IQLPolicy = self.__dict__["_policy"]
        return policy

    def _extractor(self) -> nn.Module | None:
        encoders = ((name, m) for name, m in self.network.named_modules() if isinstance(m, ObservationEncoder))
        name, encoder = next(encoders, ("", None))
        if isinstance(encoder, FeaturesEncoder):
            return self._callable(f"{name}.extractor", encoder.extractor)
        flat = encoder is None and isinstance(self.observation_space, spaces.Box)
        return FlattenExtractor(self.observation_space) if flat else None

    def _callable(self, name: str, extractor: nn.Module) -> nn.Module:
        """An extractor of the network, under its name there, as something that can be called."""
        return extractor

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {"policy": partial(type(self._owner), **self._owner._get_constructor_parameters())}


class Actor(_View, BasePolicy):
    """The policy: observations in the environment's units to actions in [-1, 1], or to discrete actions.

    Args:
        policy: see :class:`_View`.
    """

    def __init__(self, policy: "IQLPolicy | partial[IQLPolicy]") -> None:
        super().__init__(policy, "actor_network")

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> Tensor:
        """``[B, act]`` in [-1, 1], where the bounds of the action space are ±1; ``[B]`` discrete actions.

        Args:
            obs: ``[B, *obs]``, or such tensors by name.
            deterministic: the mean (the likeliest of discrete actions), or a sample from torch's random state.
        """
        inputs = self.inputs(obs)
        policy = distribution(self.network, inputs, next(iter(inputs.values())).shape[:1])
        action: Tensor = policy.deterministic_sample if deterministic else policy.sample()
        if self.inputs.spaces.discrete:
            return self.normalizers.environment_action(action)
        # Samples of the paper's policy may leave the bounds.
        return action.clamp(-1.0, 1.0)

    @property
    def squash_output(self) -> bool:
        """Whether actions are in [-1, 1], and are scaled to the action space."""
        return isinstance(self.action_space, spaces.Box)

    def unscale_action(self, scaled_action: Any) -> Any:
        """The action in the environment's units, which rounding does not take past the bounds."""
        action = super().unscale_action(scaled_action)
        assert isinstance(self.action_space, spaces.Box)
        return action.clip(self.action_space.low, self.action_space.high)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self(observation, deterministic)  # type: ignore[no-any-return]


class Critic(_View):
    """The critics, or their targets: with N of them each tensor is one, ``[N, ...]``.

    Args:
        policy: see :class:`_View`.
        name: ``"qvalue_network"`` or ``"target_qvalue_network"``.
    """

    def __init__(self, policy: "IQLPolicy | partial[IQLPolicy]", name: str) -> None:
        super().__init__(policy, name)

    def forward(self, obs: PyTorchObs, actions: Tensor | None = None) -> tuple[Tensor, ...]:
        """``[B, 1]`` of each critic; ``[B, n]`` for all n discrete actions, which need no ``actions``.

        Args:
            obs: ``[B, *obs]``, or such tensors by name.
            actions: ``[B, act]`` in [-1, 1].
        """
        inputs = self.inputs(obs)
        if not self.inputs.spaces.discrete:
            if actions is None:
                raise TypeError("the critics of continuous actions need actions")
            inputs["action"] = actions
        batch = inputs | {}
        shape = next(iter(batch.values())).shape[:1]
        slices = _slices(self._owner.loss, self._name)
        if not slices:
            return (outputs(self.network, batch, shape)["state_action_value"],)
        values = []
        for tensors in slices:
            called = torch.func.functional_call(self.network, tensors, (TensorDict(dict(batch), shape),))
            values.append(called["state_action_value"])
        return tuple(values)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As any module's; those of targets, buffers of the loss, are named as the critics' own."""
        if self._name != "target_qvalue_network":
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        buffers = dict(self.named_buffers(prefix, recurse, remove_duplicate=False))
        for name, _ in self._owner.critic.named_parameters(prefix, recurse, remove_duplicate):
            yield name, buffers[name]  # type: ignore[misc]

    def _extractor(self) -> nn.Module | None:
        shared = self._owner.share_features_extractor and self._name == "qvalue_network"
        return self._owner.actor.features_extractor if shared else super()._extractor()

    def _callable(self, name: str, extractor: nn.Module) -> nn.Module:
        if not _slices(self._owner.loss, self._name):
            return extractor
        # It has the extractor's tensors and submodules, and is called in another way than the critics call that.
        called = copy.copy(extractor)
        called.forward = partial(_first, self._owner.loss, self._name, name, extractor)
        return called

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"name": self._name}


def _slices(loss: IQLLoss, network: str) -> list[dict[str, Tensor]]:
    """The tensors of each of N stacked critics, by name; none of a single one, which can be called as it is."""
    stacked = getattr(loss, f"{network}_params")
    return [
        {".".join(key) if isinstance(key, tuple) else key: tensor for key, tensor in critic.items(True, True)}
        for critic in (stacked.unbind(0) if stacked.batch_size else ())
    ]


def _first(loss: IQLLoss, network: str, path: str, extractor: nn.Module, observations: PyTorchObs) -> Tensor:
    """Features ``[B, features]`` of the first of N critics."""
    first = {
        name.removeprefix(f"{path}."): tensor
        for name, tensor in _slices(loss, network)[0].items()
        if name.startswith(f"{path}.")
    }
    features: Tensor = torch.func.functional_call(extractor, first, (observations,))
    return features
