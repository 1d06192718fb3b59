"""Off-policy evaluation: held against exact values, plain loops, and d3rlpy's own."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from agents import SPACES, make_agent, make_dataset
from requirements import needs_compiler
from tensordict import TensorDict
from torch.distributions import Independent, Normal

from iql_plugins import ope
from iql_plugins.config import IQLConfig
from iql_plugins.data.normalizers import Normalizers
from iql_plugins.ope import Criterion, Policy, estimators
from iql_plugins.ope.estimators import Array, ImportanceSampled
from iql_plugins.ope.intervals import bootstrap_interval
from iql_plugins.ope.policies import log_probabilities
from iql_plugins.spaces import Box, Discrete, Spaces
from iql_plugins.training.agent import Agent

GAMMA = 0.9
#: One linear layer over states that are one-hot is a table.
TABLE = IQLConfig(
    n_steps=1200, hidden_sizes=(), discount=GAMMA, critic_learning_rate=1e-2, polyak=0.1, compile="no",
    actor_learning_rate=1e-2, reward_scale=0.1, reward_shift=5.0,
)  # fmt: skip


def transitions(state: Any, action: Any, reward: Any, following: Any, done: Any, terminated: Any) -> TensorDict:
    """A dataset of columns ``[N]`` or ``[N, features]``."""

    def column(values: Any, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.as_tensor(np.asarray(values)).to(dtype)
        return tensor if tensor.ndim == 2 else tensor.unsqueeze(-1)

    kinds = {True: torch.float32, False: torch.int64}
    states, actions = (kinds[np.asarray(values).dtype.kind == "f"] for values in (state, action))
    return TensorDict(
        {
            "observation": column(state, states),
            "action": column(action, actions),
            "next": {
                "observation": column(following, states),
                "reward": column(reward, torch.float32),
                "done": column(done, torch.bool),
                "terminated": column(terminated, torch.bool),
            },
        },
        [len(np.asarray(reward))],
    )


class Mdp:
    """Four states, two actions of which one ends in a terminal state, and a policy that draws; solved exactly."""

    spaces = Spaces(Discrete(4), Discrete(2, start=1))

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        # As often in the data as the probabilities are.
        counts = random.multinomial(5, [0.25] * 4, size=(4, 2))
        self.rewards = random.normal(3.0, 2.0, size=(4, 2))
        self.terminal = np.zeros((4, 2), bool)
        self.terminal[3, 1] = True
        self.chances = random.dirichlet([1.0, 1.0], size=4)
        self.following = counts / 5
        rows = [(s, a, t) for s in range(4) for a in range(2) for t in range(4) for _ in range(counts[s, a, t])]
        s, a, t = np.array(rows).T
        self.dataset = transitions(s, a + 1, self.rewards[s, a], t, np.ones(len(s)), self.terminal[s, a])
        onward = GAMMA * self.following * ~self.terminal[..., None]
        matrix = (onward[..., None] * self.chances).reshape(8, 8)
        self.qvalues = np.linalg.solve(np.eye(8) - matrix, self.rewards.reshape(8)).reshape(4, 2)
        self.values = (self.chances * self.qvalues).sum(1)

    def distribution(self, observation: Array) -> torch.distributions.Categorical:
        return torch.distributions.Categorical(torch.as_tensor(self.chances[observation.reshape(-1)]))

    @property
    def policy(self) -> Policy:
        return Policy(lambda observation: self.chances[observation.reshape(-1)], self.distribution)


@pytest.fixture(scope="module")
def mdp() -> Mdp:
    return Mdp()


@pytest.fixture(scope="module")
def fitted(mdp: Mdp) -> list[Agent]:
    return ope.fitted_q_evaluation(mdp.policy, mdp.dataset, mdp.spaces, TABLE, seeds=(0,))


# Fitted Q evaluation


def test_the_fixed_point_is_the_exact_value_of_each_state(mdp: Mdp, fitted: list[Agent]) -> None:
    for state, exact in enumerate(mdp.values):
        [row] = torch.nonzero(mdp.dataset["observation"][:, 0] == state)[:1, 0].tolist()
        estimate = ope.fitted_value(fitted, mdp.dataset[row : row + 1], mdp.policy).value
        assert estimate == pytest.approx(exact, rel=0.01)


def test_the_behaviour_is_cloned_beside_it(mdp: Mdp, fitted: list[Agent]) -> None:
    behaviour = ope.cloned_behaviour(fitted)
    assert behaviour.distribution is not None
    probabilities = behaviour.distribution(np.arange(4).reshape(4, 1)).probs
    torch.testing.assert_close(probabilities, torch.full((4, 2), 0.5), atol=0.03, rtol=0.0)


def test_continuous_critics_are_of_the_policys_next_action() -> None:
    # Next states do not depend on the action, which costs its square.
    states = np.arange(3).repeat(20)
    following = (states + 1) % 3
    eye = np.eye(3, dtype=np.float32)
    action = np.random.default_rng(0).uniform(-2.0, 2.0, size=len(states)).astype(np.float32)
    reward = states - np.abs(action)
    dataset = transitions(eye[states], action, reward, eye[following], np.ones(60), states == 2)
    spaces = Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,)))
    wanted = np.array([0.5, 1.0, -1.5])
    policy = Policy(lambda observation: (observation @ wanted)[:, None])
    gained = np.arange(3) - np.abs(wanted)
    exact = [gained[0] + GAMMA * (gained[1] + GAMMA * gained[2]), gained[1] + GAMMA * gained[2], gained[2]]
    config = TABLE.replace(n_steps=600, hidden_sizes=(64,), critic_learning_rate=3e-3, reward_scale=1.0)
    evaluators = ope.fitted_q_evaluation(policy, dataset, spaces, config, seeds=(0,))
    estimates = [ope.fitted_value(evaluators, dataset[20 * state : 20 * state + 1], policy).value for state in range(3)]
    np.testing.assert_allclose(estimates, exact, atol=0.15)


@pytest.mark.parametrize("kind", ["continuous", "discrete", "dict"])
def test_several_seeds_are_an_ensemble_of_every_kind_of_space(kind: str) -> None:
    torch.manual_seed(0)
    dataset = make_dataset(SPACES[kind])
    agent = make_agent(kind, dataset)
    policy = Policy.of(agent)
    evaluators = ope.fitted_q_evaluation(policy, dataset, agent.spaces, agent.config, seeds=(0, 1, 2))
    value = ope.fitted_value(evaluators, dataset, policy)
    assert value.episodes == 8
    assert value.low < value.value < value.high
    by_seed = [ope.fitted_value([evaluator], dataset, policy).value for evaluator in evaluators]
    assert by_seed == pytest.approx(value.fits)
    assert np.mean(by_seed) == pytest.approx(value.value)
    assert len(set(by_seed)) == 3
    behaviour = ope.cloned_behaviour(evaluators)
    robust = ope.doubly_robust_value(policy, behaviour, evaluators, dataset, 0.99)
    assert math.isfinite(robust.value)
    alone = [ope.doubly_robust_value(policy, behaviour, [each], dataset, 0.99).value for each in evaluators]
    assert robust.fits == pytest.approx(alone)
    assert np.mean(alone) == pytest.approx(robust.value)
    assert robust.effective_episodes is not None
    assert 1.0 <= robust.effective_episodes <= 8.0


@pytest.mark.slow
@needs_compiler
def test_compiled_and_stacked_steps_are_those_of_one_seed_alone() -> None:
    torch.manual_seed(0)
    dataset = make_dataset(SPACES["discrete"])
    agent = make_agent("discrete")
    policy = Policy.of(agent, deterministic=False)

    def weights(seeds: tuple[int, ...], compile: Any) -> dict[str, torch.Tensor]:
        config = agent.config.replace(compile=compile)
        evaluators = ope.fitted_q_evaluation(policy, dataset, agent.spaces, config, seeds=seeds)
        assert all(evaluator.learner.compiled == (compile == "yes") for evaluator in evaluators)
        return dict(evaluators[0].loss.state_dict())

    alone = weights((0,), "no")
    for other in (weights((0,), "yes"), weights((0, 1), "yes"), weights((0, 1), "no")):
        for name, tensor in alone.items():
            torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_memory_mapped_dataset_stays_on_disk(tmp_path: Any) -> None:
    torch.manual_seed(0)
    dataset = make_dataset(SPACES["continuous"])
    agent = make_agent("continuous")
    mapped = dataset.clone().memmap(tmp_path / "data")
    values = [
        ope.fitted_value(
            ope.fitted_q_evaluation(Policy.of(agent), data, agent.spaces, agent.config, seeds=(0,)),
            data,
            Policy.of(agent),
        ).value
        for data in (dataset, mapped)
    ]
    assert values[0] == values[1]
    assert ("next", "action") not in mapped.keys(True, True)


def test_few_data_do_not_let_values_grow_beyond_what_rewards_come_to() -> None:
    dataset = make_dataset(SPACES["continuous"], 40)
    dataset["next", "reward"] = torch.rand(40, 1)
    config = IQLConfig(
        n_steps=600, hidden_sizes=(32, 32), critic_learning_rate=1e-2, polyak=0.5, batch_size=32,
        normalize_observations=True, compile="no",
    )  # fmt: skip
    # Its actions are none of the data's.
    policy = Policy(lambda seen: 10.0 * seen[:, :2])
    evaluators = ope.fitted_q_evaluation(policy, dataset, SPACES["continuous"], config, seeds=(0, 1))
    low, high = ope.possible_returns(dataset, 0.99)
    assert (low, high) == (0.0, pytest.approx(100.0 * float(dataset["next", "reward"].max())))
    for evaluator in evaluators:
        assert low <= ope.fitted_value([evaluator], dataset, policy).value <= high
    endless = dataset.clone()
    endless["next", "terminated"] = torch.zeros(40, 1, dtype=torch.bool)
    assert ope.possible_returns(endless, 0.99)[0] == pytest.approx(100.0 * float(dataset["next", "reward"].min()))
    assert ope.possible_returns(endless, 1.0) == (-math.inf, math.inf)


@pytest.mark.parametrize(("discount", "said", "counted"), [(0.9, 1e3, 100.0), (0.9, -1e3, -80.0), (1.0, 1e3, 1e3)])
def test_errors_of_values_at_a_bound_have_two_sides(discount: float, said: float, counted: float) -> None:
    dataset = make_dataset(SPACES["continuous"], 40)
    # Returns are from -10 to 20 at a discount of 0.9, thirty apart, and rewards are doubled.
    dataset["next", "reward"] = torch.linspace(-1.0, 2.0, 40)[:, None]
    config = IQLConfig(n_steps=1, discount=discount, hidden_sizes=(8,), reward_scale=2.0, compile="no")
    policy = Policy(lambda seen: seen[:, :2])
    [evaluator] = ope.fitted_q_evaluation(policy, dataset, SPACES["continuous"], config, seeds=(0,))
    evaluator.loss._critic_values = lambda *of: torch.full((1, 40, 1), said)
    asked = evaluator.normalizers(dataset)
    asked["next", "action"] = asked["action"]
    _, metadata = evaluator.loss.qvalue_loss(asked)
    onward = discount * ~dataset["next", "terminated"][:, 0] * counted
    expected = (said - 2.0 * dataset["next", "reward"][:, 0] - onward).square()
    torch.testing.assert_close(metadata["td_error"].reshape(-1), expected)


def test_stable_baselines3s_and_d3rlpys_own_policies_are_judged_as_they_are() -> None:
    d3rlpy = pytest.importorskip("d3rlpy", reason="judges d3rlpy's policy")
    stable_baselines3 = pytest.importorskip("stable_baselines3", reason="judges Stable-Baselines3's policy")
    from iql_plugins import load_dataset

    dataset = load_dataset("pendulum-v1-sac")[:400]
    spaces = Spaces(Box((3,)), Box((1,), low=(-2.0,), high=(2.0,)))
    model = stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    sac = d3rlpy.algos.SACConfig(action_scaler=d3rlpy.preprocessing.MinMaxActionScaler([-2.0], [2.0])).create()
    sac.create_impl((3,), 1)
    config = IQLConfig(n_steps=5, hidden_sizes=(8,), compile="no")
    for policy in (Policy(lambda seen: model.predict(seen, deterministic=True)[0]), Policy(sac.predict)):
        evaluators = ope.fitted_q_evaluation(policy, dataset, spaces, config, seeds=(0,))
        assert math.isfinite(ope.fitted_value(evaluators, dataset, policy).value)
        assert 0.0 < ope.action_agreement(policy, dataset, spaces).value < 1.0


# Estimators, against loops


def brute_force(ratios: list[list[float]], numbers: list[list[float]], discount: float) -> float:
    """The weighted mean of each step's numbers; episodes of different lengths."""
    total = 0.0
    for step in range(max(map(len, numbers))):
        weights = [math.prod(ratio[: step + 1]) for ratio in ratios]
        shares = [number[step] if step < len(number) else 0.0 for number in numbers]
        total += discount**step * np.average(shares, weights=weights)
    return total


