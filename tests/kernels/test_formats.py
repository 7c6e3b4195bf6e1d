"""The codecs over every code there is, the array types' invariants, and the choice of implementation."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.common import choice, formats, reference, xla
from pallas_kernels.common.formats import Int8Array, NVFP4Array

BYTES = np.arange(256, dtype=np.uint8)
F32 = np.float32


def test_every_byte_unpacks_low_nibble_first_and_packs_back():
    unpacked = np.asarray(xla.unpack(jnp.asarray(BYTES)))
    assert unpacked.shape == (512,)
    np.testing.assert_array_equal(unpacked[0::2], BYTES % 16)
    np.testing.assert_array_equal(unpacked[1::2], BYTES // 16)
    np.testing.assert_array_equal(unpacked, reference.unpack(BYTES))
    np.testing.assert_array_equal(xla.pack(jnp.asarray(unpacked)), BYTES)
    np.testing.assert_array_equal(reference.pack(unpacked), BYTES)


def test_every_e2m1_code():
    codes = np.arange(16, dtype=np.uint8)
    wanted = codes.view(ml_dtypes.float4_e2m1fn).astype(F32)
    assert np.asarray(xla.decode_e2m1(jnp.asarray(codes))).tobytes() == wanted.tobytes()
    assert reference.decode_e2m1(codes).astype(F32).tobytes() == wanted.tobytes()


def test_every_e4m3_byte():
    wanted = BYTES.view(ml_dtypes.float8_e4m3fn).astype(F32)
    assert np.isnan(wanted).sum() == 2
    np.testing.assert_array_equal(xla.decode_e4m3(jnp.asarray(BYTES)), wanted)
    np.testing.assert_array_equal(reference.decode_e4m3(BYTES), wanted)
    np.testing.assert_array_equal(np.signbit(xla.decode_e4m3(jnp.asarray(BYTES)))[[0, 0x80]], [False, True])


@pytest.mark.parametrize("size", [1, 2, *formats.HADAMARD_BLOCKS])
def test_sylvester_by_its_bits(size):
    """The sign of an entry is the parity of the bits that row and column share."""
    both = np.bitwise_and.outer(np.arange(size), np.arange(size))
    np.testing.assert_array_equal(formats.sylvester(size), (-1.0) ** np.bitwise_count(both))


def around(values):
    """Float32 values, and the float32 neighbours of each."""
    values = np.asarray(values, F32)
    return np.concatenate([np.nextafter(values, F32(0)), values, np.nextafter(values, F32(np.inf))])


@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
def test_reciprocals_are_correctly_rounded_whatever_the_device_divides(ulps):
    """Every 16th float32 of [1, 2), each from a guess that is off by as much as a GPU's division may be."""
    x = np.arange(2**23, 2**24, 16, dtype=np.uint32).astype(F32) / F32(2**23)
    wanted = (1 / x.astype(np.float64)).astype(F32)
    guess = (wanted.view(np.int32) + np.int32(ulps)).view(F32)
    np.testing.assert_array_equal(jax.jit(xla.nearest_reciprocal)(x, guess), wanted)


def test_reciprocals_of_all_magnitudes():
    x = (2.0 ** np.random.default_rng(0).uniform(-100, 126, 10_000)).astype(F32)
    x = np.concatenate([x, F32(2.0) ** np.arange(-126, 127, dtype=F32)])
    np.testing.assert_array_equal(jax.jit(xla.reciprocal)(x), (1 / x.astype(np.float64)).astype(F32))


def test_e4m3_scales_round_at_every_midpoint():
    table = reference.E4M3_TABLE[1:]
    values = np.clip(around(np.concatenate([table, (table[:-1] + table[1:]) / 2])), 2.0**-9, 448).astype(F32)
    wanted = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(reference.encode_e4m3_scale(values), wanted)
    np.testing.assert_array_equal(xla.encode_e4m3_scale(jnp.asarray(values)), wanted)


def test_e4m3_scales_are_clamped():
    values = np.array([0, 1e-30, 2.0**-10, 449, 1e30, np.inf, np.nan], F32)
    wanted = np.array([1, 1, 1, 0x7E, 0x7E, 0x7E, 0x7E], np.uint8)
    np.testing.assert_array_equal(reference.encode_e4m3_scale(values), wanted)
    np.testing.assert_array_equal(xla.encode_e4m3_scale(jnp.asarray(values)), wanted)


