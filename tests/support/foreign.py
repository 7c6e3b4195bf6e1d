"""A small DiT that is not CogVideoX: three linears a block, attention and MLP side by side, no text."""

import jax
import jax.numpy as jnp
from flax import nnx

from sixbit_jax.models.linears import PlainLinears
from sixbit_jax.models.split import Split
from sixbit_jax.precision import init_scan, scan_blocks
from sixbit_jax.precision.types import Progress
from sixbit_jax.qtensor import quantize_model

SITES = ("qkv", "up", "down")
BLOCKS, STEPS, TOKENS, WIDTH, HEADS = 3, 9, 6, 32, 2
WORK = {"qkv": 3.0, "up": 2.0, "down": 3.0}
PLAIN = PlainLinears()


class Block(nnx.Module):
    def __init__(self, rngs):
        self.modulation = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(3 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, condition, linear=PLAIN):
        scale, gate = jnp.split(self.modulation(condition)[:, None], 2, -1)
        h = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale)
        parts = jnp.split(linear("qkv", self.qkv, h), 3, -1)
        attended = jax.nn.dot_product_attention(*(part.reshape(*x.shape[:2], HEADS, -1) for part in parts))
        mixed = jnp.concatenate([attended.reshape(x.shape), nnx.gelu(linear("up", self.up, h))], -1)
        return x + 0.5 * jnp.tanh(gate) * linear("down", self.down, mixed)


class DiT(nnx.Module):
    def __init__(self, rngs):
        self.time = nnx.Linear(1, WIDTH, rngs=rngs)
        self.blocks = nnx.vmap(Block)(rngs.split(BLOCKS))

    def condition(self, x, step):
        return nnx.silu(self.time(jnp.full((len(x), 1), 0.3) * (1 + jnp.asarray(step, jnp.float32))))


def make(quantized: bool = True) -> Split[DiT]:
    model = DiT(nnx.Rngs(0))
    if quantized:
        quantize_model(model, [(r"blocks\.(qkv|up|down)", "nvfp4"), (r"time|blocks\.modulation", "keep")])
    return Split.of(model)


def noise(samples: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (samples, TOKENS, WIDTH))


def start(policy, x):
    return init_scan(policy, blocks=BLOCKS, sites=SITES, shape=x.shape, dtype=x.dtype)


def step(split, policy, x, state, index):
    """One step of a toy sampler -> (x, state, trace)."""
    model = split.merge()
    graph, params = nnx.split(model.blocks)

    def block(params, x, condition, linears):
        return nnx.merge(graph, params)(x, condition, linears)

    progress = Progress(step=jnp.asarray(index, jnp.int32), steps=STEPS)
    h, state, trace = scan_blocks(block, params, x, model.condition(x, index), policy, state, progress, sites=SITES)
    return towards(x, h), state, trace


def towards(x, h):
    return 0.8 * x + 0.2 * h


@jax.jit
def sample(split, policy, x):
    """-> (x after each step, trace)."""

    def body(carry, index):
        x, state, trace = step(split, policy, *carry, index)
        return (x, state), (x, trace)

    return jax.lax.scan(body, (x, start(policy, x)), jnp.arange(STEPS, dtype=jnp.int32))[1]