def test_importance_sampling_is_what_a_loop_over_episodes_makes_of_it() -> None:
    random = np.random.default_rng(0)
    lengths = [3, 1, 4]
    ratios = [random.uniform(0.1, 3.0, size).tolist() for size in lengths]
    rewards, qvalues, values, following = ([random.normal(size=size).tolist() for size in lengths] for _ in range(4))
    flat = (
        np.concatenate(part) for part in (np.log(np.concatenate(ratios))[None], rewards, qvalues, values, following)
    )
    padded = [estimators.padded(part, np.array(lengths)) for part in flat]
    episodes = ImportanceSampled(padded[0], padded[1])
    assert estimators.weighted_importance_sampling(episodes, 0.8) == pytest.approx(brute_force(ratios, rewards, 0.8))
    errors = [
        [r + 0.8 * after - q for r, q, after in zip(*part, strict=True)]
        for part in zip(rewards, qvalues, following, strict=True)
    ]
    expected = np.mean([value[0] for value in values]) + brute_force(ratios, errors, 0.8)
    assert estimators.doubly_robust(episodes, *padded[2:], 0.8) == pytest.approx(expected)
    twice = estimators.weighted_importance_sampling(episodes, 0.8, np.array([[2.0, 0.0, 1.0]]))
    chosen = [0, 0, 2]
    assert twice[0] == pytest.approx(brute_force([ratios[i] for i in chosen], [rewards[i] for i in chosen], 0.8))


