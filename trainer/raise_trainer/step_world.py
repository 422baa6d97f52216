"""The demo world in steps: a moving shape is described by its colour, shape and direction, a step each.

Every step states one word, so whether it is good is known exactly, and an answer is right when all three are.
The warm start's chains are wrong on purpose, in two ways fixed beforehand: each word is another one at random
in a few of the steps, and where the shape is a ring its colour is mostly mistaken for one certain other
colour. The first kind of mistake loses a vote among samples, the second one wins it.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import raise_core as rc
from raise_core.tags import ANSWER_CLOSE, ANSWER_OPEN, answer_in

from . import world
from .clips import write_mp4
from .rows import Row

TASK = "describe"
PARTS = (
    ("What colour", "the colour is {}", tuple(world.COLOURS)),
    ("Which shape", "the shape is a {}", world.SHAPES),
    ("Which way", "it moves {}", tuple(world.DIRECTIONS)),
)
ASKED = ("colour", "shape", "direction")  # the world's task that a part's thought answers
REFLECTION = "the video shows"  # every token of a chain's form is learned, so the form is short
SLIP = 0.12  # share of the warm start's words that are another one at random
MISTAKEN = {"red": "yellow", "yellow": "red", "green": "blue", "blue": "green"}
MISTAKE = 0.6  # share of the warm start's ring videos whose colour is mistaken
RIGHT = 0.4  # share of the chains for a PRM whose steps are all right; without them right answers are rare
CORRUPT = 0.45  # share of wrong words in the others
ASTRAY = 0.2  # share of an answer's words that do not follow from its steps, of chains for a PRM
CHAINS = 3  # of each video for the PRM

Words = tuple[str, ...]


def slipped(rng: random.Random, words: Sequence[str], share: float) -> Words:
    """The words, each another one of its kind in `share` of the cases."""
    return tuple(
        rng.choice([v for v in values if v != word]) if rng.random() < share else word
        for word, (_, _, values) in zip(words, PARTS, strict=True)
    )


def mistaken(rng: random.Random, words: Sequence[str]) -> Words:
    """What a warm start's chain says of a video that shows `words`."""
    colour, shape, direction = words
    if shape == "ring" and rng.random() < MISTAKE:
        colour = MISTAKEN[colour]
    return slipped(rng, (colour, shape, direction), SLIP)


def steps_of(words: Sequence[str]) -> list[rc.Step]:
    """The chain that states the words."""
    return [
        rc.Step(name, thought.format(word), REFLECTION)
        for word, (name, thought, _) in zip(words, PARTS, strict=True)
    ]


def answer_of(words: Sequence[str]) -> str:
    """The description that follows from the words."""
    return world.PHRASINGS[0].format(*words)


def labels(words: Sequence[str], said: Sequence[str], answered: Sequence[str]) -> list[float]:
    """1 for each step that says what the video shows, else 0; then 1 for an answer right in all words."""
    steps = [float(a == b) for a, b in zip(words, said, strict=True)]
    return [*steps, float(tuple(words) == tuple(answered))]


def truth_of(row: Row) -> Words:
    """Colour, shape and direction that a row's video shows. ValueError for a row of another task."""
    words = world.answer_claim(TASK, answer_in(row.solution)[0], ())
    if words is None:
        raise ValueError(f"row {row.problem_id}: solution {row.solution[:60]!r}, wanted a description")
    return words


def true_word(step: rc.Step, truth: Sequence[str]) -> str | None:
    """The word of `truth` that a step states; None for one that states another, or none at all."""
    for task, word in zip(ASKED, truth, strict=True):
        if world.chain_claim(task, step.thought) == (word,):
            return word
    return None


def judged_steps(steps: Sequence[rc.Step], truth: Sequence[str]) -> list[tuple[bool, str | None]]:
    """Whether each step is good, and the word that is true where it states one of its kind.

    Good is what states a true word that no good step before it stated. None for a step that states no word.
    """
    found, stated = list[tuple[bool, str | None]](), set[str]()
    for step in steps:
        kind = next((i for i, task in enumerate(ASKED) if world.chain_claim(task, step.thought)), None)
        word = true_word(step, truth)
        found.append((word is not None and word not in stated, None if kind is None else truth[kind]))
        if word is not None:
            stated.add(word)
    return found


def write_step_dataset(
    root: Path, *, train_videos: int, test_videos: int, seed: int, advance: Callable[[int], None]
) -> None:
    """Write clips, sft.json (chains, some wrong), prm.json (labelled chains), train.json and test.json."""
    (root / "clips").mkdir(parents=True)
    rng = random.Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "prm": [], "train": [], "test": []}
    for video in range(train_videos + test_videos):
        split = "train" if video < train_videos else "test"
        scene = world.draw_scene(rng, "move")
        path = f"./clips/{split}-{video:05d}.mp4"
        write_mp4(root / path, world.render(scene), world.FPS)
        truth = world.claim(scene, TASK)
        row = _question(rng, truth, path, video)
        rows[split].append(row)
        if split == "train":
            rows["sft"].append(row | supervised(mistaken(rng, truth)))
            rows["prm"] += [row | _labelled(rng, truth) for _ in range(CHAINS)]
        advance(1)
    for i, row in enumerate(rows["prm"]):
        row["problem_id"] = i
    for name, some in rows.items():
        (root / f"{name}.json").write_text(json.dumps(some, indent=0), encoding="utf-8")


def _question(rng: random.Random, truth: Words, path: str, number: int) -> dict[str, Any]:
    return {
        "problem_id": number,
        "problem": world.QUESTION[TASK],
        "data_type": "video",
        "problem_type": world.PROBLEM_TYPE[TASK],
        "solution": f"{ANSWER_OPEN}{answer_of(truth)}{ANSWER_CLOSE}",
        "references": world.references(rng, truth),
        "path": path,
        "data_source": f"demo/{TASK}",
    }


def supervised(words: Words) -> dict[str, str]:
    """`process` and `solution` of a chain that states the words and answers with them."""
    text = rc.format_chain(steps_of(words), answer_of(words), open=ANSWER_OPEN, close=ANSWER_CLOSE)
    at = text.index(ANSWER_OPEN)
    return {"process": text[:at], "solution": text[at:]}


def _labelled(rng: random.Random, truth: Words) -> dict[str, Any]:
    """A chain with wrong words, and an answer that follows from it in most of its own, with exact labels."""
    wrong = 0.0 if rng.random() < RIGHT else CORRUPT
    said = slipped(rng, truth, wrong)
    if truth[1] == "ring" and rng.random() < wrong:
        said = (MISTAKEN[truth[0]], *said[1:])
    answered = slipped(rng, said, ASTRAY)
    steps = [{"name": s.name, "thought": s.thought, "reflection": s.reflection} for s in steps_of(said)]
    return {"steps": steps, "answer": answer_of(answered), "labels": labels(truth, said, answered)}
