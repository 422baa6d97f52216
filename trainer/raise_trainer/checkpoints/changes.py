"""Whether a run may go on with this config and this data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ResumeRefused

ABSENT = "(absent)"


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON keeps it: tuples are lists, paths and other objects are their text."""
    kept: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    return kept


def changed_fields(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_change: Sequence[str] = ()
) -> list[str]:
    """`name: saved -> now` for each field that differs; nested ones as `outer.inner`.

    may_change: fields, with all that is inside them, that are not looked at.
    """
    before, after = dict(_fields(plain_config(saved))), dict(_fields(plain_config(now)))
    return [
        f"{name}: {_text(before, name)} -> {_text(after, name)}"
        for name in sorted(before.keys() | after.keys())
        if _text(before, name) != _text(after, name)
        and not any(name == field or name.startswith(f"{field}.") for field in may_change)
    ]


def check_unchanged(where: str, changed: Sequence[str], on_change: str) -> None:
    """ResumeRefused if something changed and `on_change` is "refuse"; "accept" lets it pass.

    The command line's --accept-changes is "accept".
    """
    if on_change not in ("refuse", "accept"):
        raise ValueError(f'on_change: got {on_change!r}, wanted "refuse" or "accept"')
    if changed and on_change == "refuse":
        raise ResumeRefused(
            f"{where} was saved with other settings: {'; '.join(changed)}; undo this, train into another "
            "folder, or go on all the same (train, sft: --accept-changes)"
        )


def _fields(config: Mapping[str, Any], at: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        inside = isinstance(value, dict) and value
        found += _fields(value, f"{at}{name}.") if inside else [(f"{at}{name}", value)]
    return found


def _text(fields: Mapping[str, Any], name: str) -> str:
    return json.dumps(fields[name], ensure_ascii=False) if name in fields else ABSENT
