"""Prompt templates: YAML files that say how a row's question is put to the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .rows import PROBLEM_TYPES, Row

FOLDER = Path(__file__).parent / "templates" / "prompts"


@dataclass(frozen=True)
class PromptTemplate:
    """What surrounds a question.

    text: the user's turn behind the medium; {question}, {options} and {tail} are replaced, the first is
    needed. options: what {options} becomes for a row that has some, its own {options} being one a line; for
    other rows {options} becomes nothing. tails: what {tail} becomes, by problem type. system: the system
    message; None for the model's own default.
    """

    text: str
    options: str = "\nOptions:\n{options}"
    tails: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None

    def render(self, row: Row) -> str:
        """The user's text for a row. Braces in the row are left as they are."""
        options = _fill(self.options, {"options": "\n".join(row.options)}) if row.options else ""
        tail = self.tails.get(row.problem_type, "")
        return _fill(self.text, {"question": row.problem, "options": options, "tail": tail}).rstrip()


def _fill(text: str, values: Mapping[str, str]) -> str:
    """Replace each {name} once, never inside what has been filled in."""
    out, rest = [], text
    while rest:
        places = [(rest.find(f"{{{name}}}"), name) for name in values]
        place, name = min((p for p in places if p[0] >= 0), default=(-1, ""))
        if place < 0:
            break
        out += [rest[:place], values[name]]
        rest = rest[place + len(name) + 2 :]
    return "".join(out) + rest


def load_template(name: str) -> PromptTemplate:
    """A template by name (templates/prompts/NAME.yaml), or by path: whatever ends in .yaml or .yml.

    Raises UserError, with the file, for one that is missing or that has other fields than PromptTemplate.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    by_path = name.endswith((".yaml", ".yml"))
    if not by_path and name not in known:
        raise UserError(f"template {name!r}: expected one of {', '.join(known)}, or the path of a .yaml file")
    file = Path(name) if by_path else FOLDER / f"{name}.yaml"
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"template {file}: {error.strerror}; name one of {', '.join(known)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"template {file}: not YAML ({' '.join(str(error).split())[:200]})") from None
    return _checked(file, given)


def _checked(file: Path, given: Any) -> PromptTemplate:
    fields = PromptTemplate.__dataclass_fields__
    if not isinstance(given, Mapping) or not set(given) <= set(fields) or "text" not in given:
        raise UserError(
            f"template {file}: expected the fields {', '.join(fields)}, of which `text` is needed"
        )
    for key in ("text", "options", "system"):
        if not isinstance(given.get(key, ""), str) and not (key == "system" and given[key] is None):
            raise UserError(f"template {file}: `{key}` is {type(given[key]).__name__}, expected text")
    if "{question}" not in given["text"]:
        raise UserError(f"template {file}: `text` holds no {{question}}; the model would never see it")
    tails = given.get("tails") or {}
    if not isinstance(tails, Mapping) or not all(isinstance(tail, str) for tail in tails.values()):
        raise UserError(f"template {file}: `tails` is no list of `problem type: text`")
    if unknown := [kind for kind in tails if kind not in PROBLEM_TYPES]:
        raise UserError(
            f"template {file}: `tails` names {unknown[0]!r}, expected some of {', '.join(PROBLEM_TYPES)}"
        )
    return PromptTemplate(**{**given, "tails": dict(tails)})
