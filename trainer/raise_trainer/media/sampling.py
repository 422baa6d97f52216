"""Which frames of a video the model sees: a pure function of its length and frame rate."""

from dataclasses import dataclass

import numpy as np

from ..errors import UserError

TEMPORAL_PATCH = 2  # frames that Qwen2.5-VL and Qwen3-VL merge into one


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Frames by count or by rate; one instance for training and another for evaluation.

    frames: how many frames, spread evenly from the first to the last; a shorter video gives all it has.
    fps: frames per second of video instead [1/s]; then min_frames and max_frames bound their number.
    min_pixels, max_pixels: bounds on height x width of a frame as the model sees it; both or neither. They
    are for the video processor (see `size`); frames are decoded at the size of the file.

    Every number of frames is rounded down to a multiple of 2, since the model merges frames in pairs.
    Raises UserError, with the field, for values that cannot be.
    """

    frames: int | None = None
    fps: float | None = None
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if (self.frames is None) == (self.fps is None):
            raise UserError(f"sampling: frames={self.frames}, fps={self.fps}; give one of the two")
        if self.frames is not None and self.frames < TEMPORAL_PATCH:
            raise UserError(f"sampling: frames={self.frames}, expected at least {TEMPORAL_PATCH}")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UserError(f"sampling: fps={self.fps}, expected a number above 0")
        if not TEMPORAL_PATCH <= self.min_frames <= self.max_frames:
            raise UserError(
                f"sampling: min_frames={self.min_frames}, max_frames={self.max_frames}; "
                f"expected {TEMPORAL_PATCH} <= min_frames <= max_frames"
            )
        if (self.min_pixels is None) != (self.max_pixels is None):
            raise UserError(
                f"sampling: min_pixels={self.min_pixels}, max_pixels={self.max_pixels}; give both or neither"
            )
        if self.min_pixels is not None and not 0 < self.min_pixels <= (self.max_pixels or 0):
            raise UserError(
                f"sampling: min_pixels={self.min_pixels}, max_pixels={self.max_pixels}; "
                "expected 0 < min_pixels <= max_pixels"
            )

    def count(self, total: int, source_fps: float) -> int:
        """How many of `total` frames are taken: even, at least 2. ValueError for fewer than 2 frames."""
        if total < TEMPORAL_PATCH:
            raise ValueError(f"total={total}, expected at least {TEMPORAL_PATCH} frames")
        if self.frames is not None:
            wanted = float(self.frames)
        elif source_fps > 0 and self.fps is not None:
            wanted = min(max(total / source_fps * self.fps, self.min_frames), self.max_frames)
        else:
            raise ValueError(f"source_fps={source_fps}, expected a rate above 0 to sample by fps")
        return int(min(wanted, total)) // TEMPORAL_PATCH * TEMPORAL_PATCH

    def indices(self, total: int, source_fps: float) -> tuple[int, ...]:
        """The frames taken, rising, without repeats, the first and the last of the video among them."""
        return tuple(int(i) for i in np.linspace(0, total - 1, self.count(total, source_fps)).round())

    def size(self, frames: int = 1) -> dict[str, int] | None:
        """`size=` for a Hugging Face video processor; None leaves the processor its own.

        frames: 1 where the processor bounds the pixels of one frame (Qwen2-VL, Qwen2.5-VL); the number of
        sampled frames where it bounds those of the whole video (Qwen3-VL).
        """
        if self.min_pixels is None or self.max_pixels is None:
            return None
        return {"shortest_edge": self.min_pixels * frames, "longest_edge": self.max_pixels * frames}


def seconds_per_patch(total: int, source_fps: float, count: int) -> float:
    """Seconds of video between two temporal patches when `count` of `total` frames are taken.

    A float: above 2 frames per second it is below 1, and an integer there puts every frame at time 0.
    The formula is the one Qwen2.5-VL was trained with: count / total * source_fps frames per second.
    """
    return TEMPORAL_PATCH / (count / total * source_fps)
