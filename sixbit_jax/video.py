"""Showing and writing results: frames as an mp4 or in a notebook, and any file so that it appears when complete."""

import base64
import contextlib
import dataclasses
import fcntl
import html
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from sixbit_jax.errors import ArgumentError


def check_writable(path: str | Path) -> None:
    """Makes sure a file can be created at `path`, creating its folder if need be; meant to run before long work.

    Raises:
        OSError: if the folder cannot be made or written to, or `path` is a folder; names the path.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a place to write to, beside `path`, and moves it there in one step when the block succeeds.

    A block that fails leaves `path` as it was and nothing beside it. The place is this process's own.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_together(folder: str | Path, stale: Iterable[str] = ()) -> Iterator[Path]:
    """Gives a folder to write files in, and moves them all to `folder` when the block succeeds.

    Processes that write to one folder move one after another, so that files that belong together are of one process.
    A block that fails leaves `folder` as it was. Records (.json) come last: one that is there fits the files beside it.

    Args:
        folder: that exists.
        stale: names of files that are removed before: of an earlier run, they would not fit what is moved.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as name:
        beside = Path(name)
        yield beside
        handle = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            for old in stale:
                (folder / old).unlink(missing_ok=True)
            for file in sorted(beside.iterdir(), key=lambda file: file.suffix == ".json"):
                file.replace(folder / file.name)
        finally:
            os.close(handle)


def write_mp4(path: str | Path, frames: UInt8[np.ndarray, "frames height width 3"], *, fps: int = 8) -> None:
    """Encodes frames as H.264 (yuv420p, visually lossless); the file appears only when it is complete.

    Args:
        path: where to write; replaced if it exists.
        frames: height and width even.
        fps: frames per second.

    Raises:
        ArgumentError: if there are no frames, or their size is odd.
    """
    _check_encodable(frames)
    with replacing(path) as partial, partial.open("wb") as file:
        _encode(file, frames, fps)


@dataclasses.dataclass(frozen=True)
class InlineVideo:
    """A video as HTML, which notebooks display as the last value of a cell.

    Attributes:
        html: with the mp4 in it.
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html


def inline_video(
    clips: Mapping[str, UInt8[np.ndarray, "frames height width 3"]], *, fps: int = 8, width: int = 780
) -> InlineVideo:
    """Clips side by side, as one video for a notebook: they cannot drift apart.

    Args:
        clips: what is written above each -> its frames, all of one even size and number. "" writes nothing.
        fps: frames per second.
        width: of all of it, in pixels of the page; smaller where the page is.

    Raises:
        ArgumentError: if there are no clips, they differ in shape, have no frames, or their size is odd.
    """
    if len({frames.shape for frames in clips.values()}) != 1:
        shapes = ", ".join(f"{label!r} {list(frames.shape)}" for label, frames in clips.items())
        raise ArgumentError(f"clips side by side must be at least one, and all of one shape; found {shapes or 'none'}")
    frames = np.concatenate(list(clips.values()), axis=2)
    _check_encodable(frames)
    _encode(file := io.BytesIO(), frames, fps)
    labels = "".join(f'<span style="flex:1 1 0">{html.escape(label)}</span>' for label in clips)
    content = base64.b64encode(file.getvalue()).decode()
    return InlineVideo(
        f'<div style="width:{width}px;max-width:100%"><div style="display:flex">{labels}</div>'
        '<video controls loop autoplay muted playsinline style="width:100%;image-rendering:pixelated"'
        f' src="data:video/mp4;base64,{content}"></video></div>'
    )


def _check_encodable(frames: UInt8[np.ndarray, "frames height width 3"]) -> None:
    _, height, width, _ = frames.shape
    if height % 2 or width % 2 or not frames.size:
        raise ArgumentError(f"an mp4 needs at least one frame of even height and width, not {list(frames.shape)}")


def _encode(file: io.IOBase, frames: UInt8[np.ndarray, "frames height width 3"], fps: int) -> None:
    _, height, width, _ = frames.shape
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