def test_products_of_long_episodes_stay_finite() -> None:
    ratios = np.full((2, 5000), 2.0)
    ratios[1] = -2.0
    episodes = ImportanceSampled(ratios, np.ones((2, 5000)))
    assert estimators.weighted_importance_sampling(episodes, 0.5) == pytest.approx(2.0)
    assert estimators.effective_episodes(ratios) == 1.0


def test_importance_sampling_finds_the_exact_value_of_another_policy(mdp: Mdp) -> None:
    """Behaviour and policy known: both estimates are close to the value of ten steps from state 0."""
    random = np.random.default_rng(1)
    rows: list[tuple[int, int, float, int, bool, bool]] = []
    for _ in range(3000):
        state = 0
        for step in range(10):
            action = int(random.integers(2))
            after = int(random.choice(4, p=mdp.following[state, action]))
            ended = bool(mdp.terminal[state, action])
            rows.append((state, action + 1, mdp.rewards[state, action], after, ended or step == 9, ended))
            if ended:
                break
            state = after
    dataset = transitions(*map(np.array, zip(*rows, strict=True)))
    values = np.zeros(4)
    for _ in range(10):
        onward = GAMMA * (mdp.following * ~mdp.terminal[..., None]) @ values
        values = (mdp.chances * (mdp.rewards + onward)).sum(1)
    known = np.full(len(dataset), math.log(0.5))
    sampled = ope.importance_sampled_value(mdp.policy, known, dataset, mdp.spaces, GAMMA)
    assert sampled.value == pytest.approx(values[0], rel=0.05)
    assert sampled.low < values[0] < sampled.high
    assert sampled.effective_episodes is not None
    assert sampled.effective_episodes < 3000


