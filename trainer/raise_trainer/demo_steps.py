"""`raise-core demo-steps`: a tiny video model learns to reason in steps, a PRM to judge them; search; DPO."""

import copy
import json
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import raise_core as rc
from raise_core.spans import STEP_CLOSE

from . import tiny
from .chain_judge import ChainJudge
from .chain_tokens import add_chain_tokens
from .config import DemoConfig
from .data import Refused, load_rows
from .demo import check_device, open_run, save_model
from .demo_prm import TOGETHER, Lesson, lessons, own_lessons, own_rates, train_prm
from .dpo.step import Pair, best_and_worst, dpo_step
from .errors import UserError
from .evaluate import judge as right_and_match
from .logbook import Logbook
from .loop import Supervised, _adamw, _batches, run_sft, set_lr
from .prompts import Prompt, PromptBuilder, target_ids
from .rollout import draws, sample
from .rows import Row
from .search.beam import Generation
from .search.figure import draw_curves
from .search.questions import search_questions
from .search.votes import TITLES, curves
from .step_world import write_step_dataset
from .steps_config import SMOKE, StepsConfig

ROOM = 112  # longest completion, in tokens


@dataclass(frozen=True)
class World:
    """The demo's data, ready for a model."""

    processor: Any
    model: Any
    looked: list[Supervised]
    supervised: list[Supervised]
    train: list[Prompt]
    test: list[Prompt]
    lessons: list[Lesson]


def run_demo_steps(config: StepsConfig) -> Path:
    """The whole job; returns the run's folder: metrics.jsonl, search.svg, pairs, models."""
    if config.smoke:
        config = replace(config, **SMOKE)
    check_device(config.device)
    open_run(config.out)
    torch.set_num_threads(config.threads)
    log = Logbook(config.out)
    text = json.dumps(asdict(config) | {"torch": torch.__version__}, indent=1, default=str)
    (config.out / "config.json").write_text(text, encoding="utf-8")
    try:
        data = prepare(config, log)
    except UserError:
        shutil.rmtree(config.out)
        raise
    policy, prm = learned(data, config, log)
    tokenizer = data.processor.tokenizer
    prm.eval().requires_grad_(False)
    judge = ChainJudge(prm, tokenizer)
    log.write("prm", config.prm_steps, **prm_figures(judge, data, policy, config, log))
    records = _search(policy, judge, data, config, log)
    rows = [_stage_figures("warm start", records)]
    log.write("evaluate", 0, **rows[0])
    start = {k: v.clone() for k, v in policy.state_dict().items()}
    for number in range(1, config.rounds + 1):
        pairs = _pairs(policy, judge, data, config, log, number)
        policy.load_state_dict(start)
        if pairs:
            _train_dpo(policy, pairs, config, log, number)
        found = _records(policy, judge, data, config, (config.samples,), log, f"round {number}", beams=False)
        rows.append(_stage_figures(f"DPO round {number}", found))
        log.write("evaluate", number, **rows[-1])
    save_model(policy, data.processor, config.out / "dpo")
    names = [name for name in rows[0] if name != "model"]
    log.table(
        f"{len(data.test)} unseen videos: {max(config.n)} samples each, then {config.samples}", ["", *names],
        [[row["model"], *(f"{row[name]:.3f}" for name in names)] for row in rows],
    )  # fmt: skip
    log.time("run", seconds=log.seconds)
    log.say(f"{log.seconds:.0f} s. Figure: {config.out / 'search.svg'}")
    return config.out


def learned(data: World, config: StepsConfig, log: Logbook) -> tuple[Any, Any]:
    """The warm-started policy, and the PRM that begins as it; both are saved. Those of `start` go on."""
    start = config.start
    policy = data.model if start is None else _loaded(start / "sft", data.model)
    words = DemoConfig(seed=config.seed, warm_batch=config.look_batch, warm_lr=config.lr)
    run_sft(policy, data.looked, words, log, name="look", steps=config.look_steps)
    words = replace(words, warm_batch=config.batch, warm_lr=config.lr / 2)
    run_sft(policy, data.supervised, words, log, name="warm start", steps=config.warm_steps)
    save_model(policy, data.processor, config.out / "sft")
    has_prm = start is not None and (start / "prm").is_dir()
    prm = _loaded(start / "prm", policy) if start is not None and has_prm else copy.deepcopy(policy)
    if config.prm_steps:
        own = own_lessons(_generation(policy, data, config), data.train, config, log)
        train_prm(prm, data.processor.tokenizer, [*data.lessons, *own], config, log)
    save_model(prm, data.processor, config.out / "prm")
    return policy, prm


