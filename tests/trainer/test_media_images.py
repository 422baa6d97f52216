"""Images come upright, in RGB and within a limit; broken ones are named."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raise_trainer.errors import BadMedia
from raise_trainer.media.frames import Frames
from raise_trainer.media.images import decode_image
from raise_trainer.media.sampling import Sampling
from raise_trainer.media.video import Request, decode

PICTURE = np.random.default_rng(0).integers(0, 255, (6, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "webp"])
def test_pixels_come_back(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    Image.fromarray(PICTURE).save(path, lossless=True) if kind == "webp" else Image.fromarray(PICTURE).save(
        path
    )
    read = decode(Request(path, Sampling(frames=8), "image"))
    assert np.array_equal(read.pixels, PICTURE[None])
    assert (read.indices, read.fps, read.total) == ((0,), 0.0, 1)
    frames = Frames.of(read)
    assert torch.equal(frames.pixels[0], torch.from_numpy(PICTURE))
    assert frames.seconds_per_patch == 0 and frames.timestamps == (0.0,)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_the_camera_was_held(tmp_path: Path, orientation: int) -> None:
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PICTURE).save(path, exif=exif)
    flipped, turns = orientation in (2, 4, 5, 7), {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    want = np.rot90(PICTURE[:, ::-1] if flipped else PICTURE, turns)
    assert np.array_equal(decode_image(path).pixels[0], want)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "CMYK", "LA", "RGBA", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.tiff"
        if mode == "I;16":
            Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(path)
        else:
            Image.fromarray(PICTURE).convert(mode).save(path)
        pixels = decode_image(path).pixels
        assert pixels.dtype == np.uint8 and pixels.shape[-1] == 3
        if mode == "I;16":
            assert (pixels == 0x80).all()


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert (decode_image(tmp_path / "a.png").pixels == 255).all()


def bomb() -> bytes:
    """A PNG of a few bytes that promises 10^10 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_more_pixels_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PICTURE).save(path)
    assert decode_image(path, max_pixels=60).pixels.shape == (1, 6, 10, 3)
    with pytest.raises(BadMedia, match="10x6 pixels, over the limit of 59"):
        decode_image(path, max_pixels=59)


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut short", "bomb", "narrow"])
def test_a_broken_image_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "narrow":
        Image.new("RGB", (500, 2)).save(path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "text": b"no image", "bomb": bomb()}[kind])
    with pytest.raises(BadMedia) as error:
        decode_image(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
