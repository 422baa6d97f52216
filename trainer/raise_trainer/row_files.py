"""Rows of large JSON files: one pass notes where each begins, and a row is parsed when it is asked for."""

import bisect
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from .errors import BadRow, UserError
from .media.sampling import Sampling
from .rows import Row, parse_row

CHUNK = 1 << 20  # bytes read at a time
LONGEST_ROW = 1 << 26  # bytes; a quotation mark that is missing would else read the whole file into memory
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"


class RowFile:
    """A file of rows: a JSON list, or JSON lines (blank ones count for nothing). Nothing of it is kept open.

    root: folder that media paths are taken under. reward: route of rows that name none ("scre", "igsr"), or
    "" for their problem type's. sampling: of their media, None for the run's. fingerprint: of the
    file's bytes.
    Memory: 16 bytes a row. Raises UserError for a file that cannot be read or is no JSON list.
    """

    def __init__(self, file: Path, root: Path, *, reward: str = "", sampling: Sampling | None = None) -> None:
        self.file = file
        self.root = root.resolve()
        self.reward, self.sampling = reward, sampling
        self._bounds = array("Q")  # first byte and length, by turns
        digest = hashlib.blake2b(digest_size=16)
        try:
            with file.open("rb") as stream:
                self._stamp = _stamp(stream)
                for start, length in _bounds(file, stream, digest.update):
                    self._bounds.extend((start, length))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; give JSON rows in the Video-R1 schema") from None
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._bounds) // 2

    def raw(self, index: int) -> Any:
        """The JSON value of a row. BadRow when it is none; UserError when the file has changed since."""
        start, length = self._bounds[2 * index], self._bounds[2 * index + 1]
        try:
            with self.file.open("rb") as stream:
                unchanged = _stamp(stream) == self._stamp
                stream.seek(start)
                text = stream.read(length)
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror}; it was there when the run started") from None
        if not unchanged:
            raise UserError(f"{self.file}: has changed since it was opened; start again")
        try:
            return json.loads(text.decode("utf-8"))
        except UnicodeDecodeError:
            raise BadRow(f"row {index}: not UTF-8; mend it or drop it") from None
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "a number or a nesting too large")
            raise BadRow(f"row {index}: not JSON ({reason}); mend the line or drop it") from None

    def __getitem__(self, index: int) -> Row:
        """A row, checked. BadRow with its id, or its number from 0, when it cannot be used."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.file}")
        return parse_row(index, self.raw(index), self.root, self.reward, self.sampling)


class RowSource:
    """Several files as one sequence of rows, in the order given; each file keeps its root and its route.

    fingerprint: of the bytes of all files, their order and their routes, but not of where they lie.
    """

    def __init__(self, files: Sequence[RowFile]) -> None:
        if not any(map(len, files)):
            names = ", ".join(str(f.file) for f in files) or "no file"
            raise UserError(f"{names}: no row; give JSON rows in the Video-R1 schema")
        self.files = tuple(files)
        self._ends = list(accumulate(map(len, files)))
        text = json.dumps([[f.fingerprint, f.reward] for f in files])
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @classmethod
    def open(cls, files: Sequence[Any], sampling: Callable[[Any], Sampling] | None = None) -> "RowSource":
        """The files of a configuration (`TrainConfig.data`); media lie under a file's root, or beside it.

        sampling: what a file's media are sampled by (`TrainConfig.sampling`); None leaves that open.
        """
        own = [sampling(f) if sampling else None for f in files]
        return cls(
            [
                RowFile(f.path, f.root or f.path.parent, reward=f.reward or "", sampling=s)
                for f, s in zip(files, own, strict=True)
            ]
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, index: int) -> tuple[RowFile, int]:
        """The file that holds a row, and the row's number in it, from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number - 1] if number else 0)

    def __getitem__(self, index: int) -> Row:
        """A row, checked. BadRow with its id when it cannot be used."""
        file, number = self.where(index)
        return file[number]