def _loaded(folder: Path, like: Any) -> Any:
    try:
        return type(like).from_pretrained(folder).to(like.device)
    except OSError:
        raise UserError(
            f"--start {folder.parent}: holds no {folder.name}; name the folder of a run"
        ) from None


def prepare(config: StepsConfig, log: Logbook) -> World:
    """Write the data folder under `config.out`, decode every video once, and begin a model."""
    root = config.out / "data"
    with log.stage("write videos", config.train_videos + config.test_videos) as stage:
        write_step_dataset(
            root, train_videos=config.train_videos, test_videos=config.test_videos, seed=config.seed,
            advance=stage.advance,
        )  # fmt: skip
    processor = tiny.build_processor()
    model = tiny.build_model(processor, seed=config.seed)
    add_chain_tokens(model, processor.tokenizer)
    builder = PromptBuilder(processor, frames=config.frames, max_length=tiny.CONTEXT - 2 * ROOM)
    tokenizer, refused = processor.tokenizer, Refused()
    made: dict[str, list[Prompt]] = {}
    rows = {n: load_rows(root / f"{n}.json", root, on_bad="fail", refused=refused)
            for n in ("train", "test", "sft", "prm")}  # fmt: skip
    with log.stage("decode videos", sum(map(len, rows.values()))) as stage:
        for name, some in rows.items():
            made[name] = []
            for row in some:
                made[name].append(builder(row))
                stage.advance()
    supervised = [Supervised(p, target_ids(p.row, tokenizer)) for p in made["sft"]]
    longest = max(len(s.target) for s in supervised)
    if longest > ROOM:
        raise UserError(f"a chain has {longest} tokens, the demo leaves {ROOM}")
    looked = [Supervised(p, _answer_ids(p.row, tokenizer)) for p in made["train"]]
    return World(
        processor, model.to(config.device), looked, supervised, made["train"], made["test"],
        lessons(made["prm"], tokenizer),
    )  # fmt: skip


