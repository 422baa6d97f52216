"""Real files in several containers, and decode functions that a worker process runs. Light: no PyTorch."""

from __future__ import annotations

import os
import struct
import sys
import time
from pathlib import Path

import av
import numpy as np

from raise_trainer.errors import BadMedia, UserError
from raise_trainer.media.video import Decoded, Request

TOTAL, FPS, HEIGHT, WIDTH = 60, 30, 96, 128


def pictures(total: int = TOTAL, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Moving blocks; the brightness of the upper edge tells the number of the frame."""
    blocks = np.random.default_rng(0).integers(0, 255, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    still = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
    frames = np.stack([np.roll(still, 3 * i, 1) for i in range(total)])
    frames[:, :16] = (np.arange(total) * 4 % 256)[:, None, None, None]
    return frames


def write(
    path: Path, frames: np.ndarray, *, b_frames: int = 3, key_every: int = 12, first: bool = False
) -> Path:
    """H.264 with B-frames, as cameras and sites give it; the container follows from the name.

    first: an mp4 with its index before the pictures, which still opens when its end is missing.
    """
    options = {"movflags": "faststart"} if first else {}
    coding = {"crf": "18", "bf": str(b_frames), "g": "12", "threads": "1"}
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream("libx264", rate=FPS, options=coding)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def every_frame(path: Path) -> np.ndarray:
    """All frames by plain decoding from the start, without a seek."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def turn(path: Path) -> None:
    """Mark an mp4 as filmed with the camera on its side."""
    data = path.read_bytes()
    upright = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turned + data[at + 36 :])


def _frame(value: int) -> Decoded:
    return Decoded(np.full((2, 4, 4, 3), value, np.uint8), (0, 1), 1.0, 2)


def told(request: Request) -> Decoded:
    """Does what the file says, and notes each try beside it."""
    word, _, rest = request.path.read_text().partition(" ")
    log = request.path.with_suffix(".tries")
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    tries = len(log.read_text().splitlines())
    if word == "abort" and tries <= int(rest):
        os.abort()
    if word == "hang" and tries <= int(rest):
        time.sleep(600)
    if word == "slow":
        time.sleep(float(rest))
    if word == "bad":
        raise BadMedia(f"{request.path}: {rest}")
    if word == "user":
        raise UserError(rest)
    if word == "bug":
        raise ZeroDivisionError(rest)
    if word == "torch":
        return _frame("torch" in sys.modules)
    return _frame(int(rest) if word == "value" else 0)


def noisy(request: Request) -> Decoded:
    """Writes to standard output, as C libraries do."""
    print("decoder says hello", flush=True)
    return _frame(7)
