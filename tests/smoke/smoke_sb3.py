"""A gradient step on a batch of Stable-Baselines3's replay buffer, filled by its own SAC."""

from gradient_step import check_gradient_step
from stable_baselines3 import SAC
from tensordict import TensorDict

STEPS = 300

if __name__ == "__main__":
    # No update happens before learning_starts: this collects, and no more.
    model = SAC("MlpPolicy", "Pendulum-v1", buffer_size=STEPS, learning_starts=STEPS, seed=0, device="cpu")
    model.learn(STEPS)
    assert model.replay_buffer is not None
    samples = model.replay_buffer.sample(64)
    # The buffer takes timeouts out of its dones, and keeps actions scaled to [-1, 1].
    terminated = samples.dones.bool()
    batch = {
        "observation": samples.observations,
        "action": samples.actions,
        "next": {
            "observation": samples.next_observations,
            "reward": samples.rewards,
            "done": terminated,
            "terminated": terminated,
        },
    }
    check_gradient_step(TensorDict(batch, [64]))
