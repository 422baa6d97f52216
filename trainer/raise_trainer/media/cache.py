"""Decoded frames on disk, so that later epochs and other runs do not decode them again.

One safetensors file a request, named by what it was made from: absolute path, time of change and size of
the file, sampling, kind and decoder. A changed file or setting has another name.
"""

import hashlib
import json
import logging
import os
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .video import Decoded, Request

FORMAT = 1
TRIMMED_TO = 0.9  # of max_bytes, so that not every write looks through the folder
ABANDONED_SECONDS = 3600.0  # a temporary file this old belongs to a process that was killed
log = logging.getLogger(__name__)


class FrameCache:
    """Frames by request in a folder that several processes may share.

    folder: made when missing. max_bytes: the least recently used files go when the folder grows beyond it.
    Reading never fails: a file that is missing or damaged is decoded again. A write that fails (disk full)
    is logged once and changes nothing.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._lock = threading.Lock()
        self._unseen = 0  # bytes written since the folder was last looked through
        self._warned = False
        folder.mkdir(parents=True, exist_ok=True)
        self._trim()

    def file(self, request: Request) -> Path | None:
        """Where the frames of a request lie; None when the media file is not there.

        Ask before decoding: a file replaced meanwhile must not lend its time of change to the old frames.
        """
        path = Path(os.path.abspath(request.path))
        try:
            stat = path.stat()
        except (OSError, ValueError):
            return None
        made_from = (stat.st_mtime_ns, stat.st_size, request.sampling, request.kind, request.decoder)
        key = repr((FORMAT, str(path), *made_from))
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, file: Path) -> Decoded | None:
        """The frames in a file of the cache, or None when they are not there whole."""
        decoded = None
        try:
            decoded = _read(file)
            os.utime(file)
        except OSError:
            pass
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("frame cache: %s is damaged (%s), decoding again", file, error)
            file.unlink(missing_ok=True)
        with self._lock:
            self.hits += decoded is not None
            self.misses += decoded is None
        return decoded

    def put(self, file: Path, decoded: Decoded) -> None:
        """Store the frames: written beside, then renamed, so that no reader meets half a file."""
        packed = _packed(decoded)
        if len(packed) > self.max_bytes:
            return
        temporary = file.with_name(f".{file.stem}.{os.getpid()}.{threading.get_ident()}")
        try:
            file.parent.mkdir(exist_ok=True)
            temporary.write_bytes(packed)
            temporary.replace(file)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self._warned:
                log.warning("frame cache: %s; going on without storing frames", error)
                self._warned = True
            return
        with self._lock:
            self._unseen += len(packed)
            if self._unseen > (1 - TRIMMED_TO) / 2 * self.max_bytes:
                self._trim()

    def _trim(self) -> None:
        self._unseen = 0
        files, total = [], 0
        for path in self.folder.glob("*/*"):
            try:
                stat = path.stat()
            except OSError:  # another process trims as well
                continue
            if path.name.startswith("."):
                if time.time() - stat.st_mtime > ABANDONED_SECONDS:
                    path.unlink(missing_ok=True)
            elif path.suffix == ".safetensors":
                files.append((stat.st_mtime_ns, stat.st_size, path))
                total += stat.st_size
        if total <= self.max_bytes:
            return
        for _, size, path in sorted(files):
            if total <= TRIMMED_TO * self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _packed(decoded: Decoded) -> bytes:
    about = {
        "indices": decoded.indices,
        "fps": decoded.fps,
        "total": decoded.total,
        "crc32": zlib.crc32(decoded.pixels.data),
    }
    return bytes(save({"pixels": decoded.pixels}, {"about": json.dumps(about)}))


def _read(file: Path) -> Decoded:
    if not file.is_file():
        raise FileNotFoundError(file)
    with safe_open(str(file), framework="numpy") as stored:
        about = json.loads((stored.metadata() or {})["about"])
        pixels: np.ndarray = stored.get_tensor("pixels")
    if zlib.crc32(np.ascontiguousarray(pixels).data) != about["crc32"]:
        raise ValueError("checksum")
    return Decoded(pixels, tuple(about["indices"]), about["fps"], about["total"])
