"""What every implementation accepts, and one wording of what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

STATS = (
    "logp",
    "lse",
    "entropy",
    "self_certainty",
    "max_logp",
    "varentropy",
    "rank",
    "topk_logp_mean",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIFFERENTIABLE = ("logp", "lse", "entropy", "self_certainty")
VARIANTS = ("paper", "balanced")


@dataclass(frozen=True, kw_only=True)
class LogitMap:
    """How a row of raw logits x becomes z: z = softcap * tanh(logit_scale * x / softcap) / temperature.

    Without a softcap, z = logit_scale * x / temperature. The vocabulary mask comes last: columns at or above
    `valid_vocab`, and columns where x is -inf, are -inf in z whatever the rest says. `ignore_index` is the
    target whose row is not scored (output 0, gradient 0).
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)
        _positive("logit_scale", self.logit_scale)
        if self.softcap is not None:
            _positive("softcap", self.softcap, "None for no softcap")
        if self.valid_vocab is not None:
            check_whole("valid_vocab", self.valid_vocab, "None for all columns")
        if not isinstance(self.ignore_index, int | torch.SymInt):
            raise TypeError(f"ignore_index is {self.ignore_index!r}; give an int that is no token id")

    @property
    def factors(self) -> tuple[float, float]:
        """(a, b) with z = b * tanh(a * x) under a softcap, and z = a * x (b = 1) without."""
        if self.softcap is None:
            return self.logit_scale / self.temperature, 1.0
        return self.logit_scale / self.softcap, self.softcap / self.temperature

    def columns(self, vocab: int) -> int:
        """The number of leading columns that belong to the vocabulary, at most `vocab`."""
        if self.valid_vocab is None:
            return vocab
        if self.valid_vocab > vocab:
            raise ValueError(
                f"valid_vocab is {self.valid_vocab}, but the logits have {vocab} columns; give at most that"
            )
        return self.valid_vocab


def _positive(name: str, value: float, otherwise: str = "1.0 for no change") -> None:
    _real(name, value)
    # Comparisons, unlike math.isfinite, can be traced by torch.compile with a symbolic value.
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; give a finite number above 0, or {otherwise}")


def _real(name: str, value: object) -> None:
    if not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} is {value!r}; give a Python number")


def check_whole(name: str, value: object, otherwise: str | None = None) -> None:
    """Refuse a scalar option that is not a whole number of at least 1."""
    way_out = "" if otherwise is None else f", or {otherwise}"
    if not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} is {value!r}; give a whole number, at least 1{way_out}")
    if value < 1:
        raise ValueError(f"{name} is {value}; give at least 1{way_out}")


def check_memory(memory: int | None) -> None:
    """Refuse bytes of scratch that are not a whole number of at least 1, or None for the default."""
    if memory is not None:
        check_whole("memory", memory, "None for the default number of bytes")


def check_rate(name: str, value: float, low: float = 0.0, high: float = math.inf) -> None:
    """Refuse a scalar option that is not a finite number in [low, high]."""
    _real(name, value)
    if not (low <= value <= high and value < math.inf):
        raise ValueError(f"{name} is {value}; give a finite number in [{low}, {high}]")


def check_want(want: Sequence[str]) -> tuple[str, ...]:
    """The wanted statistics without repeats, in the order of `STATS`."""
    if isinstance(want, str):
        raise TypeError(f'want is the string {want!r}; give a tuple such as ("{want}",)')
    if not isinstance(want, Sequence | Set):
        raise TypeError(f'want is {want!r}; give a tuple such as ("logp",)')
    unknown = [name for name in want if name not in STATS]
    if unknown or not want:
        raise ValueError(f"want is {tuple(want)}; give one or more of {STATS}")
    return tuple(name for name in STATS if name in want)


