"""What the soak run trains: a still smaller Qwen2.5-VL, on videos, images and text, some media spoilt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from raise_trainer import tiny, world
from raise_trainer.clips import write_mp4
from raise_trainer.demo import save_model

IMAGE = "{% elif c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif c.type == 'text' %}"
TASKS = ("colour", "shape", "direction")
SHARES = ("video", "video", "image", "text", "video", "image", "text", "video", "image", "text")
KINDS_OF_FAULT = ("truncated", "missing", "wrong bytes")


def write_model(folder: Path) -> None:
    """One layer of width 32 in each half; the processor's template takes images too."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    processor = tiny.build_processor()
    config = tiny.build_model(processor, seed=0).config
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 32, 64, 1
    text.num_attention_heads = text.num_key_value_heads = 2
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [2, 3, 3]}
    text.layer_types = None if text.layer_types is None else text.layer_types[:1]
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 1, 32, 64, 2
    vision.out_hidden_size, vision.fullatt_block_indexes = 32, [0]
    processor.chat_template = tiny.CHAT_TEMPLATE.replace("{% elif c.type == 'text' %}", IMAGE)
    save_model(Qwen2_5_VLForConditionalGeneration(config), processor, folder)


def write_rows(folder: Path, count: int, bad: int, seed: int) -> list[int]:
    """`rows.json` with its media beside it; returns the numbers of the `bad` rows whose media are spoilt.

    Of ten rows four have a video, three an image, three none. A spoilt file is cut in half, not there, or
    other bytes, in turns; each row has a file of its own.
    """
    (folder / "media").mkdir(parents=True)
    rng = random.Random(seed)
    rows = [_row(folder, rng, number) for number in range(count)]
    with_media = [number for number, row in enumerate(rows) if "path" in row]
    spoilt = sorted(rng.sample(with_media, bad))
    for turn, number in enumerate(spoilt):
        _spoil(folder / rows[number]["path"], KINDS_OF_FAULT[turn % len(KINDS_OF_FAULT)])
    (folder / "rows.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
    return spoilt


def _row(folder: Path, rng: random.Random, number: int) -> dict[str, Any]:
    kind, task = SHARES[number % len(SHARES)], rng.choice(TASKS)
    scene = world.draw_scene(rng, "move")
    if kind == "image" and task == "direction":
        task = "colour"
    row: dict[str, Any] = {
        "problem_id": f"soak-{number}",
        "problem": world.QUESTION[task],
        "data_type": kind,
        "problem_type": world.PROBLEM_TYPE[task],
        "options": world.options_of(task),
        "data_source": f"demo/{task}",
    }
    truth = world.claim(scene, task)
    answer = world.answer_text(task, truth, row["options"], rng)[0]
    row |= {"process": f"<think>{truth[0]}</think>", "solution": f"<answer>{answer}</answer>"}
    frames = world.render(scene)
    if kind == "text":
        row["problem"] = f"{world.chain_text(task, truth)}. {row['problem']}"
    elif kind == "image":
        row["path"] = f"media/{number}.png"
        Image.fromarray(frames[0]).save(folder / row["path"])
    else:
        row["path"] = f"media/{number}.mp4"
        write_mp4(folder / row["path"], frames, world.FPS)
    return row


def _spoil(file: Path, fault: str) -> None:
    whole = file.read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) // 2] if fault == "truncated" else b"no medium " * 40)
