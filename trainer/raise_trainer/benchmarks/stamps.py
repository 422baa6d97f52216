"""What stands for a model's files and a template's text, so that answers of two are not mixed."""

import hashlib
from pathlib import Path

from ..prompt_template import load_template

SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
WHOLE = 1 << 20  # bytes; a larger file is read in pieces
PIECES, PIECE = 64, 1 << 14  # so many, spread evenly over the file, of so many bytes


def template_stamp(template: str) -> str:
    """Of what a template says, whatever its name. UserError for one that is not there."""
    return _digest(repr(load_template(template)).encode())


def model_stamp(model: str) -> str:
    """Of the weights and settings in a model's folder, not of where it lies; "" for a Hugging Face id.

    Of large files 64 pieces of 16 KiB are read: training changes weights in all layers.
    """
    folder = Path(model)
    if not folder.is_dir():
        return ""
    files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file())
    return _digest(*(part for file in files for part in (file.name.encode(), *_parts(file))))


def _parts(file: Path) -> list[bytes]:
    """The size of a file, and of its bytes all or 64 pieces, the last of them at its end."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE:
            return [str(size).encode(), stream.read()]
        found = [str(size).encode()]
        for i in range(PIECES):
            stream.seek(i * (size - PIECE) // (PIECES - 1))
            found.append(stream.read(PIECE))
        return found


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
