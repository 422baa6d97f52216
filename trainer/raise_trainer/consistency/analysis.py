"""Which confidence tells right answers from wrong ones, and does the least certain token tell Match."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .statistics import (
    Bin,
    Clusters,
    Flags,
    Floats,
    Interval,
    auroc_figure,
    bin_of,
    calibration_error_figure,
    mean_figure,
    overlap_figure,
    shares,
)

HISTOGRAM_BINS, RELIABILITY_BINS = 20, 10  # of equal width over [0, 1]


@dataclass(frozen=True)
class Separation:
    """How well one confidence tells right answers from wrong ones.

    answers: those it is known of, which all figures here are of. histogram_right, histogram_wrong
    [HISTOGRAM_BINS]: answers by confidence. auroc, overlap: of right against wrong ones (0.5 and 1: tells
    nothing). calibration_error and reliability [RELIABILITY_BINS]: confidence read as a probability of being
    right.
    """

    answers: int
    histogram_right: list[int]
    histogram_wrong: list[int]
    auroc: Interval
    overlap: Interval
    calibration_error: Interval
    reliability: list[Bin]


@dataclass(frozen=True)
class Analysis:
    """What `confidence_analysis` found, over `answers` of `videos`.

    accuracy, match: shares of all answers. answer, sequence: by the confidence in the answer's tokens, and
    in all tokens. min_prob_match [RELIABILITY_BINS]: share that match by the probability of the answer's
    least certain token; min_prob_auroc: of matching answers against the others by it.
    """

    answers: int
    videos: int
    accuracy: Interval
    match: Interval
    answer: Separation
    sequence: Separation
    min_prob_match: list[Bin]
    min_prob_auroc: Interval


def confidence_analysis(
    right: ArrayLike,
    match: ArrayLike,
    answer_confidence: ArrayLike,
    sequence_confidence: ArrayLike,
    min_prob: ArrayLike,
    video: Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Analysis:
    """Separation, calibration and min-prob against Match of N answers, with intervals over whole videos.

    right, match [N] bool. answer_confidence, sequence_confidence [N] in [0, 1]: exp of the mean
    log-probability of the answer's tokens, and of all tokens. min_prob [N] in [0, 1]: the smallest
    probability of an answer's token. NaN: not known (no answer); such an answer counts in accuracy and
    match alone. video [N]: whose answers are resampled together. ValueError for another length, or a
    confidence outside [0, 1].
    """
    flags, matches = np.asarray(right, bool), np.asarray(match, bool)
    values = {
        "answer_confidence": np.asarray(answer_confidence, np.float64),
        "sequence_confidence": np.asarray(sequence_confidence, np.float64),
        "min_prob": np.asarray(min_prob, np.float64),
    }
    for name, given in {"match": matches, **values, "video": video}.items():
        if len(given) != len(flags):
            raise ValueError(f"{name}: got {len(given)} values, wanted {len(flags)}, as many as right")
    clusters = Clusters(video, resamples=resamples, seed=seed)
    known = ~np.isnan(values["min_prob"])
    least = values["min_prob"][known]
    return Analysis(
        answers=len(flags),
        videos=clusters.count,
        accuracy=clusters.interval(mean_figure(flags)),
        match=clusters.interval(mean_figure(matches)),
        answer=_separation(flags, values["answer_confidence"], clusters),
        sequence=_separation(flags, values["sequence_confidence"], clusters),
        min_prob_match=shares(matches[known], least, bins=RELIABILITY_BINS),
        min_prob_auroc=clusters.interval(auroc_figure(matches[known], least), known),
    )


def _separation(right: Flags, confidence: Floats, clusters: Clusters) -> Separation:
    known = ~np.isnan(confidence)
    flags, values = right[known], confidence[known]
    place = bin_of(values, HISTOGRAM_BINS)
    counts = [np.bincount(place[of], minlength=HISTOGRAM_BINS).tolist() for of in (flags, ~flags)]
    return Separation(
        answers=len(values),
        histogram_right=counts[0],
        histogram_wrong=counts[1],
        auroc=clusters.interval(auroc_figure(flags, values), known),
        overlap=clusters.interval(overlap_figure(flags, values, bins=HISTOGRAM_BINS), known, biased=True),
        calibration_error=clusters.interval(
            calibration_error_figure(flags, values, bins=RELIABILITY_BINS), known, biased=True
        ),
        reliability=shares(flags, values, bins=RELIABILITY_BINS),
    )
