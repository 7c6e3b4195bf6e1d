"""Weights rounded for their inputs, against GPTQ written out in NumPy, and moments against the inputs themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from policies import BLOCKS, STEPS, arguments, make

from pallas_kernels.common.reference import decode_e4m3, dequantize, encode_e4m3_scale, nearest
from pallas_kernels.rotate_quantize import rotate_quantize
from pallas_kernels.rotate_quantize.reference import rotate
from sixbit_jax import Pipeline, moments
from sixbit_jax.errors import ArgumentError
from sixbit_jax.models.linears import SITES, PlainLinears
from sixbit_jax.models.split import Split
from sixbit_jax.qtensor import QuantLinear, quantize_model
from sixbit_jax.rounding import DAMPING, SCALE_STEPS, group_size, round_to_inputs
from sixbit_jax.sampling import sampler

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def correlated(rng, rows, k):
    """Rows of which a few directions hold nearly all."""
    return rng.standard_normal((rows, k // 8)) @ rng.standard_normal((k // 8, k)) + 0.1 * rng.standard_normal((rows, k))


def by_hand(weight, moment, hadamard):
    """One group, column by column in float64 -> the rotated weight, rounded."""
    w = rotate(weight, hadamard).astype(np.float64)
    moment = rotate(rotate(moment.astype(np.float32), hadamard).T, hadamard).astype(np.float64)
    moment += DAMPING * np.trace(moment) / len(moment) * np.eye(len(moment))
    factor = np.linalg.cholesky(np.linalg.inv(moment)).T
    scale_of_all = np.abs(w).max() / (6 * 448)

    def rounded(w, first, scale):
        """Columns from `first` on, a block of them rounded; and the sum of what that loses, by row."""
        w, cost = w.copy(), np.zeros(len(w))
        for j in range(first, first + 16):
            found = np.sign(w[:, j]) * E2M1[nearest(np.abs(w[:, j]) / scale, E2M1)] * scale
            loss = (w[:, j] - found) / factor[j, j]
            w[:, j] = found
            w[:, j + 1 :] -= np.outer(loss, factor[j, j + 1 :])
            cost += loss**2
        return w, cost

    for first in range(0, w.shape[1], 16):
        byte = encode_e4m3_scale(np.abs(w[:, first : first + 16]).max(1) / scale_of_all / 6).astype(int)
        trials = np.clip(byte + np.arange(*SCALE_STEPS)[:, None], 1, 126).astype(np.uint8)
        tried = [rounded(w, first, decode_e4m3(trial) * scale_of_all) for trial in trials]
        best = np.argmin([cost for _, cost in tried], axis=0)
        w = np.stack([tried[i][0][row] for row, i in enumerate(best)])
    return w


def error(found, weight, x, hadamard):
    """Relative, of the outputs."""
    exact = rotate(weight, hadamard)
    return np.linalg.norm((found - exact) @ rotate(x, hadamard).T) / np.linalg.norm(exact @ rotate(x, hadamard).T)


@pytest.mark.parametrize(("out", "k", "hadamard"), [(48, 256, 128), (7, 64, 0), (16, 192, 64)])
def test_outputs_stay_nearer_than_with_the_nearest_weights(out, k, hadamard):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((out, k)).astype(np.float32)
    x, fresh = (values.astype(np.float32) for values in np.split(correlated(rng, 4096, k), 2))
    moment = x.T @ x
    found = dequantize(round_to_inputs(jnp.asarray(weight), jnp.asarray(moment)[None], hadamard=hadamard))
    plain = dequantize(rotate_quantize(jnp.asarray(weight), format="nvfp4", hadamard=hadamard)[0])
    wanted = by_hand(weight, moment, hadamard)
    assert (np.abs(found - wanted) < 1e-5 * np.abs(wanted).max()).mean() > 0.9  # a tie goes either way, and then on
    assert error(found, weight, fresh, hadamard) < 1.05 * error(wanted, weight, fresh, hadamard)
    assert error(found, weight, fresh, hadamard) < 0.6 * error(plain, weight, fresh, hadamard)


@pytest.mark.parametrize("hadamard", [128, 0])
@pytest.mark.parametrize("seen", [3.0, 0.0], ids=["without correlation", "never seen"])
def test_inputs_that_tell_nothing_leave_codes_the_nearest(hadamard, seen):
    """Of the scales that are tried, the one with the smallest error; for it, the nearest codes."""
    weight = jax.random.normal(jax.random.key(0), (40, 384))
    array = round_to_inputs(weight, seen * jnp.stack([jnp.eye(128)] * 3), hadamard=hadamard)
    plain = rotate_quantize(weight, format="nvfp4", hadamard=hadamard)[0]
    assert array.tensor_scale == plain.tensor_scale
    exact = rotate(np.asarray(weight), hadamard).reshape(-1, 16)

    def by_scale(steps):
        byte = np.clip(np.asarray(plain.scales).reshape(-1).astype(int) + steps, 1, 126).astype(np.uint8)
        scale = decode_e4m3(byte)[:, None] * float(plain.tensor_scale)
        return np.sign(exact) * E2M1[nearest(np.abs(exact) / scale, E2M1)] * scale

    tried = [((by_scale(steps) - exact) ** 2).sum(1) for steps in range(*SCALE_STEPS)]
    found = dequantize(array).reshape(-1, 16)
    np.testing.assert_allclose(((found - exact) ** 2).sum(1), np.min(tried, axis=0), rtol=1e-4)
    assert (np.min(tried, axis=0) < 0.9 * tried[-SCALE_STEPS[0]]).mean() > 0.2


def test_groups_are_rounded_apart():
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.standard_normal((8, 256)), jnp.float32)
    x = jnp.asarray(correlated(rng, 512, 256), jnp.float32).reshape(512, 2, 128)
    moment = jnp.einsum("ngi,ngj->gij", x, x)
    both = round_to_inputs(weight, moment, hadamard=128)
    other = round_to_inputs(weight, moment.at[1].set(jnp.eye(128)), hadamard=128)
    np.testing.assert_array_equal(both.codes[:, :64], other.codes[:, :64])
    assert (both.codes[:, 64:] != other.codes[:, 64:]).any()


@pytest.mark.parametrize(("k", "size"), [(3072, 3072), (12288, 4096), (1920, 1920), (7680, 3840), (192, 192), (80, 80)])
def test_group_sizes(k, size):
    assert group_size(k) == size


def test_a_size_without_a_group():
    with pytest.raises(ValueError, match="do not divide a contracting axis of 72"):
        group_size(72)


def test_moments_are_those_of_the_inputs():
    """Of every block and step, against what the blocks are given in a Python loop."""
    split = make(quantized=False)
    model = split.merge()
    schedule, scale, latents, conditioning = arguments()
    _, found = moments.sample(split, moments.init(split), schedule, scale, latents, conditioning)
    seen = {site: np.zeros(values.shape) for site, values in found.items()}
    graph, params = nnx.split(model.blocks)

    class Recorder(PlainLinears):
        def __init__(self, block):
            self.block = block

        def __call__(self, site, linear, x):
            raise AssertionError(site)

    state, inputs = sampler.prepare(model, schedule, scale, latents, conditioning, None)
    for step in range(STEPS):
        row = jax.tree.map(lambda value, i=step: value[i], inputs)
        samples, text, timestep = sampler.forward_inputs(state, row, conditioning)
        x, context = model.embed(samples, text, timestep)
        for i in range(BLOCKS):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], params))
            for site in SITES:
                layer = getattr(block, site)
                setattr(block, site, watched(layer, lambda x, i=i, site=site: add(seen, site, i, x)))
            x = block(x, context)
        state, _ = sampler.advance(state, row, conditioning, model.project(x, context, samples.shape))
    for path, values in found.items():
        np.testing.assert_allclose(values, seen[path], rtol=2e-3, atol=1e-3 * np.abs(seen[path]).max())


def watched(layer, see):
    """A linear that shows its input first."""

    class Watched(nnx.Module):
        def __call__(self, x):
            see(x)
            return layer(x)

    return Watched()


def add(seen, site, block, x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    seen[f"blocks.{site}"][block, 0] += x.T @ x


def test_a_model_rounded_for_its_inputs():
    """Its latents are nearer to the original's; what has no moment is as it was."""
    split, inputs = make(quantized=False), arguments(batch=2)
    wanted, found = moments.sample(split, moments.init(split), *inputs)
    plain, rounded = (Split.of(quantize_model(split.merge(), moments=m)) for m in (None, found))
    errors = [float(jnp.linalg.norm(sampler.sample(each, *inputs)[0] - wanted)) for each in (plain, rounded)]
    assert errors[1] < 0.8 * errors[0]
    kept = [each.merge().blocks.norm1.linear for each in (plain, rounded)]
    jax.tree.map(np.testing.assert_array_equal, *[nnx.state(layer) for layer in kept])
    assert isinstance(rounded.merge().blocks.ff_in, QuantLinear)


def test_bad_moments_are_refused():
    split = make(quantized=False)
    model = split.merge
    good = moments.init(split)
    with pytest.raises(ValueError, match="four_over_six"):
        quantize_model(model(), four_over_six=True, moments=good)
    with pytest.raises(ValueError, match=r"a moment of .*nothing, which is not quantised"):
        quantize_model(model(), moments={"blocks.nothing": good["blocks.attn_in"]})
    with pytest.raises(ValueError, match=r"blocks.ff_out: a moment of 1 x \d+ inputs is not of a weight with"):
        quantize_model(model(), moments={"blocks.ff_out": good["blocks.attn_in"]})
    with pytest.raises(ValueError, match=r"blocks.ff_in: the moment of its inputs, or the weight, has NaN"):
        quantize_model(model(), moments={"blocks.ff_in": good["blocks.ff_in"].at[1, 0, 2, 3].set(jnp.nan)})
    with pytest.raises(ArgumentError, match="quantised already"):
        moments.init(make(quantized=True))
    pipe = Pipeline.from_pretrained("mini")
    with pytest.raises(ArgumentError, match="prompts is an empty list"):
        moments.gather(pipe, [])
