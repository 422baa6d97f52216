"""`raise-core study --steps`: GRPO on chains of steps, from one warm start and one PRM of each seed."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import raise_core as rc

from ..chain_judge import ChainJudge
from ..demo_steps import ROOM
from ..evaluate import EVALUATION
from ..json_lines import read_json_lines
from ..logbook import Logbook
from ..loop import run_grpo
from ..method import Method
from ..rollout import Rollout, draws, sample
from ..step_world import true_word, truth_of
from ..train_fields import ChainOfStep
from .arms import STEP_ARMS
from .learning import STAGE
from .one import Job, quiet_log
from .records import Record, Results, provenance
from .run import Plan, finish, opened, warm, workers
from .seeds import whole
from .steps_seed import StepSeed, StepSizes, made_folder, make_seed, open_seed

CURVE = (
    "reward_mean", "accuracy", "step_score_mean", "answer_score_mean", "steps_mean",
    "completion_tokens_mean", "entropy", "equal_groups_share",
)  # fmt: skip
TOGETHER = 32  # questions sampled at a time


def run_steps(plan: Plan[StepSizes], say: Callable[[str], None] = print) -> Results:
    """Do what is missing of a plan. UserError for folders of other sizes."""
    results, missing = opened(plan, say)
    if missing:
        made_from = provenance() | {"command": plan.command}
        cold = sorted({s for _, s in missing if not made_folder(plan.work, s).exists()})
        jobs = [Job("run", s, a.name, plan.sizes.grpo_steps if a.kind == "grpo" else 0) for a, s in missing]
        with workers(plan.processes, do, plan.work, plan.sizes) as work:
            warm(work, cold, say)
            finish(work, jobs, plan, results, made_from, say)
    return results


def do(job: Job, work: Path, sizes: StepSizes) -> Record:
    """Do a job on one thread and return what is to be kept; `work` holds data, weights and logs."""
    torch.set_num_threads(1)
    begun, folder = time.process_time(), work / f"seed-{job.seed}"
    record: Record = {"arm": job.arm, "seed": job.seed}
    if job.kind == "warm start":
        whole(made_folder(work, job.seed), lambda part: make_seed(part, job.seed, sizes))
    else:
        with quiet_log(folder / job.arm) as log:
            record |= _run(job, open_seed(work, job.seed, sizes), sizes, log)
    return record | {"processor_seconds": time.process_time() - begun}


def _run(job: Job, seed: StepSeed, sizes: StepSizes, log: Logbook) -> Record:
    arm, model, tokenizer = STEP_ARMS[job.arm], copy.deepcopy(seed.policy), seed.processor.tokenizer
    config = replace(sizes.grpo(job.seed, log.out), grpo_steps=job.steps)
    if arm.kind == "grpo":
        chain = ChainOfStep(prm="its seed's", **arm.method)
        run_grpo(
            model, seed.train, tokenizer, config, log, name=STAGE, sampling=seed.sampling,
            method=replace(Method.of(config), reward="chain-of-step", chain=chain),
            reference=rc.PolicyReference(model), chains=ChainJudge(seed.prm, tokenizer, share=chain.share),
        )  # fmt: skip
    found = measure(model, seed, sizes, job.seed)
    metrics = log.out / "metrics.jsonl"
    lines = [line for _, line in read_json_lines(metrics)] if arm.kind == "grpo" else []
    return {
        "settings": {"kind": arm.kind, "method": dict(arm.method), "steps": job.steps},
        "questions": {"held_out": len(seed.test)},
        "figures": {"held_out": found, "prm": seed.figures},
        "curve": {key: [line[key] for line in lines] for key in CURVE if lines},
    }


def measure(model: Any, seed: StepSeed, sizes: StepSizes, number: int) -> dict[str, float]:
    """Means over completions of the held-out questions at temperature 1, with draws that all arms share.

    accuracy: right in all three words. true_steps: share of the steps that state what the video shows, as the
    world decides. words_found: share of the three words that some step states. prm_reward: with the paper's
    share of the steps. step_score: mean over steps. tokens, steps: of a completion. accuracy_greedy: decoded
    greedily.
    """
    sums = dict.fromkeys(("right", "true", "found", "steps", "score", "answer", "reward", "tokens", "n"), 0.0)
    watch, tokenizer = ChainJudge(seed.prm, seed.processor.tokenizer), seed.processor.tokenizer
    for made in _sampled(model, seed, sizes.eval_samples, 1.0, number):
        for prompt, group, judged in zip(
            made.prompts, made.groups, watch(made.inputs, made.groups), strict=True
        ):
            truth = truth_of(prompt.row)
            for ids, one in zip(group, judged, strict=True):
                text = tokenizer.decode(ids)
                words = [true_word(step, truth) for step in rc.parse_chain(text).steps]
                right = [word for word in words if word is not None]
                for name, value in {
                    "right": prompt.row.text_score(text), "true": len(right), "found": len(set(right)) / 3,
                    "steps": len(words), "score": sum(one.scores.steps), "answer": one.scores.answer or 0.0,
                    "reward": one.reward, "tokens": len(ids), "n": 1,
                }.items():  # fmt: skip
                    sums[name] += value
    n, steps = sums["n"], max(sums["steps"], 1)
    greedy = [
        made.prompts[p].row.text_score(tokenizer.decode(ids))
        for made in _sampled(model, seed, 1, 0.0, number)
        for ids, p in zip(made.completions, made.owner, strict=True)
    ]
    return {
        "accuracy": sums["right"] / n, "accuracy_greedy": sum(greedy) / len(greedy),
        "true_steps": sums["true"] / steps, "words_found": sums["found"] / n,
        "prm_reward": sums["reward"] / n, "step_score": sums["score"] / steps,
        "answer_score": sums["answer"] / n, "tokens": sums["tokens"] / n, "steps": sums["steps"] / n,
    }  # fmt: skip


def _sampled(model: Any, seed: StepSeed, samples: int, temperature: float, number: int) -> Iterator[Rollout]:
    """Completions of the held-out questions, some questions at a time."""
    model.eval()
    for first in range(0, len(seed.test), TOGETHER):
        some = seed.test[first : first + TOGETHER]
        places = [(EVALUATION, first + i) for i in range(len(some))]
        yield sample(
            model, some, group_size=samples, temperature=temperature,
            draws=draws(number, places, samples, ROOM) if temperature else None, **seed.sampling,
        )  # fmt: skip
