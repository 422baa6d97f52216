"""decord, torchcodec and PyAV behind one interface. The same indices give the same frames, or BadMedia.

A library is imported when a file is opened with it. All decode on one thread: files are decoded in parallel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np

from ..errors import BadMedia, UserError
from .probe import decoding


@dataclass(frozen=True)
class Opened:
    """An open video: its frames in order of presentation, its average rate [1/s], the time of its end [s].

    pixels: frames `[F, H, W, 3]` uint8 at rising indices, upright as the file's rotation mark says.
    """

    total: int
    fps: float
    end: float
    pixels: Callable[[Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Decoder:
    """A library: its module, how it opens a file, the containers it was seen to read wrongly."""

    module: str
    open: Callable[[Path], AbstractContextManager[Opened]]
    wrong_in: Callable[[str], bool]

    @property
    def missing(self) -> str:
        """Why it cannot be used here, with the way out; empty when it can."""
        return _missing(self.module)


@cache
def _missing(module: str) -> str:
    """Loads the module: shared libraries that do not load are found by nothing else."""
    try:
        loaded = import_module(module)
    except ModuleNotFoundError:
        return f"is not installed; pip install {module}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"does not load ({str(error).strip().splitlines()[0]}); install it again"
    if getattr(loaded, "ffmpeg_major_version", 0) is None:  # torchcodec imports without them
        return "finds no shared libraries of FFmpeg; apt install ffmpeg, or conda install ffmpeg"
    return ""


@contextmanager
def _decord(path: Path) -> Iterator[Opened]:
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # what is wrong with a file is said once, by BadMedia
    with decoding(path, decord.DECORDError):
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        total = len(reader)
        end = reader.get_frame_timestamp([total - 1])[0, 1] if total else 0.0
        yield Opened(
            total,
            float(reader.get_avg_fps()),
            float(end),
            lambda indices: np.asarray(reader.get_batch(list(indices)).asnumpy()),
        )


@contextmanager
def _torchcodec(path: Path) -> Iterator[Opened]:
    library = import_module("torchcodec.decoders")
    with decoding(path):
        decoder = library.VideoDecoder(
            str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
        )
        about = decoder.metadata
        yield Opened(
            len(decoder),
            float(about.average_fps or 0),
            float(about.end_stream_seconds or 0),
            lambda indices: np.ascontiguousarray(decoder.get_frames_at(list(indices)).data.numpy()),
        )


@contextmanager
def _pyav(path: Path) -> Iterator[Opened]:
    import av

    from .pyav import PyavVideo

    with decoding(path, av.error.FFmpegError, OSError), av.open(str(path)) as container:
        video = PyavVideo(container)
        yield Opened(video.total, video.fps, video.end, video.pixels)


# Seen with decord 0.6 and torchcodec 0.17: after a seek in AVI or MPEG-TS decord gives other frames than
# those asked for, and says nothing; torchcodec fails in MPEG-TS. tests/trainer/test_media_decoders.py.
DECODERS = {
    "decord": Decoder("decord", _decord, lambda container: container not in ("mp4", "matroska")),
    "torchcodec": Decoder("torchcodec", _torchcodec, lambda container: container == "mpegts"),
    "pyav": Decoder("av", _pyav, lambda container: False),
}


def choose(name: str, container: str, path: Path) -> Decoder:
    """The decoder called `name`; "auto" is the first that is installed and reads the container right.

    Raises UserError for an unknown or missing library, BadMedia for a container it reads wrongly.
    """
    if name == "auto":
        for decoder in DECODERS.values():
            if not decoder.wrong_in(container) and not decoder.missing:
                return decoder
        raise UserError(f"no decoder here reads {container} files; pip install av")
    if name not in DECODERS:
        raise UserError(f"decoder {name!r}: expected one of auto, {', '.join(DECODERS)}")
    decoder = DECODERS[name]
    if decoder.missing:
        raise UserError(f"decoder {name!r} {decoder.missing}, or use decoder=auto")
    if decoder.wrong_in(container):
        raise BadMedia(f"{path}: {name} does not read {container} files right; use decoder=auto or pyav")
    return decoder
