"""The trained mini model in this package against diffusers and transformers, which load the same folder themselves.

Tolerances: as of the single models, 1e-5 relative L2 in float32, and 1e-4 after ten guided steps, which amplify the
1e-6 of one. In bfloat16 our error against the float32 reference may be at most twice that of diffusers.
"""

import functools

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sixbit_jax import checkpoint
from sixbit_jax.pipeline import MINI_MODEL, Pipeline, encode_text

CONFIG, _, WANTED = common.load("mini")
PIXELS = 3
DTYPES = [jnp.float32, jnp.bfloat16]


@functools.cache
def mini(dtype):
    return Pipeline.from_pretrained("mini", dtype=dtype)


def compare(parity, name, found, dtype, bound=1e-5):
    case, found = f"mini: {name}", found.astype(jnp.float32)
    if dtype == jnp.float32:
        parity.exact(case, found, WANTED[name], bound)
    else:
        parity.half(case, found, WANTED[name], WANTED[f"{name}_bfloat16_error"])


def test_references_are_of_this_model():
    assert CONFIG["model"] == common.checksums(MINI_MODEL), "another model: `make references`"


@pytest.mark.parametrize("dtype", DTYPES)
def test_text(parity, dtype):
    """Two prompts, one cut to the model's 32 tokens, and the empty one."""
    pipe = mini(dtype)
    with pytest.warns(UserWarning, match=r"63 tokens, the model takes 32; cut: '?.*moves"):
        tokens = pipe.tokenize([*CONFIG["prompts"], CONFIG["too_long"], ""])
    np.testing.assert_array_equal(tokens, WANTED["tokens"])
    compare(parity, "text", encode_text(pipe.text_encoder, jnp.asarray(tokens)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vae(parity, dtype):
    vae = mini(dtype).vae
    encode = jax.jit(lambda vae, x: vae.merge().encode(x))
    compare(parity, "moments", encode(vae, common.moving_square(17, 64)), dtype)
    decode = jax.jit(lambda vae, z: vae.merge().decode(z)[:, :, ::PIXELS, ::PIXELS])
    latents = WANTED["latents"][:1].transpose(0, 1, 3, 4, 2) / vae.merge().config.scaling_factor
    compare(parity, "decoded", decode(vae, latents), dtype)


def test_tiled_decoding_is_close_to_untiled():
    """Tiles have their own group statistics, so they differ a little: 31 dB of PSNR, here required to be 28.

    A quarter of the picture moved by one latent position has 27 dB.
    """
    vae = mini(jnp.float32).vae
    decode = jax.jit(
        lambda vae, z, tiled: vae.merge().decode(z, tiled=tiled),
        static_argnames="tiled",
        compiler_options={"xla_backend_optimization_level": 0},  # compiles in half the time
    )
    latents = WANTED["latents"][:1, :2].transpose(0, 1, 3, 4, 2) / vae.merge().config.scaling_factor
    whole, tiled = (np.asarray(decode(vae, latents, tiled=tiled)) for tiled in (False, True))
    assert 0 < np.mean((tiled - whole) ** 2) < 4 * 10**-2.8


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_guided_steps(parity, dtype):
    latents = common.values("latents", WANTED["latents"].shape)
    found = mini(dtype)(CONFIG["prompts"], latents=latents, output_type="latent", **CONFIG["call"]).latents
    compare(parity, "latents", found, dtype, bound=1e-4)


def test_exports_as_it_is_stored(tmp_path):
    """`write_diffusers` writes, to the byte, what `ref_mini` loads without naming a dtype."""
    names = ("transformer", "vae", "text_encoder", "scheduler")
    loaded = checkpoint.load(MINI_MODEL, components=names)
    parts = {name: getattr(loaded, name) for name in names}
    written = common.checksums(checkpoint.write_diffusers(tmp_path / "mini", **parts))
    stored = common.checksums(MINI_MODEL)
    del written["model_index.json"]  # which lists the tokenizer
    assert written == {name: stored[name] for name in stored if name.split("/")[0] in names}
