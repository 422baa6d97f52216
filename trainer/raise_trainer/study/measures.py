"""What the study reports of a model's answers to a test set."""

from collections.abc import Sequence
from typing import Any

from raise_core.tags import answer_in, last_pair

from .. import world
from ..data import Row
from ..evaluate import Answered, evaluate, summary
from .seeds import Seed

KEYS = (
    "accuracy", "answer", "match", "confidence", "confidence_right", "confidence_wrong",
    "accuracy_strict", "accuracy_open",
)  # fmt: skip


def answer_from_chain(row: Row, text: str) -> bool:
    """Whether the chain alone gives the right answer: the claim it states is what the video shows.

    The paper's Answer, with the world's own parser as the judge that reads the chain of thought alone.
    """
    task, bounds = world.task_of(row.data_source), last_pair(text)
    chain = answer_in(text[: bounds[0]], "<think>", "</think>")[0] if bounds else ""
    stated = world.chain_claim(task, chain)
    return stated is not None and stated == world.answer_claim(task, answer_in(row.solution)[0], row.options)


def figures(answered: Sequence[Answered], *, tasks: bool = False) -> dict[str, float]:
    """Means over all completions, by the names of KEYS; tasks: `accuracy/TASK` and `match/TASK` too."""
    means = summary(answered)
    right = [answer_from_chain(a.row, a.text) for a in answered]
    means["answer"] = sum(right) / len(right)
    return {k: v for k, v in means.items() if k in KEYS or (tasks and "/" in k)}


def measure(model: Any, seed: Seed) -> dict[str, dict[str, float]]:
    """Figures of every test set, sampled at temperature 1 with draws that all arms share.

    held_out has the tasks one by one and greedy decoding as `*_greedy` too.
    """

    def answers(name: str, samples: int, temperature: float) -> list[Answered]:
        return evaluate(
            model, seed.tests[name], seed.data.processor.tokenizer, samples=samples,
            temperature=temperature, seed=seed.config.seed, **seed.data.sampling,
        )  # fmt: skip

    found = {}
    for name in seed.tests:
        found[name] = figures(answers(name, seed.config.eval_samples, 1.0), tasks=name == "held_out")
    greedy = figures(answers("held_out", 1, 0.0))
    found["held_out"] |= {f"{key}_greedy": greedy[key] for key in ("accuracy", "answer", "match")}
    return found
