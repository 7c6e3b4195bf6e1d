"""Files that appear only when they are complete, and frames that survive the codec."""

import os

import av
import numpy as np
import pytest

from sixbit_jax import video
from sixbit_jax.errors import ArgumentError


def moving_square(frames: int = 9, size: int = 64) -> np.ndarray:
    out = np.zeros((frames, size, size, 3), np.uint8)
    for i, frame in enumerate(out):
        frame[20:40, 4 * i : 4 * i + 20] = (230, 40, 40)
    return out


def decoded(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((found.astype(float) - wanted) ** 2))


def test_frames_come_back(tmp_path):
    frames = moving_square()
    video.write_mp4(tmp_path / "a.mp4", frames, fps=12)
    found = decoded(tmp_path / "a.mp4")
    assert found.shape == frames.shape
    # Measured 37 dB: edges lose colour to half-resolution chroma. One frame late is 17 dB, red for blue 11 dB.
    assert psnr(found, frames) > 30
    assert psnr(found[1:], frames[:-1]) < 25
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.average_rate, stream.pix_fmt) == ("h264", 12, "yuv420p")


def test_a_file_that_exists_is_replaced(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    video.write_mp4(str(path), moving_square(2))
    assert len(decoded(path)) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(fail):
        with video.replacing(path) as partial:
            partial.write_text("half")
            fail()

    with pytest.raises(ZeroDivisionError):
        write(lambda: 1 / 0)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_do_not_share_a_partial_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    with video.replacing(path) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with video.replacing(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
        assert mine.read_text() == "mine"
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 7, 8), (2, 8, 7), (2, 0, 8)])
def test_sizes_that_the_codec_cannot_take(tmp_path, shape):
    with pytest.raises(ArgumentError, match="at least one frame of even height and width"):
        video.write_mp4(tmp_path / "a.mp4", np.zeros((*shape, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_check_writable_makes_the_folder_and_nothing_else(tmp_path):
    video.check_writable(tmp_path / "a" / "b" / "c.mp4")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/a\.mp4: cannot be written: .*file: File exists"):
        video.check_writable(tmp_path / "file" / "a.mp4")
    with pytest.raises(OSError, match=r"file/b/a\.mp4: cannot be written: .*file/b: Not a directory"):
        video.check_writable(tmp_path / "file" / "b" / "a.mp4")
    with pytest.raises(OSError, match="is a folder; give the name of a file"):
        video.check_writable(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_forbidden_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"a\.mp4: cannot be written: .*Permission denied"):
        video.check_writable(tmp_path / "a.mp4")
