"""Which bytes of the text each sampled token wrote: read off the token strings, never by tokenising again.

A byte-level token may hold half a character, a SentencePiece `<0xE4>` is one byte of one: so tokens are laid
out in bytes, and characters are counted in the bytes. Spaces that a decoder puts between tokens (WordPiece,
`</w>`) belong to no token and have no width; they appear in the text that is shown.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol, cast


class TokenizerLike(Protocol):
    """What is needed of a tokenizer; every Hugging Face tokenizer, fast or slow, has it."""

    @property
    def all_special_ids(self) -> Sequence[int]:
        """Ids that write no text (end of text, padding)."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = ..., **kwargs: Any) -> Any:
        """The text of some ids."""


@dataclass(frozen=True)
class Layout:
    """The text of `n` tokens and where each token lies in it.

    text: characters without the decoder's own spaces; a byte that is not valid UTF-8 is a lone surrogate.
    starts, ends: `n` byte offsets each, both in order; token i wrote the bytes `[starts[i], ends[i])`, none
        if it is a special token.
    gaps: sorted byte offsets at which the decoder shows a space that no token wrote.
    """

    text: str
    starts: list[int]
    ends: list[int]
    gaps: list[int]

    def tokens(self, start: int, stop: int) -> tuple[int, int]:
        """Half-open token range whose bytes overlap the characters `[start, stop)`; needs start < stop."""
        first, last = self._byte(start), self._byte(stop)
        return bisect_right(self.ends, first), bisect_left(self.starts, last)

    def shown(self, start: int, stop: int) -> str:
        """The characters `[start, stop)` as shown: decoder's spaces in, broken bytes as U+FFFD."""
        first, last = self._byte(start), self._byte(stop)
        data = self.text[start:stop].encode("utf-8", "surrogateescape")
        cuts = self.gaps[bisect_right(self.gaps, first) : bisect_left(self.gaps, last)]
        bounds = [0, *(cut - first for cut in cuts), last - first]
        words = (data[a:b].decode("utf-8", "replace") for a, b in pairwise(bounds))
        return " ".join(words)

    def _byte(self, character: int) -> int:
        return len(self.text[:character].encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class Piece:
    """What one token writes: its bytes, and whether the decoder shows a space before or after them."""

    data: bytes
    space_before: bool = False
    space_after: bool = False


PieceReader = Callable[[str], Piece]

_SILENT = Piece(b"")
_ID_LIMIT = 2**32


def lay_out(ids: Sequence[int], tokenizer: TokenizerLike, keep: Sequence[str] = ()) -> Layout:
    """Lay out the text of `ids` (n token ids of one completion).

    Special tokens and ids outside the vocabulary write nothing, except a special token whose text is in
    `keep` (an answer tag that was added as a special token). Linear in n.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
    reader = _piece_reader(backend)
    special = _special_ids(tokenizer)
    if reader is None:
        return decoded_layout(ids, tokenizer, special, keep)
    known: dict[int, Piece] = {}
    for token_id in set(ids):
        token = backend.id_to_token(token_id) if 0 <= token_id < _ID_LIMIT else None
        if token is None or (token_id in special and token not in keep):
            known[token_id] = _SILENT
        else:
            known[token_id] = reader(token)
    pieces = [known[token_id] for token_id in ids]
    return _layout(pieces)


def _layout(pieces: Sequence[Piece]) -> Layout:
    ends = list(accumulate(len(piece.data) for piece in pieces))
    starts = [end - len(piece.data) for end, piece in zip(ends, pieces, strict=True)]
    gaps = {start for start, piece in zip(starts, pieces, strict=True) if piece.space_before}
    gaps |= {end for end, piece in zip(ends, pieces, strict=True) if piece.space_after}
    text = b"".join(piece.data for piece in pieces).decode("utf-8", "surrogateescape")
    return Layout(text, starts, ends, sorted(gaps))


def _special_ids(tokenizer: TokenizerLike) -> set[int]:
    special = set(getattr(tokenizer, "all_special_ids", ()))
    get_added = getattr(tokenizer, "get_added_tokens_decoder", None)
    added = get_added() if get_added else getattr(tokenizer, "added_tokens_decoder", {})
    return special | {token_id for token_id, token in added.items() if getattr(token, "special", False)}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's stand-ins: a printable Latin-1 byte is itself, the others are U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> Piece:
    codes = [_BYTE_OF.get(character) for character in token]
    return Piece(token.encode("utf-8", "surrogatepass") if None in codes else bytes(cast("list[int]", codes)))


def _fallback_byte(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None


def _piece_reader(backend: Any) -> PieceReader | None:
    """How token strings of a `tokenizers.Tokenizer` become bytes; None if it is not one or is unknown."""
    if not hasattr(backend, "id_to_token") or not hasattr(backend, "decoder"):
        return None
    if backend.decoder is None:
        return lambda token: Piece(token.encode(), space_before=True)
    try:
        steps = _flat_steps(json.loads(backend.decoder.__getstate__()))
    except (AttributeError, TypeError, ValueError):
        return None
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _byte_level if set(kinds) <= {"ByteLevel", "Fuse"} else None
    if "WordPiece" in kinds:
        return _word_piece(steps[0]["prefix"]) if len(steps) == 1 else None
    if "BPEDecoder" in kinds:
        return _suffix_piece(steps[0]["suffix"]) if len(steps) == 1 else None
    return _metaspace(steps)


def _flat_steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] == "Sequence":
        return [step for inner in state["decoders"] for step in _flat_steps(inner)]
    return [state]


def _word_piece(prefix: str) -> PieceReader:
    def read(token: str) -> Piece:
        if token.startswith(prefix):
            return Piece(token[len(prefix) :].encode())
        return Piece(token.encode(), space_before=True)

    return read


def _suffix_piece(suffix: str) -> PieceReader:
    def read(token: str) -> Piece:
        return Piece(token.replace(suffix, "").encode(), space_after=suffix in token)

    return read


def _metaspace(steps: Sequence[dict[str, Any]]) -> PieceReader | None:
    """SentencePiece in its spellings: `▁` is a space, `<0xNN>` a byte.

    The space that such decoders drop at the very start of a text is kept: it lies outside every tag, and
        dropping it
    would only shift all offsets by one.
    """
    replacements: list[tuple[str, str]] = []
    has_bytes = False
    for step in steps:
        if step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif step["type"] == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "ByteFallback":
            has_bytes = True
        elif step["type"] not in ("Fuse", "Strip"):
            return None

    def read(token: str) -> Piece:
        byte = _fallback_byte(token) if has_bytes else None
        if byte is not None:
            return Piece(byte)
        for old, new in replacements:
            token = token.replace(old, new)
        return Piece(token.encode())

    return read


_LONGEST_CHARACTER = 4  # tokens, of one byte each


def decoded_layout(
    ids: Sequence[int], tokenizer: TokenizerLike, special: Collection[int], keep: Sequence[str] = ()
) -> Layout:
    """`lay_out` for a tokenizer known only by `decode`, from what each further token adds to a short window.

    A block of tokens ends where the text no longer ends in a broken character. Inside a block of several
    tokens the bytes are read off the token strings if these give the same text; if not, every token gets the
    whole block, so that a span never misses a token and has at most three too many at each end. Linear in n.
    """
    decoded: dict[tuple[int, ...], str] = {}

    def decode(part: Sequence[int]) -> str:
        key = tuple(part)
        if key not in decoded:
            text = tokenizer.decode(list(key), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            decoded[key] = str(text)
        return decoded[key]

    spoken = [n for n, i in enumerate(ids) if i not in special or decode([i]) in keep]
    starts, ends = [0] * len(ids), [0] * len(ids)
    written: list[bytes] = []
    total = window = begin = 0
    for stop in range(1, len(spoken) + 1):
        head = decode([ids[n] for n in spoken[window:begin]])
        text = decode([ids[n] for n in spoken[window:stop]])
        if text.endswith("\ufffd") and stop - begin < _LONGEST_CHARACTER and stop < len(spoken):
            continue
        block = spoken[begin:stop]
        added = text[_shared(head, text) :].encode("utf-8", "replace")
        sizes = _sizes_in_block([ids[n] for n in block], tokenizer, added)
        for n, (low, high) in zip(block, sizes, strict=True):
            starts[n], ends[n] = total + low, total + high
        written.append(added)
        total += len(added)
        window, begin = begin, stop
    _fill_silent(starts, ends, set(spoken))
    return Layout(b"".join(written).decode("utf-8"), starts, ends, [])


def _shared(head: str, text: str) -> int:
    """Length of the common beginning; the whole of `head` unless the decoder tidies up across tokens."""
    if text.startswith(head):
        return len(head)
    return next((n for n, (a, b) in enumerate(zip(head, text, strict=False)) if a != b), len(text))


def _sizes_in_block(block: Sequence[int], tokenizer: TokenizerLike, added: bytes) -> list[tuple[int, int]]:
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    if len(block) > 1 and convert is not None:
        tokens = [str(token) for token in convert(list(block))]
        by_byte = [_fallback_byte(token) or token.replace("\u2581", " ").encode() for token in tokens]
        for pieces in ([_byte_level(token).data for token in tokens], by_byte):
            if b"".join(pieces) == added:
                ends = list(accumulate(len(piece) for piece in pieces))
                return [(end - len(piece), end) for end, piece in zip(ends, pieces, strict=True)]
    return [(0, len(added))] * len(block)


def _fill_silent(starts: list[int], ends: list[int], spoken: Collection[int]) -> None:
    here = 0
    for n in range(len(starts)):
        if n in spoken:
            here = ends[n]
        else:
            starts[n] = ends[n] = here
