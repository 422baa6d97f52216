"""Images: upright, RGB, bounded."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadMedia
from .probe import check_file, check_sides, decoding
from .video import Decoded

MAX_PIXELS = 64_000_000  # a small file can promise more than memory holds; photographs stay below


def decode_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Decoded:
    """An image as one frame `[1, H, W, 3]` uint8, turned as its EXIF orientation says.

    Transparent parts become white, 16-bit grey is scaled to 8, an animation gives its first picture.
    Raises BadMedia, with path and reason: missing, empty, no image, cut short, over `max_pixels`.
    """
    from PIL import Image, ImageOps

    check_file(path)
    with (
        decoding(path, OSError, SyntaxError, Image.DecompressionBombError, EOFError),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of Pillow: its bomb warning (the limit is below), odd metadata
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadMedia(
                    f"{path}: {width}x{height} pixels, over the limit of {max_pixels}; drop the row"
                )
            check_sides(path, height, width)
            pixels = np.array(_rgb(ImageOps.exif_transpose(image)))
    return Decoded(pixels[None], (0,), 0.0, 1)


def _rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
