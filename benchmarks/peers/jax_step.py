"""A peer of a training step: JAX, the step compiled whole, one process, random tokens, SGD with clipping.

    python benchmarks/peers/jax_step.py SIZE STEPS THREADS

Prints one JSON line: {"seconds": of the median step}. XLA takes a thread for each core it may use, so it is bound to THREADS.
"""

import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from sizes import SIZES


def main():
    size, steps, threads = SIZES[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    def lstm(layer, x, state):
        """x (T,B,H); the input product of the whole window at once."""

        def cell(state, product):
            h, c = state
            i, f, g, o = jnp.split(product + h @ layer["h"], 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        return jax.lax.scan(cell, state, x @ layer["x"] + layer["b"])

    def loss(parameters, states, tokens, targets):
        x, after = parameters["embedding"][tokens], []
        for layer, state in zip(parameters["layers"], states, strict=True):
            state, x = lstm(layer, x, state)
            after.append(state)
        logits = x @ parameters["output"].T + parameters["bias"]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean(), after

    def update(parameters, states, tokens, targets):
        (value, states), gradient = jax.value_and_grad(loss, has_aux=True)(parameters, states, tokens, targets)
        norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
        factor = jnp.minimum(1.0, 5.0 / norm)
        return jax.tree.map(lambda p, g: p - factor * g, parameters, gradient), states, value

    V, H, (T, B) = size.vocabulary, size.hidden, (size.window, size.lanes)
    keys = iter(jax.random.split(jax.random.key(1), 3 * size.layers + 4))
    uniform = lambda *shape: jax.random.uniform(next(keys), shape, minval=-0.1, maxval=0.1)
    layers = [{"x": uniform(H, 4 * H), "h": uniform(H, 4 * H), "b": uniform(4 * H)} for _ in range(size.layers)]
    parameters = {"embedding": uniform(V, H), "layers": layers, "output": uniform(V, H), "bias": uniform(V)}
    states = [(jnp.zeros((B, H)), jnp.zeros((B, H))) for _ in range(size.layers)]
    step, seconds = jax.jit(update, donate_argnums=(0, 1)), []
    for tokens, targets in jax.random.randint(jax.random.key(2), (steps, 2, T, B), 0, V):
        begin = time.perf_counter()
        parameters, states, value = step(parameters, states, tokens, targets)
        value.block_until_ready()
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": statistics.median(seconds[2:])}))


if __name__ == "__main__":
    main()
