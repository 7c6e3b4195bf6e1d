"""The picture of a trace: its pixels show the routes."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from sixbit_jax import trace_plot
from sixbit_jax.errors import ArgumentError
from sixbit_jax.precision.blocks import PrecisionTrace

STEPS, BLOCKS = 10, 3


def traced(bits, volatility):
    return PrecisionTrace(
        bits=np.broadcast_to(np.asarray(bits, np.uint8), (STEPS, BLOCKS, 2, 4)),
        volatility=np.broadcast_to(np.asarray(volatility, np.float32), (STEPS, BLOCKS, 2)),
        delta_change=np.zeros((STEPS, BLOCKS, 2), np.float32),
        predicted=np.zeros((STEPS, BLOCKS, 2, 4), np.float32),
        outlier=np.zeros((STEPS, BLOCKS, 2, 4), np.float32),
        age=np.zeros((STEPS, BLOCKS, 2), np.int32),
    )


def share(path, colour):
    """Of the picture's pixels that have a colour."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return (np.abs(pixels - np.asarray(to_rgb(colour))).max(-1) < 0.01).mean()


@pytest.mark.parametrize(("name", "bits"), [("nvfp4", 4), ("int8", 8), ("16bit", 16)])
def test_the_map_takes_the_colour_of_the_route(tmp_path, name, bits):
    path = tmp_path / "trace.png"
    trace_plot.save_trace(traced(bits, np.nan), path, title="all alike")
    for other, colour in trace_plot.COLOURS.items():
        if other == name:
            assert share(path, colour) > 0.3
        elif other != "skipped":
            assert share(path, colour) < 0.02  # the legend


def test_skipped_blocks_are_blank_and_gaps_in_volatility_are_drawn(tmp_path):
    bits = np.full((STEPS, BLOCKS, 2, 4), 4)
    bits[5:, :, 1] = 0
    volatility = np.where(bits[..., 0] > 0, 0.1, np.nan)
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for video, path in enumerate(paths):
        trace_plot.save_trace(traced(bits, volatility), path, video=video)
    full, half = (share(path, trace_plot.COLOURS["nvfp4"]) for path in paths)
    assert half == pytest.approx(full / 2, rel=0.15)


def test_a_volatility_of_zero_is_drawn(tmp_path):
    trace_plot.save_trace(traced(4, 0.0), tmp_path / "zero.png")
    assert (tmp_path / "zero.png").exists()


def test_any_number_of_sites_is_drawn():
    """Three rows a block, in the order of the sites; without volatility there is one picture."""
    bits = np.broadcast_to(np.asarray([4, 8, 16], np.uint8), (STEPS, BLOCKS, 3))
    figure = trace_plot.draw(bits, sites=("qkv", "out", "mix"))
    (axis,) = figure.axes
    np.testing.assert_array_equal(axis.images[0].get_array()[:, 0], np.tile([4, 8, 16], BLOCKS))
    assert axis.get_legend().get_title().get_text().split("\n")[1:] == ["qkv", "out", "mix"]
    assert len(trace_plot.draw(bits, np.ones((STEPS, BLOCKS)), sites=("qkv", "out", "mix")).axes) == 2
    with pytest.raises(ArgumentError, match="4 sites"):
        trace_plot.draw(bits)
    with pytest.raises(ArgumentError, match=f"{STEPS} steps"):
        trace_plot.draw(bits, np.ones((STEPS, 1)), sites=("qkv", "out", "mix"))


def test_wrong_traces_are_refused(tmp_path):
    trace = traced(4, 0.1)
    with pytest.raises(ArgumentError, match="3 sites"):
        trace_plot.save_trace(trace, tmp_path / "x.png", sites=("a", "b", "c"))
    with pytest.raises(ArgumentError, match="video=2"):
        trace_plot.save_trace(trace, tmp_path / "x.png", video=2)
    with pytest.raises(ArgumentError, match="steps, blocks, groups"):
        trace_plot.save_trace(trace.replace(bits=trace.bits[0]), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
