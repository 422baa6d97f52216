"""The main job: write videos, warm-start a tiny model on flawed chains, train it with GRPO, report."""

import json
import os
import resource
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import tiny
from .config import DemoConfig, check
from .data import Refused, Row, keep_good, load_rows
from .dataset import write_dataset
from .errors import BadRow, UserError
from .evaluate import Answered, HeldOut, evaluate, summary
from .logbook import Logbook
from .loop import Supervised, run_grpo, run_sft
from .prompts import Prompt, PromptBuilder, target_ids
from .report import write_report
from .world import task_of

SMOKE = {
    "train_videos": 24, "test_questions": 24, "warm_steps": 4, "warm_batch": 4,
    "grpo_steps": 3, "prompts": 3, "group_size": 4, "eval_samples": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """The demo's data, ready for the model."""

    processor: Any
    supervised: list[Supervised]
    train: list[Prompt]
    test: list[Prompt]
    sampling: dict[str, Any]


def open_run(out: Path) -> Path:
    """Make the run's folder. UserError if it holds something already or cannot be written."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: already exists; choose another folder or remove it")
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    return out


def check_device(device: str) -> None:
    """UserError if a device is asked for that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to torch; use --device cpu")


def prepare(config: DemoConfig, log: Logbook) -> Prepared:
    """Write (or open) the data folder, check every row, decode every video once.

    A row must also name a task of the demo world, without which Match cannot be decided.
    """
    root = config.data or config.out / "data"
    if config.data is None:
        with log.stage("write videos", config.train_videos + config.test_questions) as stage:
            write_dataset(
                root,
                train_videos=config.train_videos,
                test_questions=config.test_questions,
                seed=config.seed,
                advance=stage.advance,
            )
    refused = Refused()
    rows = {
        name: load_rows(root / f"{name}.json", root, on_bad=config.on_bad, refused=refused)
        for name in ("sft", "train", "test")
    }
    processor = tiny.build_processor()
    builder = PromptBuilder(processor, frames=config.frames, max_length=tiny.CONTEXT - config.max_new_tokens)
    prompts: dict[str, list[Prompt]] = {}
    with log.stage("decode videos", sum(map(len, rows.values()))) as stage:

        def prompt(row: Row) -> Prompt:
            stage.advance()
            try:
                task_of(row.data_source)
            except ValueError as error:
                raise BadRow(f"row {row.problem_id}: {error}") from None
            return builder(row)

        for name, some in rows.items():
            prompts[name] = keep_good(some, prompt, config.on_bad, refused)
    tokenizer = processor.tokenizer
    supervised = keep_good(
        prompts["sft"], lambda p: Supervised(p, target_ids(p.row, tokenizer)), config.on_bad, refused
    )
    if refused.items:
        log.say(f"warning: {refused}")
        (config.out / "refused.json").write_text(json.dumps(refused.items, indent=1), encoding="utf-8")
    for name, some in {**prompts, "sft": supervised}.items():
        if not some:
            raise UserError(f"{root / name}.json: no usable row is left; {refused}")
    sampling = {
        "max_new_tokens": config.max_new_tokens,
        "eos": [tokenizer.eos_token_id],
        "suppress": tokenizer.convert_tokens_to_ids(list(tiny.MEDIA)),
    }
    return Prepared(processor, supervised, prompts["train"], prompts["test"], sampling)


def held_out(model: Any, data: Prepared, config: DemoConfig, log: Logbook, name: str) -> HeldOut:
    """Sampled and greedy answers to every held-out question; the means are written to metrics.jsonl."""
    with log.stage(f"evaluate {name}", 2 * len(data.test)) as stage:

        def answers(samples: int, temperature: float) -> list[Answered]:
            return evaluate(
                model,
                data.test,
                data.processor.tokenizer,
                samples=samples,
                temperature=temperature,
                seed=config.seed,
                advance=stage.advance,
                **data.sampling,
            )

        answered, greedy = answers(config.eval_samples, 1.0), summary(answers(1, 0.0))
    figures = summary(answered) | {f"{key}_greedy": greedy[key] for key in ("accuracy", "match")}
    log.write(f"evaluate {name}", 0, **figures)
    return HeldOut(answered, figures)


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """A Hugging Face checkpoint (safetensors) with its processor; `from_pretrained` loads both."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def warm_start(data: Prepared, config: DemoConfig, log: Logbook) -> Any:
    """A new model after the supervised warm start."""
    model = tiny.build_model(data.processor, seed=config.seed).to(config.device)
    run_sft(model, data.supervised, config, log, name="warm start", steps=config.warm_steps)
    return model


def start(config: DemoConfig) -> tuple[DemoConfig, Logbook]:
    """Check the settings, open the run's folder and fix what the figures depend on."""
    if config.smoke:
        config = replace(config, **SMOKE)
    check(config)
    check_device(config.device)
    open_run(config.out)
    torch.set_num_threads(config.threads)
    text = json.dumps(asdict(config) | {"torch": torch.__version__}, indent=1, default=str)
    (config.out / "config.json").write_text(text, encoding="utf-8")
    return config, Logbook(config.out)


def run_demo(config: DemoConfig) -> Path:
    """The whole job; returns the path of the report."""
    config, log = start(config)
    try:
        data = prepare(config, log)
    except UserError:
        shutil.rmtree(config.out)  # it was empty or new, and nothing has been trained: let it be named again
        raise
    model = warm_start(data, config, log)
    before = held_out(model, data, config, log, "warm start")
    run_grpo(model, data.train, data.processor.tokenizer, config, log, name="grpo", sampling=data.sampling)
    after = held_out(model, data, config, log, "after grpo")
    save_model(model, data.processor, config.out / "model")
    _final_table(log, config, before, after)
    report = write_report(config, log, data.test, {"warm start": before, "after GRPO": after})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    log.time("run", seconds=log.seconds, peak_gib=peak)
    log.say(f"{log.seconds:.0f} s, {peak:.1f} GiB at most. Model: {config.out / 'model'}")
    log.say(f"Report: {report}")
    return report


def _final_table(log: Logbook, config: DemoConfig, before: HeldOut, after: HeldOut) -> None:
    a, b = before.figures, after.figures
    rows = [
        [key.replace("_", " "), f"{a[key]:.3f}", f"{b[key]:.3f}", f"{b[key] - a[key]:+.3f}"]
        for key in a
        if "/" not in key
    ]
    questions = len(before.answered) // config.eval_samples
    title = f"{questions} questions on unseen videos, {config.eval_samples} samples each"
    log.table(title, ["", "warm start", f"GRPO, {config.reward}", "change"], rows)
