"""One answer out of several samples, and accuracy against their number; pure functions of records.

A record is what is kept of a question (`search.questions`): `samples`, each with a `key` (the answer in one
spelling, None without one), a `value` (how right it is, in [0, 1]), a `reward` (of the PRM, in [0, 1]) and
`tokens`; and `beams` by number of samples N, each with `value` and `tokens`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import raise_core as rc
from raise_core.graders import option_letter, parse_number

from ..rows import Row

Sample = Mapping[str, Any]
Record = Mapping[str, Any]
METHODS = ("pass", "vote", "best", "weighted", "beam")
TITLES = {
    "pass": "pass@N",
    "vote": "self-consistency",
    "best": "best-of-N, PRM",
    "weighted": "self-consistency, PRM-weighted",
    "beam": "step beam search, PRM",
}


def answer_key(row: Row, text: str) -> str | None:
    """A completion's answer in one spelling, so that equal answers are one in a vote; None without one."""
    answer = " ".join(rc.parse_chain(text).answer.casefold().split())
    if not answer:
        return None
    if row.problem_type == "multiple choice":
        return option_letter(answer) or _letter_of(row, answer)
    number = parse_number(answer)
    return answer if number is None else f"{number.value:.15g} {number.unit}".strip()


def _letter_of(row: Row, answer: str) -> str:
    """The letter of an option that is written out, or the answer as it is."""
    for option in row.options:
        letter = option_letter(option)
        if letter is not None and option[len(letter) :].strip(" .):").casefold() == answer:
            return letter
    return answer


def majority(samples: Sequence[Sample], weights: Sequence[float]) -> int:
    """The sample whose answer has the most weight together; the first one that has it, and of equals.

    Samples without an answer have no vote; where none has one it is the first.
    """
    total = dict[str, float]()
    for sample, weight in zip(samples, weights, strict=True):
        if sample["key"] is not None:
            total[sample["key"]] = total.get(sample["key"], 0.0) + weight
    if not total:
        return 0
    winner = max(total, key=total.__getitem__)
    return next(i for i, sample in enumerate(samples) if sample["key"] == winner)


def best(samples: Sequence[Sample]) -> int:
    """The sample with the highest reward, the first of equals."""
    return max(range(len(samples)), key=lambda i: samples[i]["reward"])


CHOICE: dict[str, Callable[[Sequence[Sample]], float]] = {
    "pass": lambda some: max(float(s["value"]) for s in some),
    "vote": lambda some: float(some[majority(some, [1.0] * len(some))]["value"]),
    "best": lambda some: float(some[best(some)]["value"]),
    "weighted": lambda some: float(some[majority(some, [s["reward"] for s in some])]["value"]),
}


def accuracy(record: Record, method: str, n: int) -> float | None:
    """Accuracy of a question by a method with N samples, [0, 1]; None where the record has not as many.

    The record's samples are cut into runs of N, and the mean over the runs is taken: a small N then hangs on
    no single draw. Step beam search was run for itself with each N.
    """
    if method == "beam":
        beam = record["beams"].get(str(n))
        return None if beam is None else float(beam["value"])
    samples = record["samples"]
    runs = [samples[i : i + n] for i in range(0, len(samples) - n + 1, n)]
    return sum(map(CHOICE[method], runs)) / len(runs) if runs else None


def tokens(record: Record, method: str, n: int) -> float | None:
    """Tokens sampled for a question by a method with N samples, as in `accuracy`."""
    if method == "beam":
        beam = record["beams"].get(str(n))
        return None if beam is None else float(beam["tokens"])
    samples = record["samples"]
    used = len(samples) // n * n
    return sum(s["tokens"] for s in samples[:used]) / (used // n) if used else None


def curves(records: Sequence[Record], counts: Sequence[int]) -> list[dict[str, Any]]:
    """For each method and N: accuracy, its standard error over the questions, and tokens a question."""
    rows = list[dict[str, Any]]()
    for method in METHODS:
        for n in counts:
            pairs = [(accuracy(r, method, n), tokens(r, method, n)) for r in records]
            kept = [(a, t) for a, t in pairs if a is not None and t is not None]
            if not kept or len(kept) < len(pairs):
                continue
            mean = sum(a for a, _ in kept) / len(kept)
            spread = sum((a - mean) ** 2 for a, _ in kept) / max(len(kept) - 1, 1)
            rows.append(
                {
                    "method": method, "n": n, "accuracy": mean,
                    "standard_error": (spread / len(kept)) ** 0.5, "questions": len(kept),
                    "tokens": sum(t for _, t in kept) / len(kept),
                }
            )  # fmt: skip
    return rows