def check_tensor(name: str, value: object) -> None:
    """Refuse what is not a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; give a tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name} is {value.layout}; give {name}.to_dense()")


def check_stats(logits: Tensor, targets: Tensor, rows: Tensor | None, name: str = "logits") -> None:
    """Refuse shapes, dtypes and devices that `token_stats` cannot mean anything by."""
    check_tensor(name, logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}; give [..., V] with V at least 1")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{name} is {logits.dtype}; give a floating-point tensor")
    _check_targets(name, logits, targets, rows)


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    name: str = "weight",
) -> None:
    """Refuse shapes, dtypes and devices that `linear_token_stats` cannot mean anything by."""
    for label, given in (("hidden", hidden), (name, weight), ("bias", bias)):
        if given is not None:
            check_tensor(label, given)
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1:] != weight.shape[1:] or not weight.numel():
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, {name} {tuple(weight.shape)}; give [..., D] and "
            "[V, D], V and D at least 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, {name} {tuple(weight.shape)}; give [V]")
    for label, other in (("hidden", hidden), (name, weight), ("bias", bias)):
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{label} is on {other.device}, hidden on {hidden.device}; move one of them")
        if other is not None and other.dtype not in FLOATS:
            raise TypeError(f"{label} is {other.dtype}; give fp32, bf16, fp16 or fp64")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"hidden is {hidden.dtype}, {name} {weight.dtype}; give both as float64, or neither")
    _check_targets("hidden", hidden, targets, rows)


def _check_targets(name: str, x: Tensor, targets: Tensor, rows: Tensor | None) -> None:
    """Refuse targets and rows that do not name one token for each scored row of x."""
    check_index("targets", targets, x.device)
    if rows is None:
        if targets.shape != x.shape[:-1]:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}, {name} {tuple(x.shape)}; "
                f"give one target for each row of {name}, or name the scored rows with rows="
            )
        return
    check_index("rows", rows, x.device)
    if rows.dim() != 1 or rows.shape != targets.shape:
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}, targets {tuple(targets.shape)}; give both as [T]"
        )


def check_candidates(candidates: Tensor, device: torch.device) -> None:
    """Refuse candidates that are not [..., K] token ids with K at least 1."""
    check_index("candidates", candidates, device)
    if candidates.dim() < 1 or candidates.shape[-1] < 1:
        raise ValueError(
            f"candidates has shape {tuple(candidates.shape)}; give [T, K] token ids, K at least 1"
        )


def check_index(name: str, index: Tensor, device: torch.device) -> None:
    """Refuse an index tensor that is not int32 or int64 on `device`."""
    check_tensor(name, index)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {index.dtype}; give int64 or int32")
    if index.device != device:
        raise ValueError(f"{name} is on {index.device}, the scores on {device}; move it with .to({device})")


def on_host(*tensors: Tensor) -> bool:
    """Whether values may be read now: real CPU tensors, so that reading them synchronises nothing."""
    if torch.compiler.is_compiling():
        return False
    return all(t.device.type == "cpu" and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def check_spans(logp: Tensor, offsets: Tensor) -> None:
    """Refuse packed log-probabilities [T] and bounds [S+1] that do not fit each other.

    The values of `offsets` are read only where that costs no synchronisation; bounds that only the device
    knows and that leave [0, T] give NaN for their span.
    """
    check_tensor("logp", logp)
    if logp.dim() != 1 or not logp.dtype.is_floating_point:
        raise ValueError(f"logp has shape {tuple(logp.shape)} and dtype {logp.dtype}; give floats as [T]")
    check_index("offsets", offsets, logp.device)
    if offsets.dim() != 1 or len(offsets) < 1:
        raise ValueError(f"offsets has shape {tuple(offsets.shape)}; give [S + 1]")
    check_bounds(offsets, len(logp))
    if len(offsets) == 1 and len(logp):
        raise ValueError(f"offsets names no span, but logp has {len(logp)} tokens; give [S + 1]")


def check_bounds(offsets: Tensor, tokens: int) -> None:
    """Refuse bounds [S+1] that do not rise from 0 to `tokens`, where reading them waits for nothing."""
    if not on_host(offsets):
        return
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(
            f"offsets must rise from 0 to {tokens} (the length of logp) and never fall; got {bounds[:8]}"
            f"{' …' if len(bounds) > 8 else ''}, ending at {bounds[-1]}"
        )


def check_per_span(name: str, values: Tensor, offsets: Tensor) -> None:
    """Refuse a per-span tensor that is not [S] on the device of `offsets`."""
    check_tensor(name, values)
    if values.dim() != 1 or len(values) != len(offsets) - 1:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; offsets describes {len(offsets) - 1} spans: give [S]"
        )
    if values.device != offsets.device:
        raise ValueError(f"{name} is on {values.device}, offsets on {offsets.device}; move one of them")


@dataclass(frozen=True, kw_only=True)
class Scre:
    """Options of SCRE. The defaults eta and lam are this project's own; the paper gives none.

    eta: decay per token, >= 0. lam: weight of the variance penalty, >= 0. first_index: exponent of the first
    token, 0 or 1. normalize: divide the weights by their sum.
    """

    eta: float = 0.1
    lam: float = 1.0
    first_index: int = 1
    normalize: bool = False

    def __post_init__(self) -> None:
        check_rate("eta", self.eta)
        check_rate("lam", self.lam)
        if self.first_index not in (0, 1):
            raise ValueError(f"first_index is {self.first_index}; give 1 (the paper's) or 0")

    @property
    def start(self) -> int:
        """The exponent to compute with: normalized weights are the same from 0, where the first is 1."""
        return 0 if self.normalize else self.first_index


@dataclass(frozen=True, kw_only=True)
class Igsr:
    """Options of IGSR. The defaults are this project's own.

    tau: bin width, in (0, 0.5]. delta: floor of a token's probability, in (0, 1). penalty: >= 0.
    min_bonus: smallest bonus that is given, >= 0; tau when None. variant: "paper" or "balanced".
    """

    tau: float = 0.1
    delta: float = 1e-6
    penalty: float = 0.05
    min_bonus: float | None = None
    variant: str = "paper"

    def __post_init__(self) -> None:
        for name in ("tau", "delta"):
            _real(name, getattr(self, name))
        if not 0 < self.tau <= 0.5:
            raise ValueError(f"tau is {self.tau}; give a bin width in (0, 0.5]")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}; give a probability in (0, 1)")
        check_rate("penalty", self.penalty)
        if self.min_bonus is not None:
            check_rate("min_bonus", self.min_bonus)
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; give one of {VARIANTS}")

    @property
    def threshold(self) -> float:
        """The smallest bonus that is given."""
        return self.tau if self.min_bonus is None else self.min_bonus


# Nats. A bin whose confidences differ by less is not stretched to all of [0, 1].
MIN_SPREAD = 0.01
# Keeps s / tau from falling a bin short when the quotient rounds to just under a whole number.
BIN_SLACK = 1e-4

PLAIN = LogitMap()
SCRE = Scre()
IGSR = Igsr()
