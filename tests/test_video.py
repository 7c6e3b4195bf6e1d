"""Files that appear only when they are complete, and frames that survive the codec."""

import base64
import contextlib
import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def test_clips_in_a_notebook_are_one_video_with_labels(tmp_path):
    left = moving_square()
    shown = video.inline_video({"<left>": left, "right": left[:, ::-1]}, fps=12, width=300)._repr_html_()
    assert re.findall(r"<span[^>]*>(.*?)</span>", shown) == ["&lt;left&gt;", "right"]
    assert "width:300px" in shown
    (tmp_path / "a.mp4").write_bytes(base64.b64decode(re.search(r"data:video/mp4;base64,([^\"]+)", shown)[1]))
    found = decoded(tmp_path / "a.mp4")
    assert psnr(found, np.concatenate([left, left[:, ::-1]], axis=2)) > 30
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12


@pytest.mark.parametrize("clips", [{}, {"a": (2, 4, 4), "b": (3, 4, 4)}, {"a": (2, 3, 4)}, {"a": (0, 4, 4)}])
def test_clips_that_make_no_video_are_refused(clips):
    with pytest.raises(ArgumentError, match="one"):
        video.inline_video({label: np.zeros((*shape, 3), np.uint8) for label, shape in clips.items()})


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


@contextlib.contextmanager
def without_privileges():
    """Root may write everywhere, so root becomes another user."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_forbidden_folder():
    with tempfile.TemporaryDirectory() as name:  # not pytest's, whose parents are root's alone
        Path(name).chmod(0o555)
        with without_privileges():
            assert list(Path(name).iterdir()) == []
            with pytest.raises(OSError, match=r"a\.mp4: cannot be written: .*Permission denied"):
                video.check_writable(Path(name, "a.mp4"))


WRITER = """if True:
    import sys, time
    from pathlib import Path
    import numpy as np
    from sixbit_jax import video
    folder, shade = Path(sys.argv[1]), int(sys.argv[2])
    print(flush=True)
    sys.stdin.readline()  # both begin together
    for turn in range(int(sys.argv[3])):
        with video.replacing_together(folder, ["a.json", "a.trace.npz"]) as beside:
            video.write_mp4(beside / "a.mp4", np.full((2, 32, 32, 3), shade, np.uint8))
            (beside / "a.json").write_text(str(shade))
            if shade == 200:
                (beside / "a.trace.npz").write_text(str(shade))
"""


def test_two_processes_that_write_one_run_leave_that_of_one(tmp_path):
    """Many times over; the last is whole at the end, and nobody's unfinished files stay."""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(shade), "40"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for shade in (50, 200)
    ]
    for process in both:
        process.stdout.readline()
    for process in both:
        process.stdin.write(b"\n")
        process.stdin.flush()

    while any(process.poll() is None for process in both):
        handle = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)  # between two moves
        if (tmp_path / "a.json").exists():
            shade = int((tmp_path / "a.json").read_text())
            assert abs(int(decoded(tmp_path / "a.mp4").mean()) - shade) < 5
            assert (tmp_path / "a.trace.npz").exists() == (shade == 200)
        os.close(handle)
        time.sleep(0.002)
    assert [process.communicate() and process.returncode for process in both] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} - {"a.trace.npz"} == {"a.json", "a.mp4"}
    assert abs(int(decoded(tmp_path / "a.mp4").mean()) - int((tmp_path / "a.json").read_text())) < 5


def test_a_run_that_fails_leaves_the_files_of_the_one_before(tmp_path):
    (tmp_path / "a.json").write_text("old")

    def write():
        with video.replacing_together(tmp_path, ["a.json"]) as beside:
            (beside / "a.mp4").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_records_are_moved_last_and_stale_ones_go_first(tmp_path, monkeypatch):
    for name in ("a.json", "a.trace.npz"):
        (tmp_path / name).write_text("old")
    states, replace = [], Path.replace

    def spy(self, target):
        states.append(sorted(path.name for path in tmp_path.iterdir() if path.is_file()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    with video.replacing_together(tmp_path, ["a.json", "a.trace.npz"]) as beside:
        for name in ("a.json", "a.mp4"):
            (beside / name).write_text("new")
    assert states == [[], ["a.mp4"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4"]
