"""One file to frames, as numpy arrays: what a decoding process runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import BadMedia
from .decoders import choose
from .probe import check_file, check_sides, probe
from .sampling import TEMPORAL_PATCH, Sampling

Kind = Literal["video", "image"]
SLACK_SECONDS = 0.1  # besides two frames: containers round the times they write


@dataclass(frozen=True, eq=False)
class Decoded:
    """Frames `[F, H, W, 3]` uint8, their indices in the file, its frame rate [1/s] and length in frames."""

    pixels: np.ndarray
    indices: tuple[int, ...]
    fps: float
    total: int


@dataclass(frozen=True)
class Request:
    """One file, how to sample it and with what; equal requests are decoded once."""

    path: Path
    sampling: Sampling
    kind: Kind = "video"
    decoder: str = "auto"


def decode(request: Request) -> Decoded:
    """The frames a request asks for, all of them. Raises BadMedia, or UserError for a missing library."""
    if request.kind == "image":
        from .images import decode_image

        return decode_image(request.path)
    return decode_video(request.path, request.sampling, request.decoder)


def decode_video(path: Path, sampling: Sampling, decoder: str = "auto") -> Decoded:
    """Sampled frames of a video. Raises BadMedia, with path and reason, never gives fewer frames than asked.

    Bad is: missing, a folder, empty, cut short, no video stream, no frame rate, a single frame, sides beyond
    200:1, and whatever the decoder refuses.
    """
    check_file(path)
    about = probe(path)
    with choose(decoder, about.container, path).open(path) as video:
        if not 0 < video.fps < float("inf"):
            raise BadMedia(f"{path}: no frame rate ({video.fps}); re-encode it or drop the row")
        if video.total < TEMPORAL_PATCH:
            raise BadMedia(f"{path}: {video.total} frame(s), a video needs at least 2; drop the row")
        if video.end < about.promised_seconds - SLACK_SECONDS - 2 / video.fps:
            raise BadMedia(
                f"{path}: cut short at {video.end:.1f} of {about.promised_seconds:.1f} s; "
                "download it again or drop the row"
            )
        indices = sampling.indices(video.total, video.fps)
        pixels = video.pixels(indices)
    if len(pixels) != len(indices):
        raise BadMedia(f"{path}: {len(pixels)} of {len(indices)} frames came; re-encode it or drop the row")
    check_sides(path, *pixels.shape[1:3])
    return Decoded(np.ascontiguousarray(pixels), indices, video.fps, video.total)
