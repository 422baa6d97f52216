"""Single frames of a video by index with PyAV: a scan of its packets, then seeks by time."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class PyavVideo:
    """Frames of the first video stream, numbered in order of presentation.

    container: open for reading. The scan reads every packet and decodes none. Raises RuntimeError for what
    cannot be decoded, and FFmpeg's own errors.
    """

    def __init__(self, container: Any) -> None:
        self._container = container
        self._stream = container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        packets = [p for p in container.demux(self._stream) if p.size and not p.is_discard]
        if any(p.pts is None for p in packets):
            raise RuntimeError("packets without time stamps")
        self._times = sorted(p.pts for p in packets)
        # demuxers seek by decoding time, which comes before the time of presentation
        self._keys = {p.pts: p.pts if p.dts is None else min(p.dts, p.pts) for p in packets if p.is_keyframe}
        self.total = len(self._times)
        self.fps = float(self._stream.average_rate or 0)
        last = max(packets, key=lambda p: p.pts, default=None)
        ticks = last.pts + (last.duration or 0) if last else 0
        self.end = float(ticks * self._stream.time_base)

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """Frames `[F, H, W, 3]` uint8 at rising indices."""
        wanted = [self._times[i] for i in indices]
        found = self._find(wanted, seeking=True)
        if len(found) < len(
            set(wanted)
        ):  # a seek may land behind its target; from the start nothing is missed
            found = self._find(wanted, seeking=False)
        if missing := [i for i, time in zip(indices, wanted, strict=True) if time not in found]:
            raise RuntimeError(f"frame {missing[0]} of {self.total} is missing")
        return np.stack([found[time] for time in wanted])

    def _find(self, wanted: Sequence[int], *, seeking: bool) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        starts = sorted(self._keys)
        here = starts[0] if starts else self._times[0]
        frames = self._from(here)
        for time in wanted:
            before = bisect_right(starts, time) - 1
            if seeking and before >= 0 and starts[before] > here:
                here = starts[before]
                frames = self._from(here)
            for frame in frames:
                if frame.pts is None or frame.pts < here:  # shown before the picture that was sought
                    continue
                if frame.is_corrupt:  # what follows is drawn on top of it
                    raise RuntimeError(f"damaged picture at {float(frame.time or 0):.2f} s")
                here = frame.pts
                if here == time:
                    found[time] = _upright(frame)
                if here >= time:
                    break
        return found

    def _from(self, key: int) -> Iterator[Any]:
        self._container.seek(self._keys.get(key, key), stream=self._stream, backward=True)
        yield from self._container.decode(self._stream)


def _upright(frame: Any) -> np.ndarray:
    picture: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.rot90(picture, frame.rotation // 90 % 4) if frame.rotation else picture
