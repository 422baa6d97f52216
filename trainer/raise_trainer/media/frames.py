"""What reading gives to the trainer: tensors, with where in the file they come from."""

from dataclasses import dataclass

import torch

from .sampling import seconds_per_patch
from .video import Decoded


@dataclass(frozen=True, eq=False)
class Frames:
    """Sampled frames `[F, H, W, 3]` uint8, their indices in the file, its frame rate [1/s] and length.

    An image is one frame `[1, H, W, 3]` of a file of length 1 and rate 0.
    """

    pixels: torch.Tensor
    indices: tuple[int, ...]
    fps: float
    total: int

    @property
    def seconds_per_patch(self) -> float:
        """Seconds between two temporal patches, for the model's temporal positions (`second_per_grid_ts`).

        0 for an image, which has none.
        """
        return seconds_per_patch(self.total, self.fps, len(self.indices)) if self.fps else 0.0

    @property
    def timestamps(self) -> tuple[float, ...]:
        """Seconds from the start of the video to each frame; (0.0,) for an image."""
        return tuple(i / self.fps for i in self.indices) if self.fps else (0.0,)

    @classmethod
    def of(cls, decoded: Decoded) -> "Frames":
        """The same frames as a tensor that shares the array's memory."""
        return cls(torch.from_numpy(decoded.pixels), decoded.indices, decoded.fps, decoded.total)