def test_e2m1_rounds_at_every_midpoint_of_every_scale():
    scales = reference.E4M3_TABLE[1:].astype(F32)
    table = reference.E2M1_TABLE
    points = np.concatenate([table, (table[:-1] + table[1:]) / 2, [7.0, 1e6]]).astype(F32)
    values = np.stack([around(points * scale) for scale in scales])
    wanted = reference.nearest(values.astype(np.float64) / scales[:, None].astype(np.float64), table)
    found = xla.encode_e2m1_magnitude(jnp.asarray(values), jnp.asarray(scales)[:, None])
    np.testing.assert_array_equal(found, wanted)
    unit = np.flatnonzero(scales == 1)[0]
    oracle = np.minimum(values[unit], 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(wanted[unit], oracle)


def nvfp4(rows=(3,), size=32, leading=(), hadamard=0):
    return NVFP4Array(
        codes=np.zeros((*rows, size // 2), np.uint8),
        scales=np.zeros((*rows, size // 16), np.uint8),
        tensor_scale=np.ones(leading, F32),
        hadamard=hadamard,
    )


def int8(rows=(3,), size=32, hadamard=0):
    return Int8Array(codes=np.zeros((*rows, size), np.int8), scale=np.ones(rows, F32), hadamard=hadamard)


@pytest.mark.parametrize(
    "array", [nvfp4(), nvfp4((2, 3), 128, (2,), 64), nvfp4((), 16), nvfp4((2, 3), 64, (2, 3)), int8(), int8((), 7)]
)
def test_sound_arrays_validate(array):
    array.validate()
    jax.eval_shape(lambda a: a, array).validate()


@pytest.mark.parametrize(
    ("array", "change", "message"),
    [
        (nvfp4(), {"codes": np.zeros((3, 16), np.int8)}, "codes must be uint8, found int8"),
        (nvfp4(), {"scales": np.zeros((3, 2), ml_dtypes.float8_e4m3fn)}, "scales must be uint8"),
        (nvfp4(), {"tensor_scale": np.ones((), np.float64)}, "tensor_scale must be float32"),
        (nvfp4(), {"codes": np.zeros((3, 12), np.uint8)}, r"\(3, 12\)"),
        (nvfp4(), {"codes": np.zeros((3, 0), np.uint8)}, r"\(3, 0\)"),
        (nvfp4(), {"codes": np.zeros((), np.uint8)}, "codes"),
        (nvfp4(), {"scales": np.zeros((2, 3), np.uint8)}, r"\(3, 2\), found \(2, 3\)"),
        (nvfp4(), {"tensor_scale": np.ones((1,), F32)}, r"\(3,\) of the rows, found \(1,\)"),
        (nvfp4(), {"tensor_scale": np.ones((3, 2), F32)}, r"\(3,\) of the rows, found \(3, 2\)"),
        (nvfp4(), {"hadamard": 64}, "64 does not divide a contracting axis of 32"),
        (nvfp4(), {"hadamard": 16}, "hadamard=16"),
        (int8(), {"codes": np.zeros((3, 32), np.uint8)}, "codes must be int8"),
        (int8(), {"codes": np.zeros((3, 0), np.int8)}, r"\(3, 0\)"),
        (int8(), {"scale": np.ones((3, 1), F32)}, r"\(3,\), found \(3, 1\)"),
        (int8(), {"scale": np.ones((3,), np.float16)}, "scale must be float32"),
        (int8(), {"hadamard": 128}, "128 does not divide a contracting axis of 32"),
    ],
)
def test_each_broken_invariant_is_named(array, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(array, **change).validate()


@pytest.mark.parametrize(("size", "block"), [(3072, 128), (1920, 128), (192, 64), (96, 32), (32, 32)])
def test_largest_hadamard_block(size, block):
    assert formats.hadamard_block(size) == block
    assert formats.hadamard_block(size, 0) == 0


@pytest.mark.parametrize(("size", "requested"), [(48, None), (0, None), (192, 128), (128, 16)])
def test_no_hadamard_block(size, requested):
    with pytest.raises(ValueError, match=str(size if requested != 16 else 16)):
        formats.hadamard_block(size, requested)


def test_arrays_are_pytrees_that_keep_their_rotation():
    doubled = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), nvfp4(hadamard=32))
    doubled.validate()
    assert (doubled.shape, doubled.hadamard) == ((2, 3, 32), 32)


def test_a_named_implementation_is_taken_or_refused():
    table = {"fast": lambda: "fast", "slow": lambda: "slow"}
    assert choice.choose("test", table, "slow")() == "slow"
    with pytest.raises(ValueError, match=r"test: unknown implementation 'pallas_triton'; .*fast, slow"):
        choice.choose("test", table, "pallas_triton")


def test_the_choice_of_none_is_logged_once(caplog):
    table = {"fast": lambda: "fast", "slow": lambda: "slow"}
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(3):
            assert choice.choose("logged once", table, None)() == "fast"
        choice.choose("logged once", table, "slow")
    assert [r.getMessage() for r in caplog.records] == ["logged once: implementation=None took 'fast'"]
