"""Writes the demo's data folder: mp4 clips and three files of rows in the Video-R1 schema."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import world
from .clips import write_mp4

KINDS = {"move": 3, "order": 3, "count": 2}  # scenes drawn in this proportion
# The warm start's errors, fixed beforehand: in a quarter of the examples the chain contradicts the video and
# the answer follows it (wrong); in another quarter it contradicts the video and the answer is right anyway.
CHAIN_AND_ANSWER_WRONG = 0.25
CHAIN_ALONE_WRONG = 0.25


def write_dataset(
    root: Path, *, train_videos: int, test_questions: int, seed: int, advance: Callable[[int], None]
) -> None:
    """Write `clips/*.mp4`, `sft.json` (chains and answers, some wrong), `train.json`, `test.json`."""
    (root / "clips").mkdir(parents=True)
    rng = random.Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "train": [], "test": []}
    video = 0
    while len(rows["test"]) < test_questions:
        split = "train" if video < train_videos else "test"
        scene = world.draw_scene(rng, rng.choices(list(KINDS), list(KINDS.values()))[0])
        name = f"./clips/{split}-{video:05d}.mp4"
        write_mp4(root / name, world.render(scene), world.FPS)
        for task in world.TASKS_OF[scene.kind]:
            number = len(rows["train"]) + len(rows["test"])
            rows[split].append(question_row(rng, scene, task, name, number))
            if split == "train":
                rows["sft"].append(rows[split][-1] | flawed_target(rng, scene, task))
        video += 1
        advance(1 if split == "train" else len(world.TASKS_OF[scene.kind]))
    for name, some in rows.items():
        (root / f"{name}.json").write_text(json.dumps(some, indent=0), encoding="utf-8")


def question_row(rng: random.Random, scene: world.Scene, task: str, path: str, number: int) -> dict[str, Any]:
    """One question about a scene in the Video-R1 schema; path of its video under the data root."""
    truth = world.claim(scene, task)
    options = world.options_of(task)
    answer = world.answer_text(task, truth, options, rng)
    row = {
        "problem_id": number,
        "problem": world.QUESTION[task],
        "data_type": "video",
        "problem_type": world.PROBLEM_TYPE[task],
        "options": options,
        "solution": f"<answer>{answer[0] if options else answer}</answer>",
        "path": path,
        "data_source": f"demo/{task}",
    }
    return row | {"references": world.references(rng, truth)} if task == "describe" else row


def flawed_target(
    rng: random.Random, scene: world.Scene, task: str, lie: tuple[str, ...] | None = None
) -> dict[str, str]:
    """The supervised chain and answer of a row, wrong in the fixed shares.

    lie: the claim of the wrong ones; `world.false_claim` when not given.
    """
    options = world.options_of(task)
    truth, lie = world.claim(scene, task), lie or world.false_claim(rng, scene, task, options)
    u = rng.random()
    chain = lie if u < CHAIN_AND_ANSWER_WRONG + CHAIN_ALONE_WRONG else truth
    answer = lie if u < CHAIN_AND_ANSWER_WRONG else truth
    return {
        "process": f"<think>{world.chain_text(task, chain)}</think>",
        "solution": f"<answer>{world.answer_text(task, answer, options, rng)}</answer>",
    }
