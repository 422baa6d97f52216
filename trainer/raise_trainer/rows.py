"""One row: its fields in the Video-R1 JSON schema, checked; what cannot be used raises BadRow with its id.

problem_id      any text or number                     optional: its number in the file
problem         the question
data_type       "video", "image" or "text"
problem_type    "multiple choice", "numerical", "regression", "OCR" or "free-form"
options         ["A. red", …]                          needed for multiple choice
solution        "<answer>X</answer>"
path            "./folder/file" under the data root    none for text
data_source     where it comes from                    optional
process         "<think>…</think>"                     supervised rows only; the target is process + solution
references      [str, …]                               optional, OCR and free-form: several accepted phrasings
reward          "scre" or "igsr"                       optional: the route, in place of its problem type's
steps           [{"name", "thought", "reflection"}, …] optional: a chain's steps; a str is a thought alone
answer          the answer that the chain came to      optional; a process reward model learns these three
labels          ["good", "neutral", "bad", 0.25, …]    of each step, and of the answer if there is one more
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import raise_core as rc
from raise_core.graders import option_letter
from raise_core.tags import answer_in

from .errors import BadRow
from .media.sampling import Sampling

Route = Literal["scre", "igsr"]
DATA_TYPES = ("video", "image", "text")
PROBLEM_TYPES = ("multiple choice", "numerical", "regression", "OCR", "free-form")
ROUTES = ("scre", "igsr")
LABELS = {"good": 1.0, "neutral": 0.5, "bad": 0.0}
_STRICT = {"multiple choice", "numerical"}
_SEVERAL = {"OCR", "free-form"}


@dataclass(frozen=True)
class Row:
    """One question, about one medium or none. path is None for text alone; reward is "" for its type's route;
    sampling is its data file's own, None for that of the run.

    Fields mean what the schema above says. labels: 1 good, 0.5 neutral, 0 bad.
    """

    problem_id: int | str
    problem: str
    data_type: str
    problem_type: str
    options: tuple[str, ...]
    solution: str
    path: Path | None
    data_source: str
    process: str = ""
    references: tuple[str, ...] = ()
    reward: str = ""
    steps: tuple[rc.Step, ...] = ()
    answer: str = ""
    labels: tuple[float, ...] = ()
    sampling: Sampling | None = None

    @property
    def route(self) -> Route:
        """`reward`, or "scre" for a kind that is right or wrong and "igsr" for one that is graded."""
        if self.reward:
            return "scre" if self.reward == "scre" else "igsr"
        return "scre" if self.problem_type in _STRICT else "igsr"

    @property
    def strict(self) -> bool:
        """True when its reward is SCRE, False when it is IGSR."""
        return self.route == "scre"

    @property
    def question(self) -> str:
        """The problem with its options, one a line."""
        return "\n".join([self.problem, "Options:", *self.options]) if self.options else self.problem

    def verdict(self, completion: str) -> rc.Verdict:
        """How well a completion answers, by the rule of its kind (`raise_core.verify_details`)."""
        return rc.verify_details(self.problem_type, completion, self.references or self.solution)

    def text_score(self, completion: str) -> float:
        """The score of `verdict`, in [0, 1]."""
        return self.verdict(completion).score


def parse_row(number: int, raw: Any, root: Path, reward: str = "", sampling: Sampling | None = None) -> Row:
    """The row an object in the schema stands for. Raises BadRow with its id.

    number: names a row without `problem_id`. root: resolved folder of the media. reward: route of rows that
    name none; "" takes the problem type's. sampling: of the row's medium.
    """
    if not isinstance(raw, Mapping):
        raise BadRow(f"row {number}: got {type(raw).__name__}, expected an object in the Video-R1 schema")
    row_id = raw.get("problem_id", number)
    name = f"row {row_id}"
    if isinstance(row_id, bool) or not isinstance(row_id, (int, str)):
        raise BadRow(f"row {number}: `problem_id` is {type(row_id).__name__}, expected a number or a string")
    for key in ("problem", "data_type", "problem_type", "solution"):
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise BadRow(f"{name}: no `{key}` (a non-empty string); add it or drop the row")
    for key in ("process", "data_source", "reward", "answer"):
        if not isinstance(raw.get(key, ""), str):
            raise BadRow(f"{name}: `{key}` is {type(raw[key]).__name__}, expected a string")
    kind = raw["problem_type"]
    _one_of(name, "problem_type", kind, PROBLEM_TYPES)
    _one_of(name, "data_type", raw["data_type"], DATA_TYPES)
    if raw.get("reward"):
        _one_of(name, "reward", raw["reward"], ROUTES)
    options, references = (_strings(name, key, raw.get(key) or []) for key in ("options", "references"))
    if references and kind not in _SEVERAL:
        raise BadRow(f"{name}: `references` on a {kind} row; give one `solution`")
    steps, answer = _steps(name, raw.get("steps") or []), raw.get("answer", "").strip()
    if rc.verify_details(kind, "<answer>0</answer>", raw["solution"]).reason == "bad_solution":
        raise BadRow(f"{name}: solution {raw['solution'][:60]!r} cannot be read as {kind}; mend it")
    if kind == "multiple choice":
        _check_options(name, options, raw["solution"])
    return Row(
        problem_id=row_id,
        problem=raw["problem"],
        data_type=raw["data_type"],
        problem_type=kind,
        options=options,
        solution=raw["solution"],
        path=_media_path(name, raw["data_type"], root, raw.get("path")),
        data_source=raw.get("data_source", ""),
        process=raw.get("process", ""),
        references=references,
        reward=raw.get("reward") or reward,
        sampling=sampling,
        steps=steps,
        answer=answer,
        labels=_labels(name, raw.get("labels") or [], len(steps), bool(answer)),
    )


def _steps(name: str, steps: Any) -> tuple[rc.Step, ...]:
    found = list[rc.Step]()
    for i, given in enumerate(steps if isinstance(steps, list) else [steps]):
        parts = {"name": "", "thought": given} if isinstance(given, str) else given
        if (
            not isinstance(parts, Mapping)
            or not {"thought"} <= set(parts) <= {"name", "thought", "reflection"}
            or not all(isinstance(text, str) for text in parts.values())
            or not parts["thought"].strip()
        ):
            raise BadRow(f"{name}: steps[{i}] is {str(given)[:60]!r}, expected a thought, or one with a name")
        found.append(rc.Step(**parts))
    return tuple(found)


def _labels(name: str, labels: Any, steps: int, answered: bool) -> tuple[float, ...]:
    """Labels as numbers from 0 (bad) to 1 (good)."""
    if labels and (not isinstance(labels, list) or len(labels) not in (steps, steps + answered)):
        got = len(labels) if isinstance(labels, list) else type(labels).__name__
        also = f", or {steps + 1} with the answer's" if answered else ""
        raise BadRow(f"{name}: {got} labels for {steps} steps, expected {steps}{also}")
    numbers = list[float]()
    for i, label in enumerate(labels):
        number = LABELS.get(label) if isinstance(label, str) else label
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
            raise BadRow(f"{name}: labels[{i}] is {label!r}, expected good, neutral, bad or a number in 0..1")
        numbers.append(float(number))
    return tuple(numbers)


def _one_of(name: str, key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BadRow(f"{name}: {key} {value[:60]!r}, expected one of {', '.join(known)}")


def _strings(name: str, key: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        raise BadRow(f"{name}: `{key}` is {str(values)[:60]!r}, expected a list of non-empty strings")
    return tuple(values)


def _check_options(name: str, options: tuple[str, ...], solution: str) -> None:
    """There are options, and where all have letters the solution's letter is one of them."""
    if not options:
        raise BadRow(f"{name}: a multiple choice row without `options`; add them or drop the row")
    answer, missing = answer_in(solution)
    chosen = option_letter(answer if missing is None else solution.strip())
    letters = [option_letter(option) for option in options]
    if chosen is not None and None not in letters and chosen not in letters:
        offered = ", ".join(map(str, letters))
        raise BadRow(f"{name}: solution {chosen!r} is none of the options ({offered}); mend the row")


def _media_path(name: str, data_type: str, root: Path, path: Any) -> Path | None:
    """The file `path` names under `root`; links are followed before it is judged."""
    if data_type == "text":
        if path:
            raise BadRow(f"{name}: a text row with a `path`; drop it, or set data_type to video or image")
        return None
    if not isinstance(path, str) or not path.strip():
        raise BadRow(f"{name}: no `path` (a non-empty string); add it or drop the row")
    try:
        found = (root / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRow(f"{name}: path {path!r} is no path ({error}); mend it or drop the row") from None
    if not found.is_relative_to(root):
        raise BadRow(f"{name}: path {path!r} leaves the data root {root}; move the file below it")
    return found
