"""A round's first half: paths sampled for each question, scored, and its best put against its worst.

paths.jsonl      a line a question, as it is done: rewards and scores of its paths, the pair's token ids
pairs-N.jsonl    the rows of data file N that have a pair, with `chosen` and `rejected`, once all is done
pairs.json       how many questions had a pair, had none wide enough, or could not be used
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import ranks
from ..chain_judge import ChainJudge, Judged
from ..checkpoints.ranks import share
from ..errors import BadMedia, BadRow, UserError
from ..feed import CACHE_BYTES
from ..json_lines import append_json_lines, drop_torn_line, read_json_lines
from ..logbook import Logbook
from ..media.cache import FrameCache
from ..media.loader import MediaLoader
from ..models import Policy, load_policy
from ..prompts import Prompt, PromptBuilder
from ..rollout import draws, sample
from ..row_files import RowSource
from ..rows import Row
from ..sampler import RowSampler
from .config import DpoConfig
from .step import best_and_worst

SUMMARY = "pairs.json"
KINDS = ("pairs", "close", "no_answer", "left_out")


def pairs_of_round(
    config: DpoConfig, number: int, model: str, folder: Path, log: Logbook, device: torch.device
) -> dict[str, Any]:
    """Sample and pair what is not done yet; returns the counts, also in folder/pairs.json.

    model: the policy that is sampled. Questions without a pair are counted by reason: `close`, rewards
    closer than min_gap; `no_answer`, no path with an answer; `left_out`, a row or medium that cannot be used,
    of which `why` is the first one's reason. `too_long`: paths beyond the PRM's context, in no pair.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not share(lambda: (folder / SUMMARY).is_file()):
        training = config.training(model=model)
        source = RowSource.open(config.data, training.sampling)
        _sample_paths(config, number, model, folder, log, device, source)
        ranks.gather(None)  # all processes have written theirs
        share(lambda: _write_pairs(folder, source, round_rows(config, number, len(source))))
    found: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return found


def round_rows(config: DpoConfig, number: int, rows: int) -> list[int]:
    """Numbers of the rows of a round, from 1: all, or those that come next in a seeded order."""
    if config.rows == 0:
        return list(range(rows))
    sampler = RowSampler(rows, per_step=min(config.rows, rows), seed=config.seed)
    sampler.position = (number - 1) * sampler.per_step
    return list(dict.fromkeys(sampler.take()))  # an epoch's end may meet the next one's start


def _file(folder: Path, rank: int) -> Path:
    return folder / (f"paths-{rank}.jsonl" if rank else "paths.jsonl")


def _done(folder: Path, fingerprint: str) -> dict[int, dict[str, Any]]:
    """What earlier calls have done, by row. UserError for lines of other data."""
    found = dict[int, dict[str, Any]]()
    for file in sorted(folder.glob("paths*.jsonl")):
        for line, record in read_json_lines(file):
            if record.get("of") != fingerprint:
                raise UserError(f"{file}, line {line}: paths of other data; name another folder as `out`")
            found[int(record["row"])] = record
    return found


def _sample_paths(
    config: DpoConfig, number: int, model: str, folder: Path, log: Logbook, device: torch.device,
    source: RowSource,
) -> None:  # fmt: skip
    drop_torn_line(_file(folder, ranks.rank()))
    ranks.gather(None)  # all processes have: a torn line may read as a whole one
    done = ranks.gather(_done(folder, source.fingerprint).keys())[0]
    wanted = [n for n in round_rows(config, number, len(source)) if n not in done]
    mine = wanted[ranks.rank() :: ranks.size()]
    if not mine:
        return
    training = config.training(model=model, gradient_checkpointing=False, lora_rank=0)
    policy = load_policy(training, device)
    policy.model.eval()
    judge = ChainJudge.load(
        config.prm, policy.tokenizer, share=config.step_share, device=device, dtype=config.dtype,
        attention=config.attention, micro_tokens=config.micro_tokens,
    )  # fmt: skip
    room = policy.context - config.max_new_tokens
    builder = PromptBuilder.configured(policy.processor, training, max_length=room)
    cache = None if config.frame_cache is None else FrameCache(config.frame_cache, max_bytes=CACHE_BYTES)
    with (
        MediaLoader(workers=config.workers, cache=cache) as loader,
        log.stage(f"paths of round {number}", len(mine)) as stage,
    ):
        for first in range(0, len(mine), config.prompts):
            some = mine[first : first + config.prompts]
            lines = _lines(config, number, policy, judge, source, builder, loader, some)
            append_json_lines(_file(folder, ranks.rank()), [{"of": source.fingerprint} | x for x in lines])
            for line in lines:
                if line["kind"] == "left_out":
                    log.say(f"left out: {line['why']}")
            stage.advance(len(some))


