"""A gradient step on a batch of Stable-Baselines3's replay buffer, filled by its own SAC; then the adapter."""

import tempfile

from gradient_step import check_gradient_step
from stable_baselines3 import SAC

import iql_plugins
from iql_sb3 import IQL

STEPS = 300

if __name__ == "__main__":
    # No update happens before learning_starts: this collects, and no more.
    sac = SAC("MlpPolicy", "Pendulum-v1", buffer_size=STEPS, learning_starts=STEPS, seed=0, device="cpu")
    sac.learn(STEPS)
    assert sac.replay_buffer is not None
    check_gradient_step(iql_plugins.map_batch(sac.replay_buffer.sample(64)))

    model = IQL("MlpPolicy", "Pendulum-v1", dataset=sac.replay_buffer, learning_starts=0, seed=0, device="cpu")
    model.learn_offline(20).learn(20)
    assert model.learner.step_count == 40, model.learner.step_count
    observation = model.observation_space.sample()
    action, _ = model.predict(observation, deterministic=True)
    assert model.action_space.contains(action), action
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model")
        loaded = IQL.load(f"{folder}/model", device="cpu")
    assert (loaded.predict(observation, deterministic=True)[0] == action).all()
    adapter = iql_plugins.load("sb3")
    assert adapter.training is not None
    print(f"20 steps offline, 20 online, action {action}, step {adapter.training.to_agent(loaded).learner.step_count}")
