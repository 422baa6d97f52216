"""`raise-core train` and `raise-core sft`: a run that can be killed, and goes on where its checkpoint is."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import raise_core as rc

from . import ranks
from .adamw import adamw
from .chain_reward import judge_of
from .checkpoints import Checkpoints, StepGuard, TrainingState, graceful_stop, truncate_log
from .checkpoints.ranks import share
from .checkpoints.stopping import Stop
from .completions import show_completions, write_completions
from .engines import engine_of
from .errors import UserError
from .feed import Feed
from .grpo import Grpo, Phases
from .held_out import HeldOutRows
from .logbook import Logbook, Stage
from .loop import set_lr
from .memory import PeakMemory
from .method import Method
from .models import Policy, load_policy, reference_of
from .prompts import Prompt, target_ids
from .rollout import draws
from .sharded import check_launch, gathered, shard
from .trackers import Tracker, check_tracker
from .train_config import FREE, TrainConfig, as_yaml
from .update import sft_step

COMPLETIONS_EVERY = 10  # optimiser steps between completions that are kept
LOGS = ("metrics.jsonl", "completions.jsonl", "rows.jsonl")  # cut where a resumed run goes on


@dataclass
class Run:
    """What both kinds of training have: a model with its optimiser, data, folder and place in it."""

    config: TrainConfig
    policy: Policy
    optimizer: torch.optim.Optimizer
    feed: Feed
    guard: StepGuard
    log: Logbook
    state: TrainingState
    checkpoints: Checkpoints
    stop: Stop
    held_out: HeldOutRows | None
    memory: PeakMemory
    begun: float = 0.0  # of the step under way, on the performance counter
    evaluated: tuple[int, float] = (0, 0.0)  # finished steps at the last evaluation, and its mean text score

    def save(self) -> None:
        """A checkpoint of the finished steps, with the last evaluation's score if it was made just now."""
        step, metric = self.evaluated
        self.checkpoints.save(
            self.state,
            self.state.step,
            metric if step == self.state.step else None,
            logs=[path for name in LOGS if (path := self.log.out / name).exists()],
        )

    def evaluate(self) -> None:
        """Answer the evaluation rows and log the figures; nothing without evaluation data."""
        if self.held_out is None:
            return
        whole = gathered(self.policy.model)
        with self.log.stage("evaluate", len(self.held_out.source)) as stage, whole:
            figures = self.held_out.figures(stage.advance)
        self.log.write("evaluate", self.state.step - 1, **figures)
        self.evaluated = (self.state.step, figures["text_score_mean"])

    def steps(self, stage: Stage, per_round: int) -> Iterator[int]:
        """Finished steps before each round of `per_round`, until all are done or a signal came."""
        while self.state.step < self.config.steps and not self.stop.agreed():
            before = self.state.step
            set_lr(self.optimizer, self.config.lr, before, self.config.steps)
            self.begun = time.perf_counter()
            yield before
            self.state.step = before + per_round
            done = self.state.step >= self.config.steps
            if done or _due(before, self.state.step, self.config.eval_every):
                self.evaluate()
            if done or _due(before, self.state.step, self.config.save_every):
                self.save()
        if self.state.step < self.config.steps:
            self.save()
            self.log.say(f"{self.stop.signal}: stopped after step {self.state.step}; run again to go on")