def _answer_ids(row: Row, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(row.solution, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def _generation(policy: Any, data: World, config: StepsConfig) -> Generation:
    tokenizer = data.processor.tokenizer
    return Generation(
        policy, tokenizer, ROOM, [tokenizer.eos_token_id],
        tokenizer.convert_tokens_to_ids(list(tiny.MEDIA)),
        tokenizer.convert_tokens_to_ids(STEP_CLOSE), seed=config.seed,
    )  # fmt: skip


def _right(row: Row, text: str) -> float:
    """1 for a description right in colour, shape and direction, else 0."""
    return float(right_and_match(row, text)[0])


def _records(
    policy: Any,
    judge: ChainJudge,
    data: World,
    config: StepsConfig,
    n: tuple[int, ...],
    log: Logbook,
    name: str,
    *,
    beams: bool = True,
) -> list[dict[str, Any]]:
    policy.eval()
    how, records = _generation(policy, data, config), list[dict[str, Any]]()
    with log.stage(f"search {name}", len(data.test)) as stage:
        for first in range(0, len(data.test), TOGETHER):
            some = data.test[first : first + TOGETHER]
            numbers = range(first, first + len(some))
            records += search_questions(
                how, judge, some, numbers, n, keep=config.keep, beams=beams, value=_right
            )
            stage.advance(len(some))
    return records


def _search(
    policy: Any, judge: ChainJudge, data: World, config: StepsConfig, log: Logbook
) -> list[dict[str, Any]]:
    """Accuracy of the warm-started policy against N, as lines, a table and a figure."""
    records = _records(policy, judge, data, config, config.n, log, "warm start")
    points = curves(records, config.n)
    with (config.out / "search.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(point) + "\n" for point in points)
    by = {(p["method"], p["n"]): p["accuracy"] for p in points}
    log.table(
        "accuracy by number of samples", ["N", *map(str, config.n)],
        [[title, *(f"{by[m, n]:.3f}" for n in config.n)] for m, title in TITLES.items()],
    )  # fmt: skip
    draw_curves(points, config.out / "search.svg")
    return records


def _stage_figures(name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    every = [s for r in records for s in r["samples"]]
    steps = [x for s in every for x in s["step_scores"]]
    return {
        "model": name,
        "accuracy": sum(s["value"] for s in every) / len(every),
        "prm_reward": sum(s["reward"] for s in every) / len(every),
        "step_score": sum(steps) / max(len(steps), 1),
        "answered": sum(s["key"] is not None for s in every) / len(every),
        "tokens": sum(s["tokens"] for s in every) / len(every),
    }


def prm_figures(
    judge: ChainJudge, data: World, policy: Any, config: StepsConfig, log: Logbook
) -> dict[str, float]:
    """How often the PRM is on the right side of 0.5 for the policy's own chains of unseen videos."""
    return own_rates(judge.scorer, own_lessons(_generation(policy, data, config), data.test, config, log))


def _pairs(
    policy: Any, judge: ChainJudge, data: World, config: StepsConfig, log: Logbook, number: int
) -> list[Pair]:
    """Best against worst of each question's paths; kept in pairs-N.jsonl with their rewards."""
    policy.eval()
    how = _generation(policy, data, config)
    chosen = random.Random(f"{config.seed} round {number}").sample(
        range(len(data.train)), min(config.questions, len(data.train))
    )
    pairs, lines = list[Pair](), list[dict[str, Any]]()
    with log.stage(f"paths {number}", len(chosen)) as stage:
        for first in range(0, len(chosen), TOGETHER):
            some = [data.train[i] for i in chosen[first : first + TOGETHER]]
            places = [(number, i) for i in chosen[first : first + TOGETHER]]
            made = sample(
                policy, some, group_size=config.paths, max_new_tokens=ROOM, temperature=1.0, eos=how.eos,
                suppress=how.suppress, draws=draws(config.seed + 1, places, config.paths, ROOM),
            )  # fmt: skip
            for prompt, group, scores in zip(some, made.groups, judge(made.inputs, made.groups), strict=True):
                found = best_and_worst(group, scores, config.min_gap)
                line = {"problem_id": prompt.row.problem_id, "rewards": [s.reward for s in scores]}
                if found is not None:
                    high, low = found
                    pairs.append(Pair(prompt.inputs, group[high], group[low]))
                    line |= {"chosen": how.tokenizer.decode(group[high]),
                             "rejected": how.tokenizer.decode(group[low])}  # fmt: skip
                lines.append(line)
            stage.advance(len(some))
    with (config.out / f"pairs-{number}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    log.write("pairs", number, questions=len(chosen), pairs=len(pairs))
    log.say(f"round {number}: {len(pairs)} pairs of {len(chosen)} questions")
    return pairs


def _train_dpo(policy: Any, pairs: list[Pair], config: StepsConfig, log: Logbook, number: int) -> None:
    """From the warm start again, which is the reference too."""
    policy.train()
    reference = rc.FrozenReference(policy)
    scorer, confidant = rc.Scorer(policy), rc.Scorer(reference.model)
    optimizer = _adamw(policy, config.dpo_lr)
    batches = _batches(pairs, config.dpo_batch, random.Random(f"{config.seed} dpo {number}"))
    steps = max(len(pairs) * config.epochs // config.dpo_batch, 1)
    with log.stage(f"dpo {number}", steps) as stage:
        for step in range(steps):
            set_lr(optimizer, config.dpo_lr, step, steps)
            figures = dpo_step(
                scorer, confidant, reference, optimizer, next(batches), beta=config.beta,
                nll_weight=config.nll_weight,
            )  # fmt: skip
            log.write(f"dpo {number}", step, **figures)
            stage.advance(loss=figures["loss"], acc=figures["accuracy"], margin=figures["margin"])