def test_doubly_robust_is_exact_with_an_exact_model(mdp: Mdp, fitted: list[Agent]) -> None:
    behaviour = ope.cloned_behaviour(fitted)
    robust = ope.doubly_robust_value(mdp.policy, behaviour, fitted, mdp.dataset, GAMMA)
    model = ope.fitted_value(fitted, mdp.dataset, mdp.policy)
    assert robust.value == pytest.approx(model.value, rel=0.01)


# Return units, intervals


def constant_agent(terminal: bool, scale: float, shift: float) -> tuple[Agent, TensorDict]:
    """An agent whose V is exact: a reward of 1 in each of two steps, which lead to a terminal state, or on for ever."""
    spaces = Spaces(Box((1,)), Box((1,), low=(-1.0,), high=(1.0,)))
    dataset = transitions(
        np.zeros((2, 1), np.float32), np.zeros((2, 1), np.float32), [1.0, 1.0], np.zeros((2, 1), np.float32),
        [0, 1], [0, int(terminal)],
    )  # fmt: skip
    config = IQLConfig(
        n_steps=1, hidden_sizes=(), discount=0.5, reward_scale=scale, reward_shift=shift, compile="no", n_critics=2
    )
    agent = Agent(spaces, config, normalizers=Normalizers.fit(dataset, spaces, config), seed=0)
    with torch.no_grad():
        for name, parameter in agent.loss.named_parameters():
            parameter.zero_()
            if name.endswith("bias"):
                parameter.fill_((scale + shift) * (1.5 if terminal else 2.0))
    return agent, dataset


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (10.0, 0.0), (2.0, -1.0)])
def test_values_are_told_in_the_environments_rewards(terminal: bool, scale: float, shift: float) -> None:
    agent, dataset = constant_agent(terminal, scale, shift)
    for criterion in (ope.initial_value, ope.initial_qvalue):
        assert criterion(agent, dataset).value == pytest.approx(1.5 if terminal else 2.0, rel=1e-5)


