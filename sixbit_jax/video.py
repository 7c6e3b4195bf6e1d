"""Writing frames to an mp4 file."""

import os
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8


def check_writable(path: Path) -> None:
    """Makes sure a file can be created at `path`, creating its folder if need be; meant to run before long work.

    Raises:
        OSError: if the folder cannot be made or written to, or `path` is a folder; names the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_mp4(path: Path, frames: UInt8[np.ndarray, "frames height width 3"], *, fps: int = 8) -> None:
    """Encodes frames as H.264 (yuv420p, visually lossless); the file appears only when it is complete.

    Args:
        path: where to write; replaced if it exists.
        frames: height and width even.
        fps: frames per second.
    """
    frames_count, height, width, _ = frames.shape
    if height % 2 or width % 2 or not frames_count:
        raise ValueError(f"an mp4 needs at least one frame of even height and width, not {list(frames.shape)}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "12"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
