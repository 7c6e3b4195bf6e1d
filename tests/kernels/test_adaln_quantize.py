"""`adaln_quantize`: every implementation against the definition, with the room that float32 sums need."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import differences, share_of_other_codes, unexplained

from pallas_kernels.adaln_quantize import adaln_quantize, reference, shapes
from pallas_kernels.adaln_quantize.types import AdaptiveNorm
from pallas_kernels.common import device, quantize_tile
from pallas_kernels.rotate_quantize import reference as rotation

F32 = np.float32
OPTIONS = {
    "int8": {"format": "int8"},
    "nvfp4": {"format": "nvfp4"},
    "nvfp4 4/6": {"format": "nvfp4", "four_over_six": True},
}


@pytest.fixture(params=["pallas_triton", "xla"])
def implementation(request):
    """Each that does all of the operation; Pallas kernels are interpreted."""
    with contextlib.nullcontext() if request.param == "xla" else device.interpret():
        yield functools.partial(adaln_quantize, implementation=request.param)


def arguments(shape=shapes.SMALL[1], dtype="bfloat16", *, seed=0, offset=0.5, spread=1.0):
    """(x, the other arrays and text_length and epsilon), in NumPy."""
    rng = np.random.default_rng(seed)
    x = offset + spread * rng.standard_normal((shape.batch, shape.tokens, shape.dim))
    x *= np.where(rng.random(shape.dim) < 0.03, 20, 1)
    vectors = {
        "norm_scale": 1 + 0.2 * rng.standard_normal(shape.dim),
        "norm_bias": 0.1 * rng.standard_normal(shape.dim),
        "shift": 0.5 * rng.standard_normal((shape.batch, 2, shape.dim)),
        "scale": 0.3 * rng.standard_normal((shape.batch, 2, shape.dim)),
    }
    vectors = {name: value.astype("bfloat16") for name, value in vectors.items()}
    return x.astype(dtype), vectors | {"text_length": shape.text_length, "epsilon": 1e-5}


def on_device(keywords):
    return {name: jnp.asarray(v) if isinstance(v, np.ndarray) else v for name, v in keywords.items()}


def rotated_and_bound(x, keywords, hadamard, rotation_bound=rotation.ROTATION_BOUND):
    """The rotated rows of the definition, and how far an implementation may be from each value.

    Its own rotation may be off by `rotation_bound`, and the definition's is.
    """
    y = reference.modulate(x, AdaptiveNorm(**keywords))
    blocks = reference.modulation_bound(x, AdaptiveNorm(**keywords)).reshape(-1, hadamard or 1)
    if not hadamard:
        return y, blocks.reshape(y.shape)
    off = np.linalg.norm(blocks, axis=-1)
    norm = np.linalg.norm(y.reshape(-1, hadamard).astype(np.float64), axis=-1)
    bound = np.repeat(off + (rotation.ROTATION_BOUND + rotation_bound) * norm, hadamard).reshape(y.shape)
    return rotation.rotate(y, hadamard), bound


@pytest.mark.parametrize("shape", shapes.SMALL, ids=lambda s: s.name)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_shape_is_explained_by_the_definition(implementation, shape, options):
    x, keywords = arguments(shape)
    found, statistics = implementation(jnp.asarray(x), **on_device(keywords), **options)
    found.validate()
    rotated, bound = rotated_and_bound(x, keywords, found.hadamard)
    assert unexplained(found, rotated, bound, four_over_six=options.get("four_over_six", False)) == []
    wanted, wanted_statistics = reference.adaln_quantize(
        x, AdaptiveNorm(**keywords), **options, hadamard=found.hadamard
    )
    # A value within `bound` of where two codes meet may take either: about 1e-5 of all values.
    assert share_of_other_codes(found, wanted) <= 2e-3
    np.testing.assert_allclose(statistics.sum_abs, wanted_statistics.sum_abs, rtol=1e-5)
    np.testing.assert_allclose(statistics.max_abs, wanted_statistics.max_abs, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("hadamard", [0, 32, 128])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_dtype_and_rotation(implementation, dtype, hadamard, options):
    x, keywords = arguments(dtype=dtype)
    found, _ = implementation(jnp.asarray(x), **on_device(keywords), **options, hadamard=hadamard)
    assert found.hadamard == hadamard
    rotated, bound = rotated_and_bound(x, keywords, hadamard)
    assert unexplained(found, rotated, bound, four_over_six=options.get("four_over_six", False)) == []


@pytest.mark.parametrize(("offset", "spread"), [(100.0, 1.0), (0.0, 1e-4), (0.0, 1e4)])
def test_rows_far_from_zero_or_of_any_size(implementation, offset, spread):
    """A mean a hundred times the deviation loses bits, as the bound says; a one-pass variance would lose them all."""
    x, keywords = arguments(dtype="float32", offset=offset, spread=spread)
    found, _ = implementation(jnp.asarray(x), **on_device(keywords), format="int8")
    assert unexplained(found, *rotated_and_bound(x, keywords, 128)) == []


@pytest.mark.parametrize("carrier", ["exact", "fp8"])
@pytest.mark.parametrize("four_over_six", [False, True])
def test_a_carrier_is_the_cast_of_the_packed_array(implementation, carrier, four_over_six):
    from pallas_kernels.nvfp4_cast.reference import cast

    x, keywords = arguments()
    call = functools.partial(implementation, jnp.asarray(x), **on_device(keywords), format="nvfp4")
    packed, statistics = call(four_over_six=four_over_six)
    carried, same_statistics = call(four_over_six=four_over_six, carrier=carrier)
    carried.validate()
    assert differences(carried, cast(jax.tree.map(np.asarray, packed), to=carrier)) == []
    assert differences(same_statistics, statistics) == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_non_finite_rows_are_nan_and_others_untouched(implementation, options):
    x, keywords = arguments(dtype="float32")
    broken = x.copy()
    broken[0, 2, 5], broken[1, 0, 100], broken[1, 6, 0] = np.nan, np.inf, -np.inf
    bad = np.zeros(x.shape[:2], bool)
    bad[0, 2] = bad[1, 0] = bad[1, 6] = True
    call = functools.partial(implementation, **on_device(keywords), **options)
    (found, statistics), (sound, _) = call(jnp.asarray(broken)), call(jnp.asarray(x))
    scale = np.asarray(found.scale if options["format"] == "int8" else found.scales)
    nan = np.isnan(scale) if options["format"] == "int8" else (scale == 0x7F).all(-1)
    np.testing.assert_array_equal(nan, bad)
    assert (np.asarray(found.codes)[bad] == 0).all()
    np.testing.assert_array_equal(np.asarray(found.codes)[~bad], np.asarray(sound.codes)[~bad])
    assert not np.isfinite(np.asarray(statistics.max_abs))[bad].any()
    assert not np.isfinite(np.asarray(statistics.sum_abs))[bad].any()


MOSAIC = {"format": "int8", "implementation": "pallas_mosaic_gpu"}


def mosaic(x, keywords, **options):
    """(found, its statistics), interpreted and in NumPy."""
    with device.interpret():
        found = adaln_quantize(jnp.asarray(x), **on_device(keywords), **(MOSAIC | options))
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize(
    ("tokens", "text_length", "dim"),
    [(16, 3, 384), (40, 11, 128), (24, 16, 256), (16, 0, 128), (16, 16, 128), (16, 13, 128 * 22)],
)
def test_mosaic_is_explained_by_the_definition(tokens, text_length, dim):
    """Text and video in one tile, or not; only one of them; one piece of a tile, and three."""
    shape = shapes.Shape(name="", batch=2, tokens=tokens, text_length=text_length, dim=dim)
    x, keywords = arguments(shape, offset=3.0)
    found, statistics = mosaic(x, keywords)
    found.validate()
    assert unexplained(found, *rotated_and_bound(x, keywords, 128, quantize_tile.ROTATION_BOUND)) == []
    wanted, wanted_statistics = reference.adaln_quantize(x, AdaptiveNorm(**keywords), format="int8", hadamard=128)
    assert share_of_other_codes(found, wanted) <= 2e-3
    np.testing.assert_allclose(statistics.sum_abs, wanted_statistics.sum_abs, rtol=1e-5)
    np.testing.assert_allclose(statistics.max_abs, wanted_statistics.max_abs, rtol=1e-5)


@pytest.mark.parametrize("far", ["mean", "first block"])
def test_mosaic_with_a_mean_or_first_values_far_from_the_others(far):
    """Means and squares are of each place in a block, which here lie far from zero or from each other."""
    shape = shapes.Shape(name="", batch=1, tokens=16, text_length=3, dim=640)
    x, keywords = arguments(shape, offset=250.0 if far == "mean" else 0.0)
    if far == "first block":
        x[..., :128] = x[..., :128] + np.asarray(100, x.dtype)
    found, statistics = mosaic(x, keywords)
    assert unexplained(found, *rotated_and_bound(x, keywords, 128, quantize_tile.ROTATION_BOUND)) == []
    _, wanted = reference.adaln_quantize(x, AdaptiveNorm(**keywords), format="int8", hadamard=128)
    np.testing.assert_allclose(statistics.sum_abs, wanted.sum_abs, rtol=1e-5)


@pytest.mark.parametrize("carrier", ["exact", "fp8"])
def test_mosaic_in_a_carrier_is_the_definition_but_for_values_where_codes_meet(carrier):
    """Text and video in one tile; with rows that are not finite, of which blocks of the rotation are NaN."""
    shape = shapes.Shape(name="", batch=2, tokens=24, text_length=11, dim=384)
    x, keywords = arguments(shape, offset=3.0)
    x[0, 5, 3], x[1, 12, 300] = np.nan, np.inf
    options = {"format": "nvfp4", "carrier": carrier}
    found, statistics = mosaic(x, keywords, **options)
    found.validate()
    wanted, wanted_statistics = reference.adaln_quantize(x, AdaptiveNorm(**keywords), **options, hadamard=128)
    np.testing.assert_array_equal(np.isnan(found.codes), np.isnan(wanted.codes))
    assert share_of_other_codes(found, wanted) <= 2e-3
    # A value of y that falls to the other side of a bfloat16 moves the 128 that it is rotated into.
    np.testing.assert_allclose(found.scale, wanted.scale, rtol=1e-4)
    sound = np.isfinite(wanted_statistics.sum_abs)
    np.testing.assert_allclose(statistics.sum_abs[sound], wanted_statistics.sum_abs[sound], rtol=1e-5)
    assert not np.isfinite(statistics.sum_abs[~sound]).any()


def extreme_rows(tokens, dim):
    """By name: rows of x, and what multiplies all gains and offsets."""
    normal = np.random.default_rng(8).standard_normal((2, tokens, dim))
    broken = normal.copy()
    broken[0, 5, 3], broken[1, 2, 200], broken[1, 9, 0] = np.nan, np.inf, -np.inf
    return {
        "nan and inf": (broken, 1.0),
        "a zero row": (normal * (np.arange(tokens) != 9)[:, None], 1.0),
        "constant": (np.full(normal.shape, 3.1), 1.0),
        "huge": (normal * 2.0**60, 1.0),
        "tiny": (normal * 2.0**-60, 1.0),
        "near the flush": (normal, 2.0**-96),
        "zero": (normal, 0.0),
    }


def test_mosaic_with_extreme_rows():
    """As XLA does: rows that are not finite have no scale and zeros for codes, and what the definition flushes is."""
    shape = shapes.Shape(name="", batch=2, tokens=16, text_length=11, dim=256)
    _, keywords = arguments(shape)
    for x, factor in extreme_rows(shape.tokens, shape.dim).values():
        x = x.astype("bfloat16")
        scaled = keywords | {
            name: (keywords[name].astype(F32) * factor).astype("bfloat16")
            for name in ("norm_scale", "norm_bias", "shift")
        }
        found, statistics = mosaic(x, scaled)
        wanted, wanted_statistics = adaln_quantize(
            jnp.asarray(x), **on_device(scaled), format="int8", implementation="xla"
        )
        wanted = jax.tree.map(np.asarray, wanted)
        np.testing.assert_array_equal(np.isnan(found.scale), np.isnan(wanted.scale))
        np.testing.assert_allclose(found.scale, wanted.scale, rtol=1e-5)
        assert share_of_other_codes(found, wanted) <= 2e-3
        sound = ~np.isnan(found.scale)
        assert not found.codes[~sound].any()
        for name in ("sum_abs", "max_abs"):
            one, other = (np.asarray(getattr(each, name)) for each in (statistics, wanted_statistics))
            assert not np.isfinite(one[~sound]).any()
            np.testing.assert_allclose(one[sound], other[sound], rtol=1e-5)


def test_mosaic_takes_vmap():
    x, keywords = arguments(shapes.Shape(name="", batch=2, tokens=16, text_length=3, dim=256))
    one, _ = mosaic(x, keywords)
    call = functools.partial(adaln_quantize, **on_device(keywords), **MOSAIC)
    with device.interpret():
        two, _ = jax.vmap(call)(jnp.stack([jnp.asarray(x)] * 2))
    for entry in range(2):
        assert differences(jax.tree.map(lambda leaf, entry=entry: np.asarray(leaf)[entry], two), one) == []


@pytest.mark.parametrize(
    ("tokens", "dim", "dtype", "options", "message"),
    [
        (16, 256, "bfloat16", {"format": "nvfp4"}, "nvfp4 of bfloat16"),
        (16, 256, "float32", {}, "int8 of float32"),
        (16, 256, "bfloat16", {"hadamard": 64}, "by 64"),
        (17, 256, "bfloat16", {}, "do not divide 17"),
        (16, 128 * 25, "bfloat16", {}, "at most 24 blocks of 128, not 3200 values"),
    ],
)
def test_mosaic_refuses(tokens, dim, dtype, options, message):
    x, keywords = arguments(shapes.Shape(name="", batch=1, tokens=tokens, text_length=3, dim=dim), dtype)
    with device.interpret(), pytest.raises(NotImplementedError, match=message):
        adaln_quantize(jnp.asarray(x), **on_device(keywords), **(MOSAIC | options))


def test_jit_and_vmap_give_the_same_bytes(implementation):
    x, keywords = arguments()
    arrays = {name: value for name, value in on_device(keywords).items() if not isinstance(value, int | float)}
    fixed = {name: value for name, value in keywords.items() if name not in arrays}
    call = functools.partial(implementation, **fixed, format="nvfp4")
    one, _ = call(jnp.asarray(x), **arrays)
    stacked = {name: jnp.stack([value, value]) for name, value in arrays.items()}
    two, _ = jax.jit(jax.vmap(lambda x, arrays: call(x, **arrays)))(jnp.stack([jnp.asarray(x)] * 2), stacked)
    for entry in range(2):
        assert differences(jax.tree.map(lambda leaf, entry=entry: leaf[entry], two), one) == []


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("text and video swapped", lambda k: {"shift": k["shift"][:, ::-1], "scale": k["scale"][:, ::-1]}),
        ("text a row longer", lambda k: {"text_length": k["text_length"] + 1}),
        ("scale without its one", lambda k: {"scale": k["scale"].astype(F32) - 1}),
        ("no shift", lambda k: {"shift": 0 * k["shift"]}),
        ("no norm bias", lambda k: {"norm_bias": 0 * k["norm_bias"]}),
        ("another epsilon", lambda k: {"epsilon": 1e-3}),
        ("samples swapped", lambda k: {"scale": k["scale"][::-1]}),
    ],
)
@pytest.mark.parametrize("format", ["int8", "nvfp4"])
def test_mutations_are_not_explained(name, mutate, format):
    x, keywords = arguments()
    mutated, _ = reference.adaln_quantize(x, AdaptiveNorm(**(keywords | mutate(keywords))), format=format, hadamard=128)
    rotated, bound = rotated_and_bound(x, keywords, 128)
    assert (
        unexplained(
            reference.adaln_quantize(x, AdaptiveNorm(**keywords), format=format, hadamard=128)[0], rotated, bound
        )
        == []
    )
    assert unexplained(mutated, rotated, bound) != []


def test_a_missing_rounding_in_between_is_not_explained():
    x, keywords = arguments()
    y = reference.modulate(x.astype(F32), AdaptiveNorm(**keywords))
    unrounded, _ = rotation.rotate_quantize(y, format="int8", hadamard=128)
    assert unexplained(unrounded, *rotated_and_bound(x, keywords, 128)) != []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((3, 384))}, r"x must be \[batch, tokens, dim\], found \(3, 384\)"),
        ({"norm_scale": jnp.ones(3)}, r"norm_scale must be \(384,\) for x of \(2, 7, 384\), found \(3,\)"),
        ({"norm_bias": jnp.ones((1, 384))}, r"norm_bias must be \(384,\)"),
        ({"shift": jnp.ones((2, 384))}, r"shift must be \(2, 2, 384\)"),
        ({"scale": jnp.ones((1, 2, 384))}, r"scale must be \(2, 2, 384\) .* found \(1, 2, 384\)"),
        ({"text_length": 8}, "text_length=8 must be 0 to 7"),
        ({"format": "fp8"}, "unknown format 'fp8'"),
        ({"format": "int8", "carrier": "fp8"}, "belong to format='nvfp4'"),
        ({"carrier": "bf16"}, "unknown carrier 'bf16'; carriers are None, exact, fp8"),
        ({"hadamard": 48}, "hadamard=48"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
    ],
)
def test_wrong_calls(change, message):
    x, keywords = arguments()
    with pytest.raises(ValueError, match=message):
        adaln_quantize(**({"x": jnp.asarray(x), "format": "nvfp4"} | on_device(keywords) | change))