def _lines(
    config: DpoConfig, number: int, policy: Policy, judge: ChainJudge, source: RowSource,
    builder: PromptBuilder, loader: MediaLoader, numbers: Sequence[int],
) -> list[dict[str, Any]]:  # fmt: skip
    """What is kept of some questions."""
    rows = [_row(source, n) for n in numbers]
    built = iter(builder.build([row for row in rows if isinstance(row, Row)], loader))
    made = [next(built) if isinstance(row, Row) else row for row in rows]
    lines = [
        {"row": n, "kind": "left_out", "why": str(x)}
        for n, x in zip(numbers, made, strict=True)
        if not isinstance(x, Prompt)
    ]
    if lines and config.on_bad_media == "fail":
        raise UserError(str(lines[0]["why"]))
    kept = [(n, x) for n, x in zip(numbers, made, strict=True) if isinstance(x, Prompt)]
    if not kept:
        return lines
    prompts = [x for _, x in kept]
    places = [(number, n) for n, _ in kept]
    rollout = sample(
        policy.model, prompts, group_size=config.paths, max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, eos=policy.eos, suppress=policy.suppress,
        draws=draws(config.seed, places, config.paths, config.max_new_tokens),
    )  # fmt: skip
    judged = judge(rollout.inputs, rollout.groups)
    for (n, prompt), group, scores in zip(kept, rollout.groups, judged, strict=True):
        line = {"row": n, "problem_id": prompt.row.problem_id}
        lines.append(line | _pair(policy, group, scores, config.min_gap))
    return lines


def _row(source: RowSource, number: int) -> Row | BadRow | BadMedia:
    try:
        return source[number]
    except BadRow as error:
        return error


def _pair(
    policy: Policy, group: Sequence[Sequence[int]], judged: Sequence[Judged], min_gap: float
) -> dict[str, Any]:
    scores = {
        "rewards": [one.reward for one in judged],
        "step_scores": [list(one.scores.steps) for one in judged],
        "answer_scores": [one.scores.answer for one in judged],
        "too_long": sum(not one.fits for one in judged),
    }
    found = best_and_worst(group, judged, min_gap)
    if found is None:
        answered = any(one.scores.answer is not None for one in judged)
        return scores | {"kind": "close" if answered else "no_answer"}
    chosen, rejected = (list(group[i]) for i in found)
    text = policy.tokenizer.decode
    return scores | {
        "kind": "pairs", "best": found[0], "worst": found[1], "chosen": chosen, "rejected": rejected,
        "chosen_text": text(chosen), "rejected_text": text(rejected),
    }  # fmt: skip


def _write_pairs(folder: Path, source: RowSource, rows: Sequence[int]) -> None:
    """The rows with a pair, a file for each file of the data; then the counts, the sign that all is there."""
    done = _done(folder, source.fingerprint)
    texts: list[list[str]] = [[] for _ in source.files]
    for number in rows:
        record = done[number]
        if record["kind"] != "pairs":
            continue
        file, within = source.where(number)
        row = file.raw(within) | {name: record[name] for name in ("problem_id", "chosen", "rejected")}
        gap = record["rewards"][record["best"]] - record["rewards"][record["worst"]]
        texts[source.files.index(file)].append(json.dumps(row | {"gap": gap}, ensure_ascii=False) + "\n")
    for i, lines in enumerate(texts):
        if lines:
            replace_text(folder / f"pairs-{i}.jsonl", "".join(lines))
    counts = Counter(done[number]["kind"] for number in rows)
    rewards = [r for n in rows for r in done[n].get("rewards", [])]
    mean = sum(rewards) / max(len(rewards), 1)
    summary = {
        "questions": len(rows),
        **{kind: counts[kind] for kind in KINDS},
        "reward_mean": mean,
        "too_long": sum(done[n].get("too_long", 0) for n in rows),
        "why": next((done[n]["why"] for n in rows if "why" in done[n]), None),
    }
    replace_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Write a file whole, or leave the one before."""
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
