"""IQL in JAX as its public versions write it: one jitted scan of steps. A peer, not a product.

It is the peer ``jax`` of ``bench.py``. JAX lives in an environment of its own, ``.venv-jax`` in the repository, which
``python tests/benchmarks/jax_iql.py`` makes; a process of it trains, and is told through a pipe how many steps to take.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ENVIRONMENT = Path(__file__).parents[2] / ".venv-jax"
PYTHON = ENVIRONMENT / "bin" / "python"
PACKAGES = ("jax==0.10.2", "optax==0.2.8", "numpy")
#: Steps of a scan, from one return to Python to the next.
SCANNED = 10
EXPECTILE, TEMPERATURE, DISCOUNT, POLYAK, RATE = 0.7, 3.0, 0.99, 0.005, 3e-4
NAMES = ("observation", "action", "next_reward", "next_observation", "next_terminated")


def peer(data: Mapping[str, Any], batch_size: int, hidden: int) -> Callable[[int], None]:
    """What takes a number of steps, a multiple of :data:`SCANNED`, in the other environment's process."""
    import numpy as np
    import torch

    if not PYTHON.exists():
        raise RuntimeError(f"JAX has no environment yet: run python {Path(__file__).name} once, which makes it")
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.npz"
        np.savez(file, **{name: data[name].float().cpu().numpy() for name in NAMES})
        flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
        process = subprocess.Popen(
            [PYTHON, __file__, str(file), str(batch_size), str(hidden), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        written, read = process.stdin, process.stdout

        def steps(count: int) -> None:
            if count % SCANNED:
                raise ValueError(f"steps must be a multiple of {SCANNED}, got {count}")
            written.write(f"{count}\n")
            written.flush()
            if not read.readline():
                raise RuntimeError(f"JAX's process ended with status {process.wait()}")

        # It has read the data, and compiled.
        steps(SCANNED)
    return steps


def main(file: str, batch_size: int, hidden: int, threads: int) -> None:
    """Takes as many steps as each line of the standard input says, and answers with a line when they are done."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    with np.load(file) as found:
        data = tuple(jnp.asarray(found[name]) for name in NAMES)
    rows, observation, action = len(data[0]), data[0].shape[1], data[1].shape[1]

    def mlp(key: Any, size: int, out: int) -> Any:
        sizes, layers = (size, hidden, hidden, out), []
        for own, before, after in zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True):
            bound = before**-0.5
            layers.append((jax.random.uniform(own, (before, after), minval=-bound, maxval=bound), jnp.zeros(after)))
        return layers

    def forward(layers: Any, inputs: Any) -> Any:
        for weight, bias in layers[:-1]:
            inputs = jax.nn.relu(inputs @ weight + bias)
        weight, bias = layers[-1]
        return inputs @ weight + bias

    def qvalues(critics: Any, seen: Any, done: Any) -> Any:
        joined = jnp.concatenate([seen, done], 1)
        return jnp.stack([forward(critic, joined)[:, 0] for critic in critics])

    def loss(parameters: Any, target: Any, batch: Any) -> Any:
        seen, done, reward, following, terminated = batch
        value = forward(parameters["value"], seen)[:, 0]
        advantage = qvalues(target, seen, done).min(0) - value
        value_loss = (jnp.where(advantage > 0, EXPECTILE, 1 - EXPECTILE) * advantage**2).mean()
        weight = jnp.minimum(jnp.exp(TEMPERATURE * jax.lax.stop_gradient(advantage)), 100.0)
        mean = jnp.tanh(forward(parameters["actor"], seen))
        scale = jnp.exp(jnp.clip(parameters["log_std"], -5.0, 2.0))
        likelihood = jax.scipy.stats.norm.logpdf(done, mean, scale).sum(-1)
        following_value = jax.lax.stop_gradient(forward(parameters["value"], following)[:, 0])
        wanted = reward[:, 0] + DISCOUNT * (1 - terminated[:, 0]) * following_value
        qvalue_loss = ((qvalues(parameters["critics"], seen, done) - wanted) ** 2).mean(1).sum()
        return value_loss - (weight * likelihood).mean() + qvalue_loss

    optimizer = optax.adam(RATE)

    def step(state: Any, _: None) -> tuple[Any, Any]:
        parameters, target, moments, key = state
        key, own = jax.random.split(key)
        index = jax.random.randint(own, (batch_size,), 0, rows)
        total, gradients = jax.value_and_grad(loss)(parameters, target, tuple(column[index] for column in data))
        updates, moments = optimizer.update(gradients, moments)
        parameters = optax.apply_updates(parameters, updates)
        target = optax.incremental_update(parameters["critics"], target, POLYAK)
        return (parameters, target, moments, key), total

    scan = jax.jit(lambda state: jax.lax.scan(step, state, None, SCANNED), donate_argnums=0)
    keys = jax.random.split(jax.random.key(0), 5)
    parameters = {
        "actor": mlp(keys[0], observation, action),
        "log_std": jnp.zeros(action),
        "value": mlp(keys[1], observation, 1),
        "critics": [mlp(key, observation + action, 1) for key in keys[2:4]],
    }
    target = jax.tree.map(jnp.copy, parameters["critics"])
    state = (parameters, target, optimizer.init(parameters), keys[4])
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line) // SCANNED):
            state, totals = scan(state)
        jax.block_until_ready(state)
        sys.stdout.write(f"{time.perf_counter() - begin} s, loss {float(totals.mean())}\n")
        sys.stdout.flush()


def install() -> None:
    """Makes the environment that JAX lives in."""
    subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        install()
    else:
        main(sys.argv[1], *map(int, sys.argv[2:]))
