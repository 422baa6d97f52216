"""Answers to figures: means by task, over questions and over tasks, with intervals that know of videos."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .answers import Answer, Key
from .load import Loaded

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95
CHUNK = 100  # resamples at a time
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """A mean in [0, 1] and its 95 % bootstrap interval over videos.

    No interval (None) where all questions are about one video, also those of one task.
    """

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """In per cent."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.1%}, {self.high:.1%}]"
        return f"{self.mean:.1%}{interval}"


@dataclass(frozen=True)
class TaskResult:
    """One line of the table. scores: mean over questions by scorer; votes: of the majority's answers."""

    task: str
    questions: int
    answered: float
    scores: dict[str, Estimate]
    votes: dict[str, Estimate]


@dataclass(frozen=True)
class Result:
    """A benchmark's figures.

    questions: rows of the files, all of which count. answered: share of answers that could be read. untagged:
    that came without an answer in a complete pair of tags. truncated: that ran into the limit.
    sample_mean: over questions, each the mean of its samples. macro_mean: over tasks, those of one group
    averaged first. votes, macro_votes: the same for the majority's answers; {} for one sample. unusable: what
    could not be asked, with the reasons; it scores 0.
    """

    bench: str
    title: str
    source: str
    samples: int
    questions: int
    videos: int
    answered: float
    untagged: float
    truncated: float
    sample_mean: dict[str, Estimate]
    macro_mean: dict[str, Estimate]
    votes: dict[str, Estimate]
    macro_votes: dict[str, Estimate]
    tasks: list[TaskResult]
    missing: tuple[str, ...]
    unusable: list[dict[str, str]]

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def majority(answers: Sequence[Answer]) -> Answer:
    """The answer that most samples agree on; among equals the one that came first.

    Samples agree by `Answer.vote`. Those that could not be read have no vote; if none could, it is the first.
    """
    counts = dict[str, int]()
    for answer in answers:
        if answer.vote:
            counts[answer.vote] = counts.get(answer.vote, 0) + 1
    if not counts:
        return answers[0]
    most = max(counts.values())
    winner = next(vote for vote, count in counts.items() if count == most)  # in order of first appearance
    return next(answer for answer in answers if answer.vote == winner)


def summarise(loaded: Loaded, answers: Mapping[Key, Answer], samples: int, scorers: Sequence[str]) -> Result:
    """The figures of a benchmark, from `samples` answers to each question. KeyError if one is missing."""
    given = [[answers[loaded.name, i.id, s] for s in range(samples)] for i in loaded.items]
    every = [answer for some in given for answer in some]
    tasks, videos = [some[0].task for some in given], [some[0].video for some in given]
    values = {s: np.array([np.mean([a.scores[s] for a in some]) for some in given]) for s in scorers}
    voted = {}
    if samples > 1:
        voted = {s: np.array([majority(some).scores[s] for some in given]) for s in scorers}
    group = loaded.benchmark.group
    means = {s: means_of(v, tasks, videos, group) for s, v in values.items()}
    vote_means = {s: means_of(v, tasks, videos, group) for s, v in voted.items()}
    unusable = {a.id: a for a in every if not a.usable}
    return Result(
        bench=loaded.name, title=loaded.benchmark.title, source=loaded.source, samples=samples,
        questions=len(given), videos=len(set(videos)), answered=_share(every, lambda a: a.vote != ""),
        untagged=_share(every, lambda a: a.usable and a.answer_p_min is None),
        truncated=_share(every, lambda a: a.truncated),
        sample_mean={s: m.sample for s, m in means.items()},
        macro_mean={s: m.macro for s, m in means.items()},
        votes={s: m.sample for s, m in vote_means.items()},
        macro_votes={s: m.macro for s, m in vote_means.items()},
        tasks=[
            TaskResult(
                task, tasks.count(task),
                _share([a for a in every if a.task == task], lambda a: a.vote != ""),
                {s: m.tasks[task] for s, m in means.items()},
                {s: m.tasks[task] for s, m in vote_means.items()},
            )
            for task in dict.fromkeys(tasks)
        ],
        missing=loaded.missing,
        unusable=[{"id": a.id, "reason": a.reason or "", "detail": a.detail} for a in unusable.values()],
    )  # fmt: skip


def _share(answers: Sequence[Answer], holds: Callable[[Answer], bool]) -> float:
    return sum(map(holds, answers)) / len(answers) if answers else 0.0


@dataclass(frozen=True)
class Means:
    """Over questions, over groups of tasks, and of each task."""

    sample: Estimate
    macro: Estimate
    tasks: dict[str, Estimate]


def means_of(
    values: Array,
    tasks: Sequence[str],
    videos: Sequence[str],
    group: Callable[[str], str] = str,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Means:
    """Means of values [Q] of questions, with percentile intervals from resampled videos.

    tasks, videos: of each question. Each resample draws as many videos as there are, with repeats, and all
    questions of a video come with it: they are not independent. A task or group that a resample does not meet
    is left out of that resample. Macro: the mean over groups of the mean of their tasks' means.
    """
    names, clusters = list(dict.fromkeys(tasks)), list(dict.fromkeys(videos))
    sums, counts = np.zeros((len(clusters), len(names))), np.zeros((len(clusters), len(names)))
    place = {v: i for i, v in enumerate(clusters)}
    for value, task, video in zip(values, tasks, videos, strict=True):
        sums[place[video], names.index(task)] += value
        counts[place[video], names.index(task)] += 1
    groups = [group(name) for name in names]
    whole = _figures(sums.sum(0)[None], counts.sum(0)[None], groups)[0]
    found = np.empty((0, whole.size))
    if len(clusters) > 1:
        source = np.random.default_rng(seed)
        parts = []
        for start in range(0, resamples, CHUNK):
            drawn = source.integers(0, len(clusters), (min(CHUNK, resamples - start), len(clusters)))
            weights = np.stack([np.bincount(d, minlength=len(clusters)) for d in drawn]).astype(float)
            parts.append(_figures(weights @ sums, weights @ counts, groups))
        found = np.concatenate(parts)
    videos_of = [len(clusters), len(clusters), *np.count_nonzero(counts, 0)]
    made = [
        _estimate(float(mean), column if n > 1 else column[:0])
        for mean, column, n in zip(whole, found.T, videos_of, strict=True)
    ]
    return Means(made[0], made[1], dict(zip(names, made[2:], strict=True)))


def _figures(sums: Array, counts: Array, groups: Sequence[str]) -> Array:
    """[R, 2 + K] from sums and counts [R, K] by task: sample mean, macro mean, each task's mean (or NaN)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        by_task = sums / counts
        sample = sums.sum(1) / counts.sum(1)
    kinds = list(dict.fromkeys(groups))
    member = np.array([[g == kind for g in groups] for kind in kinds], float)  # [groups, K]
    by_group = _mean_of_known(by_task, member)
    macro = _mean_of_known(by_group, np.ones((1, len(kinds))))
    return np.concatenate([sample[:, None], macro, by_task], 1)


def _mean_of_known(values: Array, member: Array) -> Array:
    """Of values [R, K] the mean over each row of member [G, K], NaN left out: [R, G]; NaN where all are."""
    known = (~np.isnan(values)).astype(float) @ member.T
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Array = np.nan_to_num(values) @ member.T / known
    return mean


def _estimate(mean: float, resampled: Array) -> Estimate:
    known = resampled[~np.isnan(resampled)]
    if not len(known):
        return Estimate(mean)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high))
