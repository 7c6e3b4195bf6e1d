"""The autoencoder's own promises: causality, bounded compilation, clear errors, tiles that line up, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from sixbit_jax.config import VAEConfig
from sixbit_jax.models import vae, vae_layers
from sixbit_jax.models.vae import AutoencoderKLCogVideoX, mode, sample_moments, split_moments

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = VAEConfig(
    block_out_channels=(4, 8),
    down_block_types=("CogVideoXDownBlock3D",) * 2,
    up_block_types=("CogVideoXUpBlock3D",) * 2,
    latent_channels=3,
    layers_per_block=1,
    norm_num_groups=2,
    temporal_compression_ratio=2,
    sample_height=16,
    sample_width=16,
)


def abstract(config=TINY, dtype=jnp.float32):
    return nnx.eval_shape(lambda: AutoencoderKLCogVideoX(config, dtype=dtype, rngs=nnx.Rngs(0)))


def filled(graph_and_state):
    """The model with random weights that keep activations near 1; faster than running every initialiser."""
    graph, state = graph_and_state
    random = np.random.default_rng(0)

    def fill(leaf):
        x = random.standard_normal(leaf.shape).astype(np.float32)
        return jnp.array(x / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 1 + x / 10)

    return nnx.merge(graph, jax.tree.map(fill, state))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def model():
    return filled(nnx.split(abstract()))


def test_later_latents_do_not_change_earlier_frames(model):
    """And earlier ones, through the caches, do change the frames of later chunks."""
    decode = jax.jit(model.decode)
    z = normal(0, 1, 7, 2, 2, 3)
    one, other = decode(z), decode(z.at[:, 5:].add(1))
    np.testing.assert_array_equal(one[:, :9], other[:, :9])
    assert np.abs(one[:, 9:] - other[:, 9:]).max() > 0.1
    assert np.abs(one[:, 9:] - decode(z.at[:, 4].add(1))[:, 9:]).max() > 1e-3


def test_later_frames_do_not_change_earlier_latents(model):
    encode = jax.jit(model.encode)
    x = normal(0, 1, 25, 4, 4, 3)
    one, other = encode(x), encode(x.at[:, 17:].add(1))
    np.testing.assert_array_equal(one[:, :9], other[:, :9])
    assert np.abs(one[:, 9:] - other[:, 9:]).max() > 0.1


def test_scan_over_chunks_agrees_with_a_loop(model):
    """Same operations, compiled apart, so float32 rounding only: 1e-5 of values near 1."""
    z = normal(1, 2, 6, 2, 4, 3)
    step = jax.jit(lambda z, cache: model.decoder(z, cache))
    frames, cache = [], None
    for start in (0, 2, 4):
        x, cache = step(z[:, start : start + 2], cache)
        frames.append(x)
    np.testing.assert_allclose(jax.jit(model.decode)(z), np.concatenate(frames, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("part", "frames"), [("encode", (16, 17, 80)), ("decode", (4, 5, 40))])
def test_program_size_does_not_depend_on_the_number_of_chunks(model, part, frames):
    def convolutions(n):
        x = jax.ShapeDtypeStruct((1, n, 4, 4, 3), jnp.float32)
        return str(jax.make_jaxpr(getattr(model, part))(x)).count("conv_general_dilated[")

    assert len({convolutions(n) for n in frames}) == 1
    assert 0 < convolutions(2) < convolutions(frames[0])


@pytest.mark.parametrize(("latents", "frames"), [(1, 1), (2, 4), (3, 5), (4, 8), (5, 9)])
def test_frame_counts(model, latents, frames):
    z = jax.ShapeDtypeStruct((2, latents, 2, 3, 3), jnp.float32)
    video = jax.eval_shape(model.decode, z)
    assert video.shape == (2, frames, 4, 6, 3)
    assert jax.eval_shape(model.encode, video).shape == (2, latents, 2, 3, 6)


@pytest.mark.parametrize(
    ("part", "shape", "message"),
    [
        ("encode", (1, 3, 4, 4, 4), "video has 4 channels .* takes 3"),
        ("encode", (1, 0, 4, 4, 3), "video has 0 frames; the model takes 2 \\* k"),
        ("encode", (1, 1, 4, 5, 3), "frames are 4 x 5; .* multiples of 2"),
        ("encode", (1, 1, 0, 4, 3), "frames are 0 x 4; .* multiples of 2"),
        ("decode", (1, 3, 4, 4, 4), "latents have 4 channels .* takes 3"),
        ("decode", (1, 0, 4, 4, 3), "latents are empty: 0 frames of 4 x 4"),
    ],
)
def test_wrong_arguments(model, part, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, part)(jnp.zeros(shape))


def test_wrong_number_of_frames():
    with pytest.raises(ValueError, match="video has 11 frames; the model takes 4 \\* k or 4 \\* k \\+ 1"):
        abstract(VAEConfig()).encode(jnp.zeros((1, 11, 8, 8, 3)))


def test_widths_that_do_not_divide_into_groups():
    config = VAEConfig(block_out_channels=(128, 96, 96, 96), norm_num_groups=48)
    with pytest.raises(ValueError, match=r"block_out_channels \[128\] must divide by norm_num_groups=48"):
        abstract(config)


def test_too_much_temporal_compression():
    config = VAEConfig(
        block_out_channels=(32,) * 5,
        down_block_types=("CogVideoXDownBlock3D",) * 5,
        up_block_types=("CogVideoXUpBlock3D",) * 5,
        temporal_compression_ratio=16,
    )
    with pytest.raises(ValueError, match="temporal_compression_ratio=16 must divide the 8 frames"):
        abstract(config)


def test_published_size():
    """The released autoencoder has 215,583,907 weights, and can be described without making them."""
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract(VAEConfig())))) == 215_583_907


@pytest.mark.parametrize(("size", "loops"), [((4, 4), False), ((4, 5), True), ((5, 4), True)])
def test_only_large_frames_are_tiled(model, size, loops):
    """One latent frame is one chunk, so the only loops in the program are those over tiles, here of 4 x 4 latents."""
    z = jax.ShapeDtypeStruct((1, 1, *size, 3), jnp.float32)
    assert ("scan[" in str(jax.make_jaxpr(functools.partial(model.decode, tiled=True))(z))) == loops


def test_tiled_sizes_line_up_whatever_the_tile(model):
    """Tiles of 4 latents overlap by parts that do not divide evenly, which the published rounding would get wrong."""
    z = jax.ShapeDtypeStruct((1, 3, 7, 9, 3), jnp.float32)
    video = jax.eval_shape(functools.partial(model.decode, tiled=True), z)
    assert video.shape == (1, 5, 14, 18, 3)
    assert jax.eval_shape(functools.partial(model.encode, tiled=True), video).shape == (1, 3, 7, 9, 6)


@pytest.mark.parametrize("size", [(13, 9), (4, 9), (5, 5), (11, 3)])
def test_tiles_of_the_identity_blend_to_the_input(size):
    """Blending weights sum to one: two float32 roundings, 2e-7 of values up to 4."""
    x = normal(3, 1, 2, *size, 3)
    sizes = {"tile": (5, 4), "stride": (4, 3), "tile_out": (5, 4), "stride_out": (4, 3)}
    found = jax.jit(lambda x: vae._in_tiles(lambda tile: tile, x, **sizes))(x)
    np.testing.assert_allclose(found, x, atol=1e-6)


def test_blend_fades_linearly():
    found = vae._blend(jnp.zeros((1, 1, 6, 2, 1)), jnp.ones((1, 1, 5, 2, 1)), 4, axis=2)
    np.testing.assert_array_equal(found[0, 0, :, 0, 0], np.float32([0, 0.25, 0.5, 0.75, 1]))


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_group_norm_far_from_zero(mean):
    """Float32 sums leave 1e-5, and 1e-4 at 1e3, whose spacing is 6e-5; squares about zero would lose all there."""
    x = np.asarray(normal(4, 2, 3, 4, 5, 6)) + np.float32(mean)
    scale, bias = np.asarray(normal(5, 6)), np.asarray(normal(6, 6))
    wide = x.astype(np.float64).reshape(2, -1, 3, 2)
    wide = (wide - wide.mean((1, 3), keepdims=True)) / np.sqrt(wide.var((1, 3), keepdims=True) + 1e-6)
    found = jax.jit(functools.partial(vae_layers.group_norm, groups=3, eps=1e-6))(x, scale, bias)
    tolerance = 1e-5 if not mean else 1e-4
    np.testing.assert_allclose(found, wide.reshape(x.shape) * scale + bias, atol=tolerance)


def test_group_norm_gradient():
    norm = jax.jit(functools.partial(vae_layers.group_norm, groups=2, eps=1e-6))
    check_grads(norm, (normal(7, 1, 2, 2, 2, 4), normal(8, 4), normal(9, 4)), order=1, modes=["rev"], rtol=2e-2)


@pytest.mark.parametrize(
    ("frames", "wanted"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 1, 2, 2]), (6, [0, 0, 1, 1, 2, 2])]
)
def test_nearest(frames, wanted):
    z = jnp.arange(len(set(wanted)), dtype=jnp.float32).reshape(1, -1, 1, 1, 1) * jnp.ones((1, 1, 2, 1, 1))
    z = z + jnp.array([0, 0.5]).reshape(1, 1, 2, 1, 1)
    found = vae_layers.nearest(z, frames, 4, 3)
    assert found.shape == (1, frames, 4, 3, 1)
    np.testing.assert_array_equal(found[0, :, 0, 2, 0], np.float32(wanted))
    np.testing.assert_array_equal(found[0, 0, :, 0, 0], np.float32([0, 0, 0.5, 0.5]))


def reconstruction_loss(graph, params, x):
    model = nnx.merge(graph, params)
    video = model.decode(sample_moments(model.encode(x), jax.random.key(0)))
    return jnp.square(video.astype(jnp.float32) - x).mean()


def test_every_weight_is_trained(model):
    """Eight frames are encoded in one chunk and decoded in two, so the gradient goes through the carried caches."""
    graph, params = nnx.split(model)
    x = normal(10, 1, 8, 4, 4, 3)
    for path, gradient in nnx.to_flat_state(
        jax.jit(jax.grad(functools.partial(reconstruction_loss, graph)))(params, x)
    ):
        assert np.isfinite(gradient[...]).all(), path
        assert np.any(gradient[...]), path


def test_mixed_precision_dtypes():
    """bfloat16 compute on float32 weights: outputs are bfloat16, gradients float32."""
    graph, params = nnx.split(abstract(dtype=jnp.bfloat16))
    x = jax.ShapeDtypeStruct((1, 8, 4, 4, 3), jnp.float32)
    moments = jax.eval_shape(lambda params, x: nnx.merge(graph, params).encode(x), params, x)
    z = jax.ShapeDtypeStruct((1, 4, 2, 2, 3), jnp.float32)
    video = jax.eval_shape(lambda params, z: nnx.merge(graph, params).decode(z), params, z)
    assert moments.dtype == video.dtype == jnp.bfloat16
    gradients = jax.eval_shape(jax.grad(functools.partial(reconstruction_loss, graph)), params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


def test_sampling_moments():
    """100,000 draws: the standard error of mean and standard deviation is below 0.4%."""
    moments = jnp.concatenate([jnp.full((50_000, 2), 3.0), jnp.full((50_000, 2), np.log(4.0))], axis=-1)
    latents = sample_moments(moments, jax.random.key(0))
    assert latents.shape == (50_000, 2)
    np.testing.assert_allclose([latents.mean(), latents.std()], [3, 2], rtol=0.02)
    np.testing.assert_array_equal(mode(moments), np.full((50_000, 2), 3, np.float32))


def test_log_variance_is_clamped():
    mean, log_variance = split_moments(jnp.array([1.0, 2.0, -99.0, 99.0]))
    np.testing.assert_array_equal(mean, [1, 2])
    np.testing.assert_array_equal(log_variance, [-30, 20])
