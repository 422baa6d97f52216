"""Log-probability of packed spans."""

from __future__ import annotations

from torch import Tensor

from raise_core.ops.impl import chosen_impl
from raise_kernels import _span_operator, reference
from raise_kernels._checks import Scre, check_tensor

REDUCES = ("mean", "sum", "decay")


def span_logp(
    logp: Tensor,
    offsets: Tensor,
    *,
    reduce: str = "mean",
    eta: float = 0.1,
    first_index: int = 1,
    normalize: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each span, [S] in nats, differentiable in logp.

        sum     sum_j logp_j: exp of it is the likelihood of the answer (VeriFree, arXiv 2505.21493)
        mean    that over the number of tokens
        decay   sum_j w_j * logp_j, w_j = exp(-eta * j), j = first_index, ...: the log of SCRE without its
                penalty; with normalize over sum_j w_j

    logp [T] in nats, packed; offsets [S+1]. eta, first_index and normalize belong to "decay". An empty span
    gives 0, a token of probability 0 -inf (and has gradient 0), a NaN or +inf NaN (and the span has gradient
    0). Raises ValueError for options out of range and for offsets that do not fit logp; where only the device
    knows them, a span that leaves [0, T] is NaN and has gradient 0.
    """
    if reduce not in REDUCES:
        raise ValueError(f"reduce is {reduce!r}; give one of {REDUCES}")
    decay = Scre(eta=eta, lam=0.0, first_index=first_index, normalize=normalize)
    how = decay if reduce == "decay" else Scre(eta=0.0, lam=0.0, normalize=reduce == "mean")
    check_tensor("logp", logp)
    if chosen_impl(logp, impl) == "triton":
        return _span_operator.run("span_logp", logp, offsets, how)
    return reference.span_logp(logp, _span_operator.seen_offsets(logp, offsets), how)
