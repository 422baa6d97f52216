"""Videos on disk: H.264 mp4 written with PyAV, frames read back with decord."""

from dataclasses import dataclass
from pathlib import Path

import av
import decord
import numpy as np
import torch

from .errors import BadMedia

decord.logging.set_level(decord.logging.QUIET)  # what is wrong with a file is said once, by BadMedia


@dataclass(frozen=True)
class Frames:
    """Sampled frames `[F, H, W, 3]` uint8, their indices in the file, its frame rate [1/s] and length."""

    pixels: torch.Tensor
    indices: tuple[int, ...]
    fps: float
    total: int


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
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise BadMedia(f"{path}: {error.strerror}; check `path` in the data file and the data root") from None
    if empty:
        raise BadMedia(f"{path}: the file is empty; download or write it again")
    try:
        # decord writes its own lines to stderr about a file it cannot open; PyAV finds that out quietly
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadMedia(f"{path}: holds no video stream; drop the row")
        return _sample(path, count)
    except (av.error.FFmpegError, decord.DECORDError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].replace(str(path), "it")[:120]
        raise BadMedia(f"{path}: cannot be decoded ({reason}); re-encode it or drop the row") from None


def _sample(path: Path, count: int) -> Frames:
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    total, fps = len(reader), float(reader.get_avg_fps())
    if not fps > 0:
        raise BadMedia(f"{path}: no frame rate ({fps}); re-encode it or drop the row")
    if total < 2:
        raise BadMedia(f"{path}: {total} frame(s), a video needs at least 2; drop the row")
    kept = min(count, total) // 2 * 2  # the model merges frames in pairs
    indices = tuple(int(i) for i in np.linspace(0, total - 1, kept).round())
    pixels = torch.from_numpy(reader.get_batch(list(indices)).asnumpy())
    return Frames(pixels, indices, fps, total)
