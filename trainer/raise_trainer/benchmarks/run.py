"""`raise-core eval`: ask a model every question of some benchmarks; killed and run again, it goes on."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console

import raise_core as rc

from .. import ranks
from ..checkpoints.ranks import share
from ..errors import BadMedia, BadRow, UserError
from ..logbook import Logbook
from ..media.loader import MediaLoader
from ..media.sampling import Sampling
from ..media.video import Request
from ..models import Policy, load_policy
from ..prompts import Prompt, PromptBuilder
from ..rollout import draws, sample
from ..rows import Row
from ..train_config import check
from .answers import Answer, AnswerFile, Key, check_settings, read_answers
from .clips import DECODE, ClipRequest
from .load import Item, Loaded, load
from .questions import Question
from .results import Result, summarise
from .scoring import grade
from .settings import SCORERS, EvalSettings
from .stamps import model_stamp, template_stamp

WAIT = timedelta(days=2)  # processes with little to do wait for the others; by default they give up soon
DECODE_SECONDS = 600.0  # of a video: an hour of it on a busy disk takes minutes, and would count as broken


class QuestionPrompts(PromptBuilder):
    """Prompts of questions; of a question with a clip only that part of the video is asked for."""

    def request(self, row: Row) -> Request | None:
        """See `PromptBuilder.request`."""
        found = super().request(row)
        if found is not None and isinstance(row, Question) and row.clip is not None:
            return ClipRequest(found.path, found.sampling, found.kind, found.decoder, row.clip)
        return found


@dataclass(frozen=True)
class Pending:
    """A question, and which of its samples are still to be taken."""

    item: Item
    samples: tuple[int, ...]


def evaluate(settings: EvalSettings, console: Console | None = None) -> list[Result]:
    """Ask what has no answer yet, then score everything asked for; results by benchmark, on every process.

    Run by several processes (`accelerate launch`, `torchrun`) each asks its own share. UserError where the
    settings, the files or the folder cannot be used.
    """
    from accelerate import PartialState

    device = PartialState(timeout=WAIT).device
    loaded = [load(n, settings.data, source=settings.source, limit=settings.limit) for n in settings.bench]
    share(lambda: check_settings(settings.out, _made_by(settings, loaded)))
    log = Logbook(settings.out, console, silent=ranks.rank() > 0)
    for one in loaded:
        if one.missing:
            log.say(f"{one.name}: no file for {', '.join(one.missing)}; these are not in its means")
    file = AnswerFile(settings.out, ranks.rank())
    ranks.gather(None)  # no file is read before each process has cut off its torn line
    pending = find_pending(settings, loaded, read_answers(settings.out))
    ranks.gather(None)
    mine = pending[ranks.rank() :: ranks.size()]
    total = sum(len(p.samples) for p in pending)
    log.say(f"{sum(len(one.items) for one in loaded)} questions, {total} answers to take")
    if mine:
        ask(settings, mine, file, log, device)
    ranks.gather(None)
    answers = graded_anew(loaded, read_answers(settings.out))
    return [summarise(one, answers, settings.samples, SCORERS[settings.scorer]) for one in loaded]


def graded_anew(loaded: Sequence[Loaded], answers: dict[Key, Answer]) -> dict[Key, Answer]:
    """The answers, their outputs scored by the rules of today: an earlier version wrote by its own."""
    items = {(one.name, item.id): item for one in loaded for item in one.items if isinstance(item, Question)}
    found = dict[Key, Answer]()
    for key, answer in answers.items():
        item = items.get(key[:2])
        found[key] = replace(answer, **vars(grade(item, answer.text))) if item and answer.usable else answer
    return found


def _made_by(settings: EvalSettings, loaded: Sequence[Loaded]) -> dict[str, Any]:
    files = {one.name: [one.source, one.fingerprint] for one in loaded}
    stamps = {"model_files": model_stamp(settings.model), "template_text": template_stamp(settings.template)}
    return settings.made_by(files) | stamps


def find_pending(
    settings: EvalSettings, loaded: Sequence[Loaded], answers: dict[Key, Answer]
) -> list[Pending]:
    """Every question with samples that have no answer; with `retry` also those that could not be asked."""
    done = {key for key, answer in answers.items() if answer.usable or not settings.retry}
    found = list[Pending]()
    for one in loaded:
        for item in one.items:
            missing = tuple(s for s in range(settings.samples) if (one.name, item.id, s) not in done)
            if missing:
                found.append(Pending(item, missing))
    return found


def ask(
    settings: EvalSettings, pending: Sequence[Pending], file: AnswerFile, log: Logbook, device: torch.device
) -> None:
    """Take the missing answers and append them, a batch at a time."""
    policy = _policy(settings, device)
    context = policy.context
    room = context - settings.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-new-tokens {settings.max_new_tokens}: the model's context is {context} tokens, and a "
            "prompt needs some of them; give fewer"
        )
    sampling = Sampling(
        frames=settings.frames, min_pixels=min(16 * 28 * 28, settings.pixels), max_pixels=settings.pixels
    )
    builder = QuestionPrompts(
        policy.processor, max_length=room, sampling=sampling, template=settings.template
    )
    batches = list(_batches(pending, settings.batch))
    total = sum(len(p.samples) for p in pending)
    with (
        MediaLoader(workers=settings.workers, decode=DECODE, timeout_s=DECODE_SECONDS) as loader,
        log.stage("evaluate", total) as stage,
    ):
        for number, batch in enumerate(batches, 1):
            made = _build(builder, loader, batch)
            loader.prefetch(
                _requests(builder, [p for coming in batches[number : number + 1] for p in coming])
            )
            file.append(_answers(settings, policy, batch, made))
            stage.advance(sum(len(p.samples) for p in batch))


def _policy(settings: EvalSettings, device: torch.device) -> Policy:
    config = check(
        {
            "model": settings.model, "data": settings.data, "out": settings.out, "dtype": settings.dtype,
            "attention": settings.attention, "gradient_checkpointing": False,
        }
    )  # fmt: skip
    policy = load_policy(config, device)
    policy.model.eval()
    return policy


def _batches(pending: Sequence[Pending], batch: int) -> Iterator[list[Pending]]:
    """Questions that miss the same samples, so many that about `batch` completions grow side by side."""
    some = list[Pending]()
    for one in sorted(pending, key=lambda p: p.samples):  # stable: in order where all miss the same
        if some and (one.samples != some[0].samples or (len(some) + 1) * len(one.samples) > batch):
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _build(
    builder: QuestionPrompts, loader: MediaLoader, batch: Sequence[Pending]
) -> list[Prompt | BadRow | BadMedia]:
    """The prompt of each, or why there is none."""
    made = iter(builder.build([p.item for p in batch if isinstance(p.item, Question)], loader))
    return [next(made) if isinstance(p.item, Question) else BadRow(p.item.reason) for p in batch]


def _requests(builder: QuestionPrompts, batch: Sequence[Pending]) -> Iterator[Request]:
    for one in batch:
        if isinstance(one.item, Question):
            try:
                request = builder.request(one.item)
            except BadRow:
                continue
            if request is not None:
                yield request


def _answers(
    settings: EvalSettings, policy: Policy, batch: Sequence[Pending], made: Sequence[Any]
) -> Iterator[Answer]:
    """An answer for each sample of each question, those that cannot be asked first."""
    for one, found in zip(batch, made, strict=True):
        if not isinstance(found, Prompt):
            yield from (_unusable(one.item, s, found) for s in one.samples)
    asked = [one for one, found in zip(batch, made, strict=True) if isinstance(found, Prompt)]
    prompts = [found for found in made if isinstance(found, Prompt)]
    if not asked:
        return
    samples = asked[0].samples  # of the whole batch
    places = [(zlib.crc32(one.item.bench.encode()), one.item.number) for one in asked]
    taken = None
    if settings.temperature:
        every = draws(settings.seed, places, settings.samples, settings.max_new_tokens)
        taken = every.view(len(asked), settings.samples, -1)[:, list(samples)].flatten(0, 1)
    rollout = sample(
        policy.model, prompts, group_size=len(samples), max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature, eos=policy.eos, suppress=policy.suppress, draws=taken,
    )  # fmt: skip
    for b, (ids, logp) in enumerate(zip(rollout.completions, rollout.logp, strict=True)):
        item = asked[b // len(samples)].item
        assert isinstance(item, Question)
        yield _answer(item, samples[b % len(samples)], ids, logp, policy)


def _unusable(item: Item, number: int, error: BadRow | BadMedia) -> Answer:
    row = item if isinstance(item, Question) else None
    return Answer(
        bench=item.bench, id=item.id, sample=number, task=item.task, video=item.video,
        problem_type=row.problem_type if row else "", question=row.question if row else "",
        solution=row.solution if row else "", text="", prediction="", vote="",
        reason="bad_media" if isinstance(error, BadMedia) else "bad_row", detail=str(error),
        scores={name: 0.0 for name in SCORERS["both"]}, tokens=0, truncated=False,
    )  # fmt: skip


def _answer(item: Question, number: int, ids: Sequence[int], logp: torch.Tensor, policy: Policy) -> Answer:
    """The record of one completion; logp [L] of its tokens, nats."""
    ended = bool(ids) and ids[-1] in policy.eos
    text = policy.tokenizer.decode(ids[:-1] if ended else ids)
    (span,) = rc.find_answer_spans([list(ids)], policy.tokenizer)
    graded = grade(item, text)
    of_answer = logp[span.start : span.stop].double() if span.reason is None else None
    return Answer(
        bench=item.bench, id=item.id, sample=number, task=item.task, video=item.video,
        problem_type=item.problem_type, question=item.question, solution=item.solution, text=text,
        prediction=graded.prediction, vote=graded.vote, reason=graded.reason, detail="",
        scores=graded.scores, tokens=len(ids), truncated=not ended,
        answer_p_mean=None if of_answer is None else float(of_answer.exp().mean()),
        answer_p_min=None if of_answer is None else float(of_answer.exp().min()),
        answer_logp_mean=None if of_answer is None else float(of_answer.mean()),
        answer_logp=None if of_answer is None else of_answer.tolist(),
        sequence_logp_mean=float(logp.double().mean()) if len(logp) else None,
    )  # fmt: skip