def _stamp(stream: BinaryIO) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _bounds(file: Path, stream: BinaryIO, update: Callable[[bytes], None]) -> Iterator[tuple[int, int]]:
    """First byte and length of every row; `update` sees every byte once, in order."""
    first = stream.read(CHUNK)
    update(first)
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file}: not UTF-8 (a mark of UTF-16 at byte 0); give JSON rows in UTF-8")
    begin = len(_BOM) if first.startswith(_BOM) else 0

    def more() -> bytes:
        chunk = stream.read(CHUNK)
        update(chunk)
        return chunk

    if first[begin:].lstrip()[:1] == b"[":
        yield from _list_bounds(file, first[begin:], begin, more)
    else:
        yield from _line_bounds(first[begin:], begin, more)


def _line_bounds(text: bytes, at: int, more: Callable[[], bytes]) -> Iterator[tuple[int, int]]:
    """Of every line that is not blank; `text` begins at byte `at`."""
    while text:
        *lines, rest = text.split(b"\n")
        for line in lines:
            if line.strip():
                yield at, len(line)
            at += len(line) + 1
        chunk = more()
        if not chunk:
            if rest.strip():
                yield at, len(rest)
            return
        text = rest + chunk


class _Text:
    """The part of a JSON list that is being read. A byte is a character: JSON's own signs are ASCII."""

    def __init__(self, file: Path, text: bytes, at: int, more: Callable[[], bytes]) -> None:
        self._file, self._more = file, more
        self.text, self.at = text.decode("latin-1"), at  # `text` begins at byte `at` of the file

    def grow(self) -> bool:
        """Read on; False at the end of the file."""
        # doubling keeps the work on a row that spans many chunks linear
        chunks, wanted = [self.text], max(len(self.text), 1)
        while wanted > 0 and (chunk := self._more()):
            chunks.append(chunk.decode("latin-1"))
            wanted -= len(chunk)
        self.text = "".join(chunks)
        return len(chunks) > 1

    def drop(self, count: int) -> None:
        """Forget the first `count` characters."""
        self.text, self.at = self.text[count:], self.at + count

    def skip_space(self, place: int) -> int:
        """The next place at or after `place` that holds no white space; the text's end at the file's end."""
        while True:
            while place < len(self.text) and self.text[place] in _SPACE:
                place += 1
            if place < len(self.text) or not self.grow():
                return place

    def fail(self, number: int, place: int, why: str) -> UserError:
        """The error for row `number`."""
        return UserError(f"{self._file}: not JSON (row {number}, byte {self.at + place}: {why})")


def _list_bounds(file: Path, first: bytes, at: int, more: Callable[[], bytes]) -> Iterator[tuple[int, int]]:
    """Of every element of a JSON list. UserError where it is no list of JSON values."""
    text, decoder, number = _Text(file, first, at, more), json.JSONDecoder(), 0
    place = text.skip_space(text.skip_space(0) + 1)
    while text.text[place : place + 1] != "]" or number:
        end = _value_end(text, decoder, number, place)
        yield text.at + place, end - place
        place = text.skip_space(end)
        sign = text.text[place : place + 1]
        if sign == "]":
            break
        if sign != ",":
            raise text.fail(number, place, "expected a comma or the closing bracket")
        number += 1
        place = text.skip_space(place + 1)
        if place > CHUNK:
            text.drop(place)
            place = 0
    after = text.skip_space(place + 1)
    if after < len(text.text):
        raise text.fail(number, after, "more after the closing bracket")


def _value_end(text: _Text, decoder: json.JSONDecoder, number: int, place: int) -> int:
    """Where the value at `place` ends. It is known to end there only when something else follows it.

    At the end of what is read, a number may go on: of -0.5 the text "-0." is a 0 and a point.
    """
    while True:
        try:
            end = decoder.raw_decode(text.text, place)[1]
            rest = text.text[end : end + 3]  # no part of a number is longer that needs what follows: "e+"
            if len(rest) == 3 or rest[:1] not in ("", ".", "e", "E") or not text.grow():
                return end
        except json.JSONDecodeError as error:
            if len(text.text) - place > LONGEST_ROW or not text.grow():
                raise text.fail(number, error.pos, error.msg) from None
        except (ValueError, RecursionError):
            raise text.fail(number, place, "a number or a nesting too large") from None
