"""A tiny text model that has learned the form of short chains, a reward model beside it, and questions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

import raise_core as rc
from raise_trainer import tiny
from raise_trainer.chain_tokens import add_chain_tokens
from raise_trainer.prompts import PromptBuilder
from raise_trainer.rows import parse_row
from raise_trainer.update import sft_step
from raise_trainer.world import COLOURS

NAMES = sorted(COLOURS)
LONGEST = 64


def question(number: int) -> dict[str, Any]:
    colour = NAMES[number % len(NAMES)]
    return {
        "problem_id": f"q{number}", "problem": f"What colour is {colour}?", "data_type": "text",
        "problem_type": "free-form", "solution": f"<answer>{colour}</answer>",
    }  # fmt: skip


def chain(colour: str) -> str:
    steps = [rc.Step("it", f"the colour is {colour}", "it")]
    return rc.format_chain(steps, colour, open="<answer>", close="</answer>")


def make(folder: Path, questions: int = 6, steps: int = 36) -> Path:
    """`folder`/model, /prm and /data.json; the policy names any colour, so its chains differ."""
    processor = tiny.build_processor()
    tokenizer = processor.tokenizer
    for name, seed in (("model", 0), ("prm", 1)):
        model = tiny.build_model(processor, seed=seed)
        add_chain_tokens(model, tokenizer)
        if name == "model":
            _learn_the_form(model, processor, steps)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    (folder / "data.json").write_text(json.dumps([question(i) for i in range(questions)]), encoding="utf-8")
    return folder


def _learn_the_form(model: Any, processor: Any, steps: int) -> None:
    rng, builder = random.Random(0), PromptBuilder(processor, frames=2, max_length=200)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    scorer = rc.Scorer(model)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        rows = [parse_row(0, question(rng.randrange(len(NAMES))), Path(".")) for _ in range(4)]
        ids = [
            [*processor.tokenizer(chain(rng.choice(NAMES)), add_special_tokens=False)["input_ids"],
             processor.tokenizer.eos_token_id]
            for _ in rows
        ]  # fmt: skip
        sft_step(scorer, optimizer, [builder(row).inputs for row in rows], ids)
