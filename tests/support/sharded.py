"""Run by tests/sampling/test_sharding.py in a process of its own, which has eight CPU devices."""

import sys

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import policies
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sixbit_jax.precision import ConstantRouter, EveryNth, PrecisionPolicy, TableRouter
from sixbit_jax.sampling import sampler


def prompts_over_devices() -> None:
    """Data parallel: a video a device, in INT8 with a cache.

    What is skipped does not depend on the data: a decision that is near its threshold may be another one by rounding.
    """
    policy = PrecisionPolicy(router=ConstantRouter(route="int8"), skipper=EveryNth(n=3, warm_up=2, cool_down=1))
    model = policies.make(quantized=True)
    schedule, scale, latents, conditioning = policies.arguments(batch=8)
    wanted, _ = sampler.sample(model, schedule, scale, latents, conditioning, policy=policy)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def run(latents: jax.Array, conditioning: sampler.Conditioning) -> jax.Array:
        return sampler.sample(model, schedule, scale, latents, conditioning, policy=policy)[0]

    spread = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))
    found = spread(*jax.device_put((latents, conditioning), NamedSharding(mesh, P("data"))))
    assert len(found.sharding.device_set) == 8
    # A code may round to the other side, and steps amplify that; another video would be off by more than all of it.
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)


def sharded_arguments() -> None:
    """Data parallel without a word in the program: jit spreads it as its arguments are."""
    model = policies.make(quantized=False)
    schedule, scale, latents, conditioning = policies.arguments(batch=8)
    wanted, _ = sampler.sample(model, schedule, scale, latents, conditioning)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    found, _ = sampler.sample(
        model, schedule, scale, *jax.device_put((latents, conditioning), NamedSharding(mesh, P("data")))
    )
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def block_over_devices() -> None:
    """A quantised block, with the sequence over four devices and the width of the weights over two."""
    model = policies.make(quantized=True).merge()
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((2, 3, 4, 4, 4)), jnp.float32)
    text = jnp.asarray(rng.standard_normal((2, 4, 12)), jnp.float32)
    x, context = model.embed(latents, text, jnp.asarray([10, 10]))
    graph, params = nnx.split(model.blocks)
    first = jax.tree.map(lambda leaf: leaf[0], params)
    block = jax.jit(lambda params, x: nnx.merge(graph, params)(x, context))
    wanted = block(first, x)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("sequence", "width"))

    def by_width(leaf: jax.Array) -> jax.Array:
        axis = max(range(leaf.ndim), key=lambda i: leaf.shape[i]) if leaf.ndim > 1 else None
        spec = [None] * leaf.ndim
        if axis is not None and leaf.shape[axis] % 2 == 0:
            spec[axis] = "width"
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

    found = block(jax.tree.map(by_width, first), jax.device_put(x, NamedSharding(mesh, P(None, "sequence"))))
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def blocks_of_any_model() -> None:
    """A scan over the blocks of a model that is not ours, data parallel as its arguments are, decided jointly."""
    policy = PrecisionPolicy(
        router=TableRouter.of(np.arange(foreign.BLOCKS * 3).reshape(1, foreign.BLOCKS, 3) % 3),
        skipper=EveryNth(n=2, warm_up=2, cool_down=1),
        joint=True,
    )
    model, x = foreign.make(), foreign.noise(8)
    wanted, decided = foreign.sample(model, policy, x)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    found, trace = foreign.sample(model, policy, jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert len(found.sharding.device_set) == 8
    np.testing.assert_array_equal(trace.bits, decided.bits)
    assert np.linalg.norm(found[-1] - wanted[-1]) < 0.05 * np.linalg.norm(wanted[-1])  # codes, as above


CASES = {
    "blocks of any model": blocks_of_any_model,
    "prompts": prompts_over_devices,
    "sharded arguments": sharded_arguments,
    "block": block_over_devices,
}

if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 8
    for name in sys.argv[1:]:
        with jax.default_matmul_precision("highest"):
            CASES[name]()
        print(name)
