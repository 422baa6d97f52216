"""Put the chains to a judge and compare what it answers: the paper's Answer and Match."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raise_core.tags import Reason, answer_in

from ..errors import BadRow, UserError
from ..logbook import Logbook
from .judges import Judge, judge_prompt
from .match import THRESHOLD, Disagreement, disagreement, score_of
from .records import Answer
from .statistics import Clusters, Interval, mean_figure

JudgeReason = Reason | Literal["no_chain", "not_asked"]
MatchReason = Literal["unanswered", "no_chain", "not_asked", "judge_unanswered"] | Disagreement


@dataclass(frozen=True)
class Judged:
    """An answer and what the judge makes of its chain.

    answer: the judge's, "" without one. reason: why it has none: no_chain (there was nothing to put),
    not_asked (the judge cannot read the prompt: too long, control tokens), or that of the tags in its reply.
    score: of its answer against the solution, 0 without one. match: both answers agree. why: they do not; the
    first that holds of unanswered (the original), no_chain, not_asked, judge_unanswered (a reply without an
    answer), unreadable, judge_unreadable, differs.
    """

    of: Answer
    answer: str
    reason: JudgeReason | None
    score: float
    match: bool
    why: MatchReason | None

    @property
    def known(self) -> bool:
        """Whether the judge said what the chain leads to: a missing chain leads to nothing."""
        return self.why not in ("not_asked", "judge_unanswered", "judge_unreadable")


def ask_judge(answers: Sequence[Answer], judge: Judge, log: Logbook) -> tuple[dict[str, str], dict[str, str]]:
    """Replies by prompt, and why prompts could not be put. Each prompt is put once, and never again.

    The bar has the time left of those that are not in the judge's cache. UserError when not one could be put.
    """
    prompts = list(dict.fromkeys(judge_prompt(a.row, a.chain) for a in answers if a.row and a.chain))
    known = {prompt: judge.cache.get(judge.name(prompt)) for prompt in prompts}
    replies = {prompt: reply for prompt, reply in known.items() if reply is not None}
    refused = dict[str, str]()
    with log.stage("judge", len(prompts), done=len(replies)) as stage:
        for prompt, reply in judge.ask([prompt for prompt in prompts if prompt not in replies]):
            if isinstance(reply, BadRow):
                refused[prompt] = str(reply)
            else:
                replies[prompt] = reply
            stage.advance()
    if refused and not replies:
        raise UserError(
            f"the judge can take none of the {len(refused)} prompts: {next(iter(refused.values()))}; mend "
            "that, ask for fewer --max-new-tokens, or name another judge"
        )
    return replies, refused


def judged(
    answer: Answer, replies: dict[str, str], refused: dict[str, str], *, threshold: float = THRESHOLD
) -> Judged:
    """Compare an answer with the judge's reply to its chain. Nothing is guessed from a reply without tags."""
    if answer.row is None or not answer.chain:
        return Judged(answer, "", "no_chain", 0.0, False, "no_chain" if answer.answer else "unanswered")
    prompt = judge_prompt(answer.row, answer.chain)
    if prompt in refused:
        return Judged(answer, "", "not_asked", 0.0, False, "not_asked" if answer.answer else "unanswered")
    said, missing = answer_in(replies[prompt])
    score = 0.0 if missing else score_of(answer.row, f"<answer>{said}</answer>")
    why: MatchReason | None
    if not answer.answer:
        why = "unanswered"
    elif missing:
        why = "judge_unanswered"
    else:
        why = disagreement(answer.row, answer.answer, said, threshold=threshold)
    return Judged(answer, said, missing, score, why is None, why)


@dataclass(frozen=True)
class Consistency:
    """Figures of some answers, unanswered ones among them.

    accuracy: mean score of the answers. answer: mean score of the judge's (the paper's Answer). match: share
    that agree (its Match). why, reasons: how often each reason of no match, and of no judge's answer.
    """

    kind: str
    answers: int
    accuracy: Interval
    answer: Interval
    match: Interval
    why: dict[str, int]
    reasons: dict[str, int]


def consistency(kind: str, some: Sequence[Judged], *, resamples: int = 1000, seed: int = 0) -> Consistency:
    """The figures of judged answers, one or more, with intervals over whole videos."""
    clusters = Clusters([j.of.video for j in some], resamples=resamples, seed=seed)

    def mean(values: Sequence[Any]) -> Interval:
        return clusters.interval(mean_figure(np.array(values, np.float64)))

    return Consistency(
        kind=kind,
        answers=len(some),
        accuracy=mean([j.of.score for j in some]),
        answer=mean([j.score for j in some]),
        match=mean([j.match for j in some]),
        why=dict(Counter(j.why for j in some if j.why)),
        reasons=dict(Counter(j.reason for j in some if j.reason)),
    )