def test_td_errors_are_told_in_the_environments_rewards() -> None:
    dataset = constant_agent(True, 1.0, 0.0)[1]
    errors = [ope.td_error(constant_agent(True, scale, 0.0)[0], dataset).value for scale in (1.0, 10.0)]
    # Of the first step |1.5 - 1 - 0.5 x 1.5|, of the second |1.5 - 1|.
    assert errors == pytest.approx([0.375, 0.375], rel=1e-5)


def test_agreement_counts_what_is_the_same() -> None:
    spaces = Spaces(Box((1,)), Box((2,), low=(-1.0, 0.0), high=(1.0, 4.0)))
    columns = np.zeros((2, 1), np.float32)
    dataset = transitions(columns, np.array([[1.0, 4.0], [0.0, 2.0]]), [0.0, 0.0], columns, [0, 1], [0, 0])
    policy = Policy(lambda observation: np.array([[0.0, 2.0], [0.0, 2.0]]))
    assert ope.action_agreement(policy, dataset, spaces).value == pytest.approx(0.75)


def test_an_interval_has_the_mean_in_it_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    intervals = [Criterion.mean(random.normal(size=40)) for _ in range(60)]
    assert 0.85 < np.mean([interval.low < 0.0 < interval.high for interval in intervals]) <= 1.0


def test_a_difference_knows_that_both_are_of_the_same_episodes() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(scale=10.0, size=50)
    better, worse = Criterion.mean(hard + 1.0 + 0.1 * random.normal(size=50)), Criterion.mean(hard)
    assert better.low < worse.high
    assert ope.difference(better, worse).low > 0.9
    with pytest.raises(ValueError, match="same episodes"):
        ope.difference(better, Criterion.mean(hard[:10]))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_fits_of_one_policy_are_told_apart_as_rarely_as_intervals_say(seeds: int) -> None:
    random = np.random.default_rng(0)

    def fits(episodes: np.ndarray) -> Criterion:
        return Criterion.mean(episodes + random.normal(scale=2.0, size=(seeds, 1)))

    told = []
    for _ in range(100):
        episodes = random.normal(size=30)
        by = ope.difference(fits(episodes), fits(episodes))
        told.append(not by.low < 0.0 < by.high)
    assert np.mean(told) <= 0.1


def test_a_single_episode_has_the_interval_of_its_seeds() -> None:
    only = Criterion.mean(np.array([[1.0], [2.0], [3.0]]))
    # Student's t of two degrees of freedom: 4.30 standard errors.
    assert (only.low, only.high) == pytest.approx((2.0 - 4.303 / 3**0.5, 2.0 + 4.303 / 3**0.5), abs=0.03)


@pytest.mark.filterwarnings("error")
def test_an_estimate_that_some_draws_do_not_have_has_no_interval() -> None:
    low, high = bootstrap_interval([5], lambda rows: np.where((rows == 0).any(-1), 1.0, np.nan))
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_single_episode_has_no_interval() -> None:
    assert math.isnan(bootstrap_interval([1], lambda rows: 0.0 * rows.mean(-1))[0])


