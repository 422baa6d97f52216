"""The study's data: training videos that keep some colour × shape pairs out, and shifted test sets.

held_out     the pairs of training, 8 frames
new_pairs    only pairs that no training video shows and no supervised text names together, 8 frames
long_16      the pairs of training in videos of 32 frames (8 s), every second frame sampled
long_32      the same videos and questions, every frame sampled
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import world
from ..clips import write_mp4
from ..dataset import KINDS, flawed_target, question_row

Pair = tuple[str, str]  # colour, shape
WITHHELD: tuple[Pair, ...] = (("red", "ring"), ("green", "square"), ("blue", "cross"), ("yellow", "ring"))
SEEN: tuple[Pair, ...] = tuple((c, s) for c in world.COLOURS for s in world.SHAPES if (c, s) not in WITHHELD)
LONG = 32  # frames


@dataclass(frozen=True)
class TestSet:
    """A test set: its file of rows (`NAME.json`), the frames sampled per video, how a page calls it."""

    rows: str
    frames: int
    title: str


TEST_SETS = {
    "held_out": TestSet("test", world.FRAMES, "held-out"),
    "new_pairs": TestSet("new_pairs", world.FRAMES, "new pairs"),
    "long_16": TestSet("long", 16, "longer, 16 frames"),
    "long_32": TestSet("long", LONG, "longer, 32 frames"),
}


def draw_scene(rng: random.Random, kind: str, allowed: Sequence[Pair]) -> world.Scene:
    """A scene of a kind whose things have pairs of `allowed` alone; in an order scene colours differ."""
    scene = world.draw_scene(rng, kind)
    chosen = list[Pair]()
    for _ in scene.things:
        taken = {colour for colour, _ in chosen} if kind == "order" else set()
        chosen.append(rng.choice([pair for pair in allowed if pair[0] not in taken]))
    things = tuple(replace(t, colour=c, shape=s) for t, (c, s) in zip(scene.things, chosen, strict=True))
    return replace(scene, things=things)


def withheld_in(words: Sequence[str]) -> bool:
    """Whether the words of a claim name a withheld pair."""
    return any(colour in words and shape in words for colour, shape in WITHHELD)


def write_study_data(
    root: Path,
    *,
    train_videos: int,
    test_questions: int,
    shifted_questions: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write `clips/*.mp4`, sft, train, test, new_pairs and long `.json` in the schema of the demo's data.

    advance: called after each video. A set has at least the questions asked for: a video's are all taken.
    """
    (root / "clips").mkdir(parents=True)
    rng, number = random.Random(f"study {seed}"), 0
    rows: dict[str, list[dict[str, Any]]] = {"sft": []}
    for name, allowed, frames, videos, questions in (
        ("train", SEEN, world.FRAMES, train_videos, 0),
        ("test", SEEN, world.FRAMES, 0, test_questions),
        ("new_pairs", WITHHELD, world.FRAMES, 0, shifted_questions),
        ("long", SEEN, LONG, 0, shifted_questions),
    ):
        made, video = rows.setdefault(name, []), 0
        while video < videos or len(made) < questions:
            scene = draw_scene(rng, rng.choices(list(KINDS), list(KINDS.values()))[0], allowed)
            path = f"./clips/{name}-{video:05d}.mp4"
            write_mp4(root / path, world.render(scene, frames), world.FPS)
            for task in world.TASKS_OF[scene.kind]:
                made.append(question_row(rng, scene, task, path, number))
                number += 1
                if name == "train":
                    rows["sft"].append(made[-1] | flawed_target(rng, scene, task, _lie(rng, scene, task)))
            video += 1
            advance()
    for name, some in rows.items():
        (root / f"{name}.json").write_text(json.dumps(some, indent=0), encoding="utf-8")


def _lie(rng: random.Random, scene: world.Scene, task: str) -> tuple[str, ...]:
    """A false claim that names no withheld pair either."""
    while True:
        lie = world.false_claim(rng, scene, task, world.options_of(task))
        if not withheld_in(lie):
            return lie
