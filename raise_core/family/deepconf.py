"""DeepConf (arXiv 2508.15260): confidence of a response's least certain passages, vote and early stop.

A token's confidence is C_t = -mean of its k = 20 largest log-probabilities (nats, larger = more peaked):
`-topk_logp_mean` of `token_stats`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from raise_core.family.segments import by_span, packed, with_empty

PARTS = ("mean", "bottom", "lowest", "tail")


def deepconf(
    topk_logp_mean: Tensor, offsets: Tensor, *, part: str = "bottom", window: int = 2048, share: float = 0.1
) -> Tensor:
    """Confidence of each response, [S] in nats, at least 0 (arXiv 2508.15260). Empty: 0.

        mean      of C_t over all tokens
        bottom    mean of the lowest `share` of the means of all windows of `window` tokens, at least one
        lowest    the lowest window mean
        tail      mean of the last `window` tokens

    topk_logp_mean [T] in nats. A response shorter than a window is one window. NaN for one with a
    NaN, or an infinity (fewer than k columns that are not masked).
    """
    if part not in PARTS:
        raise ValueError(f"part: got {part!r}, wanted one of {', '.join(PARTS)}")
    if window < 1 or not 0.0 < share <= 1.0:
        raise ValueError(
            f"window, share: got {window} and {share}, wanted 1 or more, and a share above 0 up to 1"
        )
    confidence = -packed("topk_logp_mean", topk_logp_mean, offsets)
    confidence = confidence.masked_fill(confidence.isinf(), math.nan)
    found = confidence.new_zeros(len(offsets) - 1)
    for s, own in enumerate(by_span(confidence, offsets)):
        if len(own):
            found[s] = _of_one(own, part, window, share)
    return with_empty(found, offsets, 0.0, topk_logp_mean)


def _of_one(own: Tensor, part: str, window: int, share: float) -> Tensor:
    if part == "mean":
        return own.mean()
    if part == "tail":
        return own[-window:].mean()
    means = window_means(own, window)
    if bool(means.isnan().any()):  # topk would leave them out
        return means.new_tensor(math.nan)
    count = 1 if part == "lowest" else max(1, int(len(means) * share))
    return means.topk(count, largest=False).values.mean()


def window_means(values: Tensor, window: int) -> Tensor:
    """Means of every `window` adjacent ones of values [n], [n - window + 1] in fp64; of all, when fewer."""
    size = min(window, len(values))
    total = torch.cat([values.new_zeros(1, dtype=torch.float64), values.double().cumsum(0)])
    return (total[size:] - total[:-size]) / size


def weighted_vote(
    answers: Sequence[Hashable | None], weight: Tensor, *, keep: float = 1.0
) -> tuple[Hashable | None, dict[Hashable, float]]:
    """The answer with the largest sum of weights, and the sum of each: V(a) = sum_i C_i [answer_i = a].

    answers: S, None where a response has none; weight [S]: its confidence. keep: only this share of the
    answered responses votes, the most confident ones (at least one). A weight that is NaN does not vote. Of
    equal sums the answer that came first wins; (None, {}) without a vote.
    """
    if len(answers) != len(weight):
        raise ValueError(f"weight: got {len(weight)} entries, wanted one for each of {len(answers)} answers")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep: got {keep}, wanted a share above 0 up to 1")
    votes = [
        (a, w) for a, w in zip(answers, weight.tolist(), strict=True) if a is not None and not math.isnan(w)
    ]
    best = sorted(range(len(votes)), key=lambda i: -votes[i][1])[: max(1, math.ceil(keep * len(votes)))]
    total: dict[Hashable, float] = {}
    for i in sorted(best):
        answer, value = votes[i]
        total[answer] = total.get(answer, 0.0) + value
    return (max(total, key=total.__getitem__) if total else None), total


class EarlyStop:
    """Ends a response when the mean confidence of its last `window` tokens falls below `threshold`.

    Nothing ends before `window` tokens are there. lowest: the lowest window mean so far (inf before the
    first).
    """

    def __init__(self, threshold: float, *, window: int = 2048) -> None:
        if window < 1:
            raise ValueError(f"window: got {window}, wanted 1 or more tokens")
        self.threshold, self.window = threshold, window
        self.lowest = math.inf
        self._last: deque[float] = deque(maxlen=window)

    @classmethod
    def calibrated(cls, lowest: Tensor, *, keep: float = 0.1, window: int = 2048) -> EarlyStop:
        """A threshold that the most confident share `keep` of some complete responses passes.

        lowest [n]: `deepconf(..., part="lowest")` of the warm-up responses (16 in the paper; keep 0.1 is
        its "low", 0.9 its "high"). ValueError without one that is finite.
        """
        known = lowest[lowest.isfinite()].double()
        if not len(known) or not 0.0 < keep <= 1.0:
            raise ValueError(
                f"lowest, keep: got {len(known)} finite values and {keep}, wanted some and a share"
            )
        return cls(float(torch.quantile(known, 1.0 - keep)), window=window)

    def add(self, topk_logp_mean: float) -> bool:
        """Count a token [nats]; True when the response is to end here."""
        self._last.append(-topk_logp_mean)
        if len(self._last) < self.window:
            return False
        mean = math.fsum(self._last) / self.window
        self.lowest = min(self.lowest, mean)
        return mean < self.threshold
