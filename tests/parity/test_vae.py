"""The autoencoder against diffusers, over chunked, tiled, single-frame and quantised-latent cases.

Tolerances: float32 sums in another order differ by about 1e-6 relative L2 through these depths, so 1e-5; a wrong
padding, chunk border or group statistic is off by over 1e-2. In bfloat16 our error against the float32 reference may
be at most twice that of diffusers: rounding is random, a lost digit is not.
"""

import functools

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.engine import assemble, to_diffusers
from convert.rules_vae import RULES
from sixbit_jax.config import VAEConfig
from sixbit_jax.models.vae import AutoencoderKLCogVideoX

TOLERANCE = 1e-5
CASES = sorted(path.stem for path in common.REFERENCES.glob("vae_*.json"))


# These runs are short: compiling without LLVM's optimisations takes half as long and changes nothing else.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def build(config, shapes, dtype):
    config = VAEConfig.from_dict(config)
    abstract = nnx.eval_shape(lambda: AutoencoderKLCogVideoX(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    return graph, jax.tree.map(jnp.asarray, assemble(common.weights(shapes), RULES, state, dtype=dtype))


def both_ways(case, dtype):
    config, shapes, wanted = common.load(case)
    graph, params = build(config, shapes, dtype)
    tiled = bool(wanted["tiled"])
    video = common.values("video", (*wanted["video_shape"], 3))
    latents = common.values("latents", (*wanted["moments"].shape[:-1], config["latent_channels"]))
    moments = quick_jit(lambda params, x: nnx.merge(graph, params).encode(x, tiled=tiled))(params, video)
    decoded = quick_jit(lambda params, z: nnx.merge(graph, params).decode(z, tiled=tiled))(params, latents)
    assert moments.dtype == decoded.dtype == dtype
    return wanted, moments.astype(jnp.float32), decoded.astype(jnp.float32)


def test_there_are_cases():
    assert len(CASES) == 7


@pytest.mark.parametrize("case", CASES)
def test_float32(parity, case):
    wanted, moments, decoded = both_ways(case, jnp.float32)
    parity.exact(f"{case}: encode", moments, wanted["moments"], TOLERANCE)
    parity.exact(f"{case}: decode", decoded, wanted["decoded"], TOLERANCE)


@pytest.mark.parametrize("case", ["vae_13_frames", "vae_24_frames", "vae_4_levels_49_frames"])
def test_bfloat16(parity, case):
    wanted, moments, decoded = both_ways(case, jnp.bfloat16)
    parity.half(f"{case}: encode", moments, wanted["moments"], wanted["moments_bfloat16_error"])
    parity.half(f"{case}: decode", decoded, wanted["decoded"], wanted["decoded_bfloat16_error"])


@pytest.mark.parametrize("case", ["vae_quant", "vae_13_frames"])
def test_weights_return_to_the_same_keys(case):
    config, shapes, _ = common.load(case)
    _, params = build(config, shapes, jnp.float32)
    published = dict(to_diffusers(params, RULES, shapes))
    wanted = common.weights(shapes)
    assert published.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(published[key], value, err_msg=key)
