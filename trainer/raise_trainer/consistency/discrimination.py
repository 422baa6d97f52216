"""Reward inside groups whose completions are all right: does it rank those whose chain supports the answer
first (the paper's Figure 2)?"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

import raise_core as rc
from raise_core.bonuses import consistency_bonus

from .confidence import Confidence
from .statistics import Clusters, Figure, Floats, Interval, auroc

REWARDS = ("0/1", "grpo-care", "rlpr", "scre")


@dataclass(frozen=True)
class Discrimination:
    """What one reward does in groups of two or more completions that are all right.

    groups: such groups in which the reward of every completion is known. mixed: those of them with chains
    that support the answer and chains that do not; pairs: of one and the other in the same group.
    auroc: share of pairs in which the supported one earns more, ties half. difference: mean reward of the
    supported ones less that of the others, in a group, averaged over mixed groups. spread: standard deviation
    (population) of the reward in a group, averaged over all groups.
    """

    groups: int
    mixed: int
    pairs: int
    auroc: Interval
    difference: Interval
    spread: Interval


def discrimination(
    reward: ArrayLike,
    support: ArrayLike,
    right: ArrayLike,
    group: Sequence[Hashable],
    video: Sequence[Hashable],
    *,
    known: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Discrimination:
    """Compare rewards within groups of N completions. Intervals are over whole videos.

    reward [N]: NaN leaves its group out. support [N] bool: the chain supports the answer. right [N] bool.
    group, video [N]: a group is of one video. known [N] bool: whether support is known (a judge may say
    nothing that can be read); others make no pairs. ValueError for other lengths.
    """
    values, flags, good = np.asarray(reward, np.float64), np.asarray(support, bool), np.asarray(right, bool)
    told = np.ones(len(values), bool) if known is None else np.asarray(known, bool)
    for name, given in (
        ("support", flags),
        ("right", good),
        ("known", told),
        ("group", group),
        ("video", video),
    ):
        if len(given) != len(values):
            raise ValueError(f"{name}: got {len(given)} values, wanted {len(values)}, as many as reward")
    members: dict[Hashable, list[int]] = {}
    for i, one in enumerate(group):
        members.setdefault(one, []).append(i)
    kept = [
        np.array(some)
        for some in members.values()
        if len(some) > 1 and good[some].all() and not np.isnan(values[some]).any()
    ]
    clusters = Clusters([video[some[0]] for some in kept], resamples=resamples, seed=seed)
    wins, pairs, gaps = (np.zeros(len(kept)) for _ in range(3))
    for g, some in enumerate(kept):
        read = some[told[some]]
        up, down = values[read[flags[read]]], values[read[~flags[read]]]
        pairs[g] = len(up) * len(down)
        if pairs[g]:
            wins[g] = pairs[g] * auroc(flags[read], values[read])
            gaps[g] = up.mean() - down.mean()
    mixed = pairs > 0
    spread = np.array([values[some].std() for some in kept])
    return Discrimination(
        groups=len(kept),
        mixed=int(mixed.sum()),
        pairs=int(pairs.sum()),
        auroc=clusters.interval(_ratio(wins, pairs)),
        difference=clusters.interval(_ratio(gaps, mixed.astype(np.float64))),
        spread=clusters.interval(_ratio(spread, np.ones(len(kept)))),
    )


def _ratio(above: Floats, below: Floats) -> Figure:
    def figure(weight: Floats) -> float:
        total = (weight * below).sum()
        return float((weight * above).sum() / total) if total else float("nan")

    return figure


def recorded_rewards(
    known: Sequence[Confidence], score: ArrayLike, group: Sequence[Hashable], is_gold: ArrayLike
) -> dict[str, Floats]:
    """REWARDS of N completions, each [N], from the recorded probabilities of their own answers' tokens.

    score [N] in [0, 1]. group [N]: the completions of one prompt share it. is_gold [N] bool: the answer's
    text is the solution's.

        0/1        score
        grpo-care  score + consistency_bonus of the group               raise_core.bonuses, its defaults
        rlpr       mean probability of the answer's tokens              raise_core.mean_prob, not debiased
        scre       score * scre of the answer's tokens                  raise_core.scre, its defaults

    NaN where a reward cannot be had: nothing is recorded; RLPR is of the solution's tokens, which are the
    answer's own only where both are one text; SCRE wants every token, and GRPO-CARE each answer of the group.
    """
    acc = torch.as_tensor(np.asarray(score, np.float64))
    numbers = {name: i for i, name in enumerate(dict.fromkeys(group))}
    member = np.array([numbers[name] for name in group], np.int64)
    # one token of the mean log-probability has the likelihood exp(mean) that the bonus compares
    means = [[] if c.answer is None else [math.log(c.answer) if c.answer else -math.inf] for c in known]
    care = acc + consistency_bonus(*_packed(means), acc, torch.from_numpy(member))
    incomplete = np.isin(member, member[[c.answer is None for c in known]])
    scre = acc * rc.scre(*_packed([c.logp or () for c in known]), impl="reference")
    rlpr = np.array([np.nan if c.mean_p is None else c.mean_p for c in known])
    return {
        "0/1": acc.numpy(),
        "grpo-care": np.where(incomplete, np.nan, care.numpy()),
        "rlpr": np.where(np.asarray(is_gold, bool), rlpr, np.nan),
        "scre": np.where([c.logp is not None for c in known], scre.numpy(), np.nan),
    }


def _packed(logp: Sequence[Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T] in fp64 and offsets [N+1]."""
    flat = torch.tensor([value for some in logp for value in some], dtype=torch.float64)
    return flat, torch.tensor([0, *(len(some) for some in logp)]).cumsum(0)
