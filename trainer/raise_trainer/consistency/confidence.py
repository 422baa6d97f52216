"""What is known of an output's probabilities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Confidence:
    """Figures in [0, 1]; None where it is not recorded, or there is no answer.

    answer: exp of the mean log-probability of the answer's tokens; mean_p, min_p: their mean and their
    smallest probability; sequence: as answer, of all tokens. logp: of each token of the answer [nats].
    """

    answer: float | None = None
    mean_p: float | None = None
    min_p: float | None = None
    sequence: float | None = None
    logp: tuple[float, ...] | None = None

    @classmethod
    def of(cls, logp: Sequence[float], start: int = 0, stop: int = 0) -> "Confidence":
        """Of the log-probabilities of an output's tokens [nats], the answer's being start to stop.

        start = stop: no answer. An output without tokens has nothing. ValueError for bounds outside.
        """
        if not 0 <= start <= stop <= len(logp):
            raise ValueError(f"start, stop: got {start}, {stop}, wanted a span of {len(logp)} tokens")
        own = tuple(logp[start:stop])
        sequence = math.exp(math.fsum(logp) / len(logp)) if logp else None
        if not own:
            return cls(sequence=sequence)
        p = [math.exp(value) for value in own]
        return cls(math.exp(math.fsum(own) / len(own)), math.fsum(p) / len(p), min(p), sequence, own)
