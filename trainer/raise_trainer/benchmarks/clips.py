"""A part of a video, and videos kept as folders of pictures: what a decoding process runs for a benchmark."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BadMedia
from ..media.decoders import choose
from ..media.images import decode_image
from ..media.probe import check_file, check_sides, probe
from ..media.sampling import TEMPORAL_PATCH
from ..media.video import SLACK_SECONDS, Decoded, Request, decode

DECODE = f"{__name__}:decode_clip"
PICTURES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Clip:
    """Seconds from start to end of a video. rate: pictures per second of a folder of them; 0 for a file."""

    start: float = 0.0
    end: float = math.inf
    rate: float = 0.0


@dataclass(frozen=True)
class ClipRequest(Request):
    """A request for a part of a file. Not for a FrameCache, whose names do not hold the part."""

    clip: Clip = Clip()


def decode_clip(request: Request) -> Decoded:
    """The frames of a request, of its clip where it has one; indices and length are then the clip's.

    Raises BadMedia, with path and reason: also for a clip of fewer than 2 frames.
    """
    if not isinstance(request, ClipRequest):
        return decode(request)
    if request.path.is_dir():
        return _pictures(request)
    path = request.path
    check_file(path)
    about = probe(path)
    with choose(request.decoder, about.container, path).open(path) as video:
        if not 0 < video.fps < math.inf:
            raise BadMedia(f"{path}: no frame rate ({video.fps}); re-encode it or drop the row")
        wanted = min(request.clip.end, about.promised_seconds)
        if video.end < wanted - SLACK_SECONDS - 2 / video.fps:
            raise BadMedia(
                f"{path}: cut short at {video.end:.1f} of {about.promised_seconds:.1f} s, before the clip's "
                f"end at {wanted:.1f} s; download it again or drop the row"
            )
        first, total = _part(request, video.fps, video.total)
        indices = request.sampling.indices(total, video.fps)
        pixels = video.pixels([first + i for i in indices])
        fps = video.fps
    if len(pixels) != len(indices):
        raise BadMedia(f"{path}: {len(pixels)} of {len(indices)} frames came; re-encode it or drop the row")
    check_sides(path, *pixels.shape[1:3])
    return Decoded(np.ascontiguousarray(pixels), indices, fps, total)


def _part(request: ClipRequest, fps: float, total: int) -> tuple[int, int]:
    """First frame and number of frames of a clip; its last frame belongs to it."""
    clip = request.clip
    first = max(round(clip.start * fps), 0)
    last = total - 1 if math.isinf(clip.end) else min(round(clip.end * fps), total - 1)
    if last - first + 1 < TEMPORAL_PATCH:
        raise BadMedia(
            f"{request.path}: {clip.start:g} s to {clip.end:g} s holds {max(last - first + 1, 0)} of its "
            f"{total} frames, a clip needs at least {TEMPORAL_PATCH}; mend the times or drop the row"
        )
    return first, last - first + 1


def _pictures(request: ClipRequest) -> Decoded:
    """Sampled pictures of a folder, in the order of the numbers in their names."""
    path, rate = request.path, request.clip.rate
    files = sorted((f for f in path.iterdir() if f.suffix.lower() in PICTURES), key=_place)
    if not rate > 0:
        raise BadMedia(f"{path}: a folder of pictures without a rate; give the row its `fps`")
    first, total = _part(request, rate, len(files))
    indices = request.sampling.indices(total, rate)
    pixels = [decode_image(files[first + i]).pixels[0] for i in indices]
    if len({p.shape for p in pixels}) > 1:
        raise BadMedia(f"{path}: pictures of several sizes; scale them to one")
    return Decoded(np.stack(pixels), indices, rate, total)


def _place(file: Path) -> tuple[int, str]:
    digits = "".join(c for c in file.stem if c.isdigit())
    return int(digits or 0), file.name