def _due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` was passed; 0 is never."""
    return every > 0 and after // every > before // every


@contextmanager
def opened(
    config: TrainConfig,
    kind: str,
    *,
    with_reference: bool,
    accept_changes: bool = False,
    may_change: Sequence[str] = FREE,
) -> Iterator[tuple[Run, Any]]:
    """A new run, or one that goes on from its newest whole checkpoint. Also gives the reference, or None.

    accept_changes: go on although settings or data are not the checkpoint's; else that is ResumeRefused.
    may_change: settings that are not compared.
    """
    from accelerate import PartialState

    check_tracker(config.tracker)
    check_launch()
    processes = PartialState()
    device = processes.device
    log = Logbook(share(lambda: _folder(config)), silent=ranks.rank() > 0)
    torch.manual_seed(config.seed)
    with ExitStack() as stack:
        policy = load_policy(config, device)
        shard(policy.model)
        reference = reference_of(policy.model, config) if with_reference else None
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = adamw(trained, config.lr)
        check = (lambda row: None) if with_reference else partial(target_ids, tokenizer=policy.tokenizer)
        feed = stack.enter_context(Feed.open(config, policy, log, check))
        guard = StepGuard(log.out / "bad-steps", say=log.say)
        state = TrainingState(
            policy.model,
            optimizer,
            reference=reference,
            sampler=feed.sampler,
            others={"guard": guard},
            processor=policy.processor,
            config=config.model_dump(mode="json") | {"kind": kind},
            data=feed.fingerprint,
        )
        best = "max" if config.eval_data else None
        checkpoints = Checkpoints(log.out / "checkpoints", keep_best=best, say=log.say)
        on_change = "accept" if accept_changes else "refuse"
        resumed = checkpoints.resume(state, on_change=on_change, may_change=may_change)
        share(lambda: _write_settings(config, kind))  # a refused run leaves the settings of the one before
        for name in LOGS:
            share(partial(truncate_log, log.out / name, state.step))
        if resumed is not None:
            log.say(f"goes on after step {resumed.step} from {resumed.path}")
            for change in resumed.changes:
                log.say(f"changed since then: {change}")
        if config.tracker != "none" and not log.silent:
            settings = config.model_dump(mode="json")
            log.tracker = Tracker(config.tracker, log.out, settings, step=state.step, say=log.say)
            stack.callback(log.tracker.close)
        stop = stack.enter_context(graceful_stop())
        held_out = HeldOutRows(config, policy, feed.builder) if config.eval_data else None
        run = Run(
            config, policy, optimizer, feed, guard, log, state, checkpoints, stop, held_out,
            PeakMemory(device),
        )  # fmt: skip
        yield run, reference


OWN = ("config.yaml", "checkpoints", "metrics.jsonl", "timings.jsonl", "quarantine.jsonl")


def _folder(config: TrainConfig) -> Path:
    """The run's folder. UserError when it holds something that is no run, or cannot be written."""
    out = config.out
    try:
        if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in OWN):
            raise UserError(f"out {out}: holds something that is no run; name another folder")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {out}: cannot be written ({error.strerror}); name another folder") from None
    return out


def _write_settings(config: TrainConfig, kind: str) -> None:
    try:
        text = f"# raise-core {kind}\n{as_yaml(config)}"
        (config.out / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"out {config.out}: cannot be written ({error.strerror}); name another folder"
        ) from None


def run_train(config: TrainConfig, *, accept_changes: bool = False) -> Path:
    """GRPO; returns the run's folder. UserError, first of all, for settings that do not go together."""
    method = Method.of(config)
    with opened(config, "train", with_reference=True, accept_changes=accept_changes) as (run, reference):
        policy, phases = run.policy, Phases()
        engine = engine_of(
            config.engine, policy.model, method, path=config.model, eos=policy.eos, suppress=policy.suppress
        )
        grpo = Grpo(
            policy.model, reference, run.optimizer, policy.tokenizer, method, eos=policy.eos,
            suppress=policy.suppress, guard=run.guard, phases=phases, engine=engine,
            judge=judge_of(method, policy.tokenizer, policy.model, dtype=config.dtype),
        )  # fmt: skip
        with closing(engine), run.log.stage("train", config.steps, done=run.state.step) as stage:
            for step in run.steps(stage, config.updates):
                ask = partial(_ask, run, phases, step, run.feed.sampler.position)
                made = grpo.step(*ask(), step, more=ask)
                if not run.log.silent and (step == 0 or _due(step, step + config.updates, COMPLETIONS_EVERY)):
                    kept = write_completions(run.log.out, step, made, policy.tokenizer)
                    if run.log.may_show_completions():
                        show_completions(run.log, kept)
                tokens = sum(map(len, made.rollout.completions))
                report_step(run, stage, phases, step, made.figures, config.updates, tokens)
        return run.log.out


def _ask(
    run: Run, phases: Phases, step: int, begun: int, count: int | None = None
) -> tuple[list[Prompt], torch.Tensor]:
    """This process's share of the step's next prompts, with their draws. begun: its place before the step."""
    with phases("decode"):
        places, prompts = run.feed.take(step, count, first=run.feed.sampler.position - begun)
    config = run.config
    return prompts, draws(config.seed, places, config.group_size, config.max_new_tokens)


def run_sft(config: TrainConfig, *, accept_changes: bool = False) -> Path:
    """Supervised warm start on each row's chain and solution; returns the run's folder."""
    with opened(config, "sft", with_reference=False, accept_changes=accept_changes) as (run, _):
        scorer, phases = rc.Scorer(run.policy.model, max_tokens=config.micro_tokens), Phases()
        run.policy.model.train()
        with run.log.stage("sft", config.steps, done=run.state.step) as stage:
            for step in run.steps(stage, 1):
                with phases("decode"):
                    _, prompts = run.feed.take(step)
                targets = [target_ids(p.row, run.policy.tokenizer) for p in prompts]
                with phases("update"):
                    figures = sft_step(
                        scorer, run.optimizer, [p.inputs for p in prompts], targets,
                        micro_tokens=config.micro_tokens, guard=run.guard, step=step,
                    )  # fmt: skip
                report_step(run, stage, phases, step, figures, 1, sum(map(len, targets)))
        return run.log.out


def report_step(
    run: Run, stage: Stage, phases: Phases, step: int, figures: dict[str, float], steps: int, tokens: int
) -> None:
    """A line of metrics.jsonl, timings.jsonl and rows.jsonl; the bar moves. All processes call it.

    step: finished optimiser steps before this one; steps: how many it was. figures: the same on all
    processes; `epoch` and `left_out` are added to them. tokens: of this process.
    """
    every = ranks.gather((tokens, *run.feed.drain()))
    seconds = time.perf_counter() - run.begun
    counters = run.state.counters
    counters["left_out"] = counters.get("left_out", 0) + sum(len(out) for _, _, out in every)
    figures |= {"epoch": run.feed.sampler.epoch, "left_out": float(counters["left_out"])}
    costs = {"tokens_per_s": sum(t for t, _, _ in every) / seconds, "peak_gib": run.memory.take()}
    run.log.rows(step, [n for _, used, _ in every for n in used], [n for _, _, out in every for n in out])
    run.log.write("train", step, **figures)
    run.log.time("step", step=step, **phases.take(), **costs)
    shown = {k: figures[k] for k in ("reward_mean", "text_score_mean", "loss") if k in figures}
    stage.advance(steps, **shown, **{"tok/s": costs["tokens_per_s"], "GiB": costs["peak_gib"]})
