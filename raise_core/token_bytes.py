"""From one token's string to the bytes it writes, by the rules of the tokenizer's own decoder.

Known decoders: byte-level (GPT-2, Qwen, Llama 3), SentencePiece in its spellings (Metaspace, or Replace and
ByteFallback), WordPiece, `</w>` suffixes, and none at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True)
class Piece:
    """What one token writes: its bytes, and whether the decoder shows a space before or after them."""

    data: bytes
    space_before: bool = False
    space_after: bool = False


PieceReader = Callable[[str], Piece]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's stand-ins: a printable Latin-1 byte is itself, the others are U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def byte_level(token: str) -> Piece:
    """A token in GPT-2's alphabet; one with a character outside it (an added token) is taken as it stands."""
    codes = [_BYTE_OF.get(character) for character in token]
    return Piece(token.encode("utf-8", "surrogatepass") if None in codes else bytes(cast("list[int]", codes)))


def fallback_byte(token: str) -> bytes | None:
    """The byte of a SentencePiece `<0xNN>`, None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None


def piece_reader(backend: Any) -> PieceReader | None:
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
        return byte_level if set(kinds) <= {"ByteLevel", "Fuse"} else None
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
    dropping it would only shift all offsets by one.
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
        byte = fallback_byte(token) if has_bytes else None
        if byte is not None:
            return Piece(byte)
        for old, new in replacements:
            token = token.replace(old, new)
        return Piece(token.encode())

    return read
