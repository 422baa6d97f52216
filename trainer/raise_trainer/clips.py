"""Videos on disk: H.264 mp4 written with PyAV, frames read back."""

from pathlib import Path

import av
import numpy as np

from .media.frames import Frames
from .media.sampling import Sampling
from .media.video import decode_video


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write `[F, H, W, 3]` uint8 RGB frames as H.264; the same frames give the same bytes.

    That takes one thread and no look-ahead, whose rate control reads memory beyond the edge of a frame whose
    sides are not multiples of 16.
    """
    options = {"crf": "12", "preset": "veryfast", "tune": "zerolatency", "threads": "1"}
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def read_frames(path: Path, count: int) -> Frames:
    """`count` frames spread evenly over a video; all, rounded down to an even number, when it has fewer.

    Raises BadMedia, with path and reason, for a file that is missing, empty, cut short or not a video.
    """
    return Frames.of(decode_video(path, Sampling(frames=count)))
