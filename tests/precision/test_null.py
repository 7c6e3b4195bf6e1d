"""What a policy must not cost: the null policy changes no bit, and the cache is held once. Compiled as users do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from policies import arguments, delta_skipper, make

from sixbit_jax.precision import ConstantRouter, NeverSkip, PrecisionPolicy
from sixbit_jax.sampling import sampler


def test_null_policy_is_the_plain_sampler_bit_for_bit():
    plain = make(False)
    for guided in (True, False):
        found, trace = sampler.sample(plain, *arguments(2, guided=guided), policy=PrecisionPolicy())
        wanted, _ = sampler.sample(plain, *arguments(2, guided=guided))
        np.testing.assert_array_equal(found, wanted)
        assert (trace.precision.bits == 16).all()


def test_null_policy_in_bfloat16():
    plain = make(False, jnp.bfloat16)
    found, _ = sampler.sample(plain, *arguments(2), policy=PrecisionPolicy())
    np.testing.assert_array_equal(found, sampler.sample(plain, *arguments(2))[0])


def test_cache_is_not_copied_by_the_compiled_program():
    quantized = make(True)
    """The carried cache is updated in place: the program needs no second one."""
    policy = PrecisionPolicy(skipper=delta_skipper(), router=ConstantRouter(route="int8"), outlier_limit=None)
    never = dataclasses.replace(policy, skipper=NeverSkip())

    schedule, scale, latents, conditioning = arguments(4)

    def temporary(policy):
        run = jax.jit(lambda latents: sampler.sample(quantized, schedule, scale, latents, conditioning, policy=policy))
        return run.lower(latents).compile().memory_analysis().temp_size_in_bytes

    state, _ = sampler.prepare(quantized.merge(), *arguments(4), policy)
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.precision.cache))
    assert temporary(policy) - temporary(never) < 1.6 * cache
