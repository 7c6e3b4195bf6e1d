"""Counting bits on constructed traces."""

import numpy as np
import pytest

from sixbit_jax.config import TransformerConfig
from sixbit_jax.errors import ArgumentError
from sixbit_jax.precision import accounting

WEIGHTS = accounting.site_weights(TransformerConfig())


def counted(bits, weights=WEIGHTS):
    """The summary of bits [steps, blocks, groups, sites]."""
    return accounting.summary(np.asarray(bits, np.uint8), weights)


def test_site_weights_are_shares_of_multiply_adds():
    assert accounting.site_weights(TransformerConfig.cogvideox_5b()) == pytest.approx(
        {"attn_in": 3 / 12, "attn_out": 1 / 12, "ff_in": 4 / 12, "ff_out": 4 / 12}
    )


def test_each_site_counts_with_its_work():
    for site, weight in enumerate((3, 1, 4, 4)):
        bits = np.full((3, 2, 1, 4), 4)
        bits[..., site] = 16
        found = counted(bits)
        assert found.mean_bits == pytest.approx(4 + 12 * weight / 12)
        assert found.route_shares == pytest.approx(
            {"skipped": 0, "nvfp4": 1 - weight / 12, "int8": 0, "16bit": weight / 12}
        )


def test_skipped_blocks_count_as_zero_and_beside_it_not_at_all():
    bits = np.full((4, 2, 1, 4), 8)
    bits[1:3, 0] = 0
    found = counted(bits)
    assert (found.mean_bits, found.mean_bits_computed, found.skip_share) == pytest.approx((6.0, 8.0, 0.25))
    assert found.route_shares == pytest.approx({"skipped": 0.25, "nvfp4": 0.0, "int8": 0.75, "16bit": 0.0})


def test_videos_are_counted_alone_and_together():
    bits = np.full((5, 2, 3, 4), 4)
    bits[:, :, 1] = 8
    bits[0, :, 2] = 0
    found = counted(bits)
    assert [video.mean_bits for video in found.videos] == pytest.approx([4.0, 8.0, 3.2])
    assert [video.skip_share for video in found.videos] == pytest.approx([0.0, 0.0, 0.2])
    assert found.mean_bits == pytest.approx(np.mean([4.0, 8.0, 3.2]))
    assert found.mean_bits_computed == pytest.approx((10 * 4 + 10 * 8 + 8 * 4) / 28)
    assert all(not video.videos for video in found.videos)


def test_a_run_of_skips_alone_has_no_computed_width():
    found = counted(np.zeros((2, 2, 1, 4)))
    assert found.mean_bits == 0
    assert np.isnan(found.mean_bits_computed)


def test_weights_are_in_any_unit_and_of_any_number_of_sites():
    bits = np.full((5, 2, 1, 3), 4)
    bits[..., 2] = 16
    for weights in ((3, 3, 6), {"qkv": 30.0, "out": 30.0, "mix": 60.0}, np.asarray([0.25, 0.25, 0.5])):
        assert counted(bits, weights).mean_bits == pytest.approx(10)


@pytest.mark.parametrize("weights", [(), (0, 0, 0, 0), (1, 1, 1, -1), (1, 1, 1, np.nan), np.ones((2, 2))])
def test_weights_that_are_no_work_are_refused(weights):
    with pytest.raises(ArgumentError, match="one number a site"):
        counted(np.zeros((2, 2, 1, 4)), weights)


@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 2, 1, 3), (0, 2, 1, 4)])
def test_a_trace_of_other_sites_is_refused(shape):
    with pytest.raises(ArgumentError, match="4 sites"):
        counted(np.zeros(shape))


def test_a_width_that_no_route_has_is_refused():
    with pytest.raises(ArgumentError, match="6"):
        counted(np.full((2, 2, 1, 4), 6))
