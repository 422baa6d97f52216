"""Which bytes of the text each sampled token wrote: read off the token strings, never by tokenising again.

A byte-level token may hold half a character, a SentencePiece `<0xE4>` is one byte of one: so tokens are laid
out in bytes, and characters are counted in the bytes. Spaces that a decoder puts between tokens (WordPiece,
`</w>`) belong to no token and have no width; they appear in the text that is shown.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

from raise_core.token_bytes import Piece, byte_level, piece_reader


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


_SILENT = Piece(b"")
_ID_LIMIT = 2**32


def lay_out(ids: Sequence[int], tokenizer: TokenizerLike, keep: Sequence[str] = ()) -> Layout:
    """Lay out the text of `ids` (n token ids of one completion).

    Special tokens and ids outside the vocabulary write nothing, except a special token whose text is in
    `keep` (an answer tag that was added as a special token). Linear in n.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
    reader = piece_reader(backend)
    if reader is None and not (hasattr(tokenizer, "decode") and hasattr(tokenizer, "all_special_ids")):
        raise TypeError(
            f"tokenizer: got {type(tokenizer).__name__}, wanted a tokenizer (decode, all_special_ids); "
            "of a processor pass processor.tokenizer"
        )
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
    return _layout([known[token_id] for token_id in ids])


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


# A chain of tokens each of which ends inside a character; bounded, so that broken bytes cost no more.
_LONGEST_BLOCK = 16


def decoded_layout(
    ids: Sequence[int], tokenizer: TokenizerLike, special: Collection[int], keep: Sequence[str] = ()
) -> Layout:
    """`lay_out` for a tokenizer known only by `decode`, from what each further token adds to a short window.

    A block of tokens ends where the text no longer ends in a broken character: mostly one token, or the
    tokens of one character. Tokens that each end inside a character make longer blocks; these are told apart
    by byte-level token strings if they give the same text, and otherwise each gets the whole block, so that a
    span never misses a token. Linear.
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
        # Decoders show a broken character or hide it.
        incomplete = text.endswith("\ufffd") or text == head
        if incomplete and stop - begin < _LONGEST_BLOCK and stop < len(spoken):
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
        pieces = [byte_level(str(token)).data for token in convert(list(block))]
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