def test_importance_sampling_is_of_actions_as_the_environment_clips_them() -> None:
    dataset = make_dataset(SPACES["continuous"])
    agent = make_agent("continuous", dataset)
    low, high = (torch.tensor(bound) for bound in (agent.spaces.action.low, agent.spaces.action.high))
    beyond, clipped = dataset.clone(), dataset.clone()
    beyond["action"] = dataset["action"] * 3.0
    clipped["action"] = (dataset["action"] * 3.0).clamp(low, high)
    assert not torch.equal(beyond["action"], clipped["action"])
    policy = Policy.of(agent)
    told = [log_probabilities(policy, each, agent.spaces.action) for each in (beyond, clipped)]
    np.testing.assert_array_equal(*told)
    # What was recorded is of the actions as they are: a policy's own record is worth what its data returned.
    recorded = log_probabilities(policy, beyond, agent.spaces.action, clipped=False)
    assert not np.array_equal(recorded, told[0])
    own = ope.importance_sampled_value(policy, recorded, beyond, agent.spaces, 0.9)
    assert own.value == pytest.approx(ope.discounted_returns(beyond, 0.9).mean())
    assert own.effective_episodes == pytest.approx(own.episodes)


def test_importance_sampling_takes_actions_without_bounds() -> None:
    space, dataset = Box((2,)), make_dataset(SPACES["continuous"])
    policy = Policy(len, lambda observation: Independent(Normal(torch.zeros(len(observation), 2), 1.0), 1))
    given = dataset["action"].double().numpy()
    expected = -0.5 * (given**2).sum(1) - np.log(2 * np.pi)
    np.testing.assert_allclose(log_probabilities(policy, dataset, space), expected, rtol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("kind", "returned", "expected"),
    [
        ("continuous", lambda count: np.zeros((count, 3)), "shape"),
        ("continuous", lambda count: np.full((count, 2), np.nan), "finite"),
        ("continuous", lambda count: np.zeros((count + 1, 2)), "one action for each"),
        ("continuous", lambda count: (np.zeros((count, 2)), None), "got a tuple: of Stable-Baselines3's predict"),
        ("discrete", lambda count: 1, "one action for each"),
        ("discrete", lambda count: np.zeros(count, np.int64), "from 1 to 4"),
        ("discrete", lambda count: np.full((count, 4), 0.5), "add up to 1"),
    ],
)
def test_actions_that_the_space_does_not_have_are_refused(kind: str, returned: Any, expected: str) -> None:
    dataset = make_dataset(SPACES[kind])
    policy = Policy(lambda observation: returned(len(observation)))
    with pytest.raises(ValueError, match=expected):
        ope.action_agreement(policy, dataset, SPACES[kind])


def test_importance_sampling_without_a_distribution_is_refused() -> None:
    dataset = make_dataset(SPACES["continuous"])
    policy = Policy(lambda observation: np.zeros((len(observation), 2)))
    with pytest.raises(ValueError, match="Policy\\(act, distribution\\)"):
        ope.importance_sampled_value(policy, np.zeros(len(dataset)), dataset, SPACES["continuous"], 0.9)
    agent = make_agent("continuous")
    with pytest.raises(ValueError, match="finite numbers"):
        ope.importance_sampled_value(Policy.of(agent), np.full(len(dataset), -np.inf), dataset, agent.spaces, 0.9)


def test_actions_are_asked_about_where_the_policys_distribution_is() -> None:
    asked: list[torch.Tensor] = []

    class Recorder:
        def log_prob(self, action: torch.Tensor) -> torch.Tensor:
            asked.append(action)
            return torch.zeros(len(action))

    dataset = make_dataset(SPACES["continuous"])
    policy = Policy(lambda observation: observation, lambda observation: Recorder(), "meta")  # type: ignore[arg-type]
    assert not ope.policies.log_probabilities(policy, dataset, SPACES["continuous"].action).any()
    assert asked[0].device.type == "meta"


def test_rewards_are_scaled_by_the_largest_return_from_any_transition_on() -> None:
    reward = torch.zeros(300, 1)
    reward[-1] = 8.0
    state = torch.zeros(300, 2)
    last = reward > 0.0
    dataset = transitions(state, torch.zeros(300, 1), reward, state, last, last)
    config = ope.evaluation_config(dataset, n_steps=1, discount=0.9)
    assert config.reward_scale == pytest.approx(3.0 / 8.0)


def test_what_draws_random_numbers_in_networks_is_left_out() -> None:
    dataset = make_dataset(SPACES["continuous"])
    config = IQLConfig(n_steps=1, compile="no", hidden_sizes=(8,), actor_dropout=0.5, value_dropout=0.5)
    policy = Policy(lambda observation: np.zeros((len(observation), 2), np.float32))
    evaluators = ope.fitted_q_evaluation(policy, dataset, SPACES["continuous"], config, seeds=(0, 1))
    assert [agent.learner.step_count for agent in evaluators] == [1, 1]
