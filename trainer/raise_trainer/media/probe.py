"""What a file says about itself before a frame is decoded; broken ones are refused with path and reason."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadMedia

MAX_RATIO = 200  # sides; the processors of Qwen refuse more, with an error that names no file
# the time and the place in its source that a C++ library puts before what it has to say
_SOURCE_LINE = re.compile(r"\[\d\d:\d\d:\d\d\] |(\w+, )?\S*/\S+:\d+[:,] ?")


@dataclass(frozen=True)
class Probe:
    """The container's short name ("mp4", "mpegts", …) and the seconds of video its header promises, or 0."""

    container: str
    promised_seconds: float


def check_file(path: Path) -> None:
    """BadMedia for a path that is missing, a folder, unreadable or empty."""
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise BadMedia(f"{path}: {error.strerror}; check `path` in the data file and the data root") from None
    except ValueError as error:  # a NUL in the name
        raise BadMedia(f"{path}: is no path ({error}); mend the row or drop it") from None
    if empty:
        raise BadMedia(f"{path}: the file is empty; download or write it again")


def check_sides(path: Path, height: int, width: int) -> None:
    """BadMedia for a picture without pixels, or one too narrow for the model's processor."""
    low, high = sorted((height, width))
    if low < 1 or high > MAX_RATIO * low:
        raise BadMedia(
            f"{path}: {width}x{height} pixels, sides up to {MAX_RATIO}:1 can be used; drop the row"
        )


@contextmanager
def decoding(path: Path, *errors: type[BaseException]) -> Iterator[None]:
    """Turn a decoder's errors into BadMedia with the path and one line of the reason."""
    caught: tuple[type[BaseException], ...] = (RuntimeError, ValueError, *errors)
    try:
        yield
    except caught as error:
        text = (_SOURCE_LINE.sub("", str(error)).strip() or type(error).__name__).splitlines()[0]
        reason = text.replace(str(path), "it")[:120]
        raise BadMedia(f"{path}: cannot be decoded ({reason}); re-encode it or drop the row") from None


def probe(path: Path) -> Probe:
    """Read the header. BadMedia for a file that is no video, or whose end is missing."""
    import av

    with decoding(path, av.error.FFmpegError, OSError), av.open(str(path)) as container:
        if not container.streams.video:
            raise BadMedia(f"{path}: holds no video stream; drop the row")
        stream = container.streams.video[0]
        needed = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        found = path.stat().st_size
        if needed > found:
            raise BadMedia(
                f"{path}: cut short at {found} of at least {needed} bytes; download it again or drop the row"
            )
        name = "mp4" if "mp4" in container.format.name else container.format.name.split(",")[0]
        return Probe(name, _clock(stream.metadata.get("DURATION", "")))


def _clock(text: Any) -> float:
    """Seconds of "hh:mm:ss.fraction", as Matroska writes the length of a stream; 0 for anything else."""
    try:
        hours, minutes, seconds = str(text).split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0
