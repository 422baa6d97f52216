"""Rewards of the confidence family by name (`reward: rlpr`): target tokens, statistics, function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

import raise_core as rc
from raise_core.tags import answer_in

from .errors import UserError

if TYPE_CHECKING:
    from .rollout import Rollout
    from .rows import Row

Target = Literal["own answer", "gold answer", "whole response"]


@dataclass(frozen=True)
class Material:
    """What is known of B completions, on the CPU.

    stats: the statistics a reward wants, of all target tokens, packed; offsets [B+1]: each completion's.
    group [B]: its prompt. text_score [B] in [0, 1]. answered [B] bool: it has an answer. reasoning_tokens
    [B]: tokens before the gold answer; 0 for other targets. baseline [B]: mean probability of the gold
    answer right after the prompt; None unless wanted.
    """

    stats: rc.TokenStats
    offsets: Tensor
    group: Tensor
    text_score: Tensor
    answered: Tensor
    reasoning_tokens: Tensor
    baseline: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        values: Tensor = getattr(self.stats, name)
        return values


@dataclass(frozen=True)
class FamilyReward:
    """A reward: its target tokens, the statistics it wants of them, and its function to [B].

    compares: needs two or more completions of a prompt. baseline: wants the gold answer without reasoning
    too.
    """

    target: Target
    want: tuple[str, ...]
    of: Callable[[Material], Tensor]
    compares: bool = False
    baseline: bool = False


def _nover(m: Material) -> Tensor:
    return rc.nover(m["logp"], m.offsets, m.group, m.reasoning_tokens, valid=m.answered)


_OWN: Target = "own answer"
_GOLD: Target = "gold answer"
_WHOLE: Target = "whole response"
_LOGP = ("logp",)
FAMILY = {
    "likelihood": FamilyReward(_GOLD, _LOGP, lambda m: rc.sequence_likelihood(m["logp"], m.offsets)),
    "mean-logp": FamilyReward(_GOLD, _LOGP, lambda m: rc.mean_logp(m["logp"], m.offsets)),
    "rlpr": FamilyReward(_GOLD, _LOGP, lambda m: rc.rlpr(m["logp"], m.offsets, m.baseline), baseline=True),
    "jepo": FamilyReward(_GOLD, _LOGP, lambda m: rc.jepo(m["logp"], m.offsets, m.group), compares=True),
    "nover": FamilyReward(_GOLD, _LOGP, _nover, compares=True),
    "intuitor": FamilyReward(
        _WHOLE, ("self_certainty",), lambda m: rc.intuitor(m["self_certainty"], m.offsets)
    ),
    "rent": FamilyReward(
        _WHOLE, ("entropy",), lambda m: rc.rent(m["entropy"], m.offsets, answered=m.answered)
    ),
    "em-rl": FamilyReward(_WHOLE, _LOGP, lambda m: rc.em_rl_sequence(m["logp"], m.offsets)),
    "deepconf": FamilyReward(
        _WHOLE, ("topk_logp_mean",), lambda m: rc.deepconf(m["topk_logp_mean"], m.offsets)
    ),
    "min-prob": FamilyReward(_OWN, _LOGP, lambda m: m.text_score * rc.min_prob(m["logp"], m.offsets)),
}


def reads_all_rows(name: str) -> bool:
    """Whether a reward (any that can be configured) is taken over every token of the completions."""
    return name in FAMILY and FAMILY[name].target == _WHOLE


def check_group_size(name: str, group_size: int) -> None:
    """UserError for a reward that compares completions where there is one of each prompt."""
    if name in FAMILY and FAMILY[name].compares and group_size < 2:
        raise UserError(
            f"reward {name}: compares the completions of a prompt, and there is {group_size} of each; "
            "set group_size to 2 or more, or give all completions of a row"
        )


@torch.no_grad()
def family_reward(
    name: str,
    rollout: "Rollout",
    scorer: rc.Scorer,
    tokenizer: Any,
    *,
    found: Sequence[rc.Found],
    text_score: Tensor,
    own_logp: Tensor,
    states: rc.CompletionRows | None,
) -> Tensor:
    """Reward [B] fp32 of a rollout, under the model that `scorer` holds; on the CPU.

    name: a key of FAMILY. found [B]: the completions' own answers. text_score [B]. own_logp [T]: of the own
    answers' tokens, packed. states: of all completion tokens, needed where `reads_all_rows(name)`. Gold
    answers cost one more packed pass (`raise_core.spliced_stats`). UserError, naming the row, for a reward
    that is not finite, and for a row without a solution.
    """
    spec = FAMILY[name]
    lengths, reasoning, baseline = [len(f) for f in found], [0] * len(found), None
    stats = rc.TokenStats(logp=own_logp)
    if spec.target == _WHOLE:
        if states is None:
            raise ValueError(f"states: got None, wanted the rows of all completion tokens for reward {name}")
        lengths = [len(ids) for ids in rollout.completions]
        stats = rc.linear_token_stats(
            states.hidden, targets=states.targets, want=spec.want, **scorer.head().options()
        )
    elif spec.target == _GOLD:
        stats, lengths, reasoning, baseline = _gold(rollout, scorer, tokenizer, with_baseline=spec.baseline)
    material = Material(
        stats=rc.TokenStats(**{key: getattr(stats, key).cpu() for key in spec.want}),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        group=torch.tensor(rollout.owner, dtype=torch.long),
        text_score=text_score.cpu(),
        answered=torch.tensor([f.reason is None for f in found], dtype=torch.bool),
        reasoning_tokens=torch.tensor(reasoning),
        baseline=baseline,
    )
    reward = spec.of(material)
    for b in (~reward.isfinite()).nonzero()[:, 0].tolist():
        row = rollout.prompts[rollout.owner[b]].row
        raise UserError(
            f"row {row.problem_id}: reward {name} of one of its completions is {float(reward[b])}; the "
            "model's logits are not finite, or forbid a token of the answer"
        )
    return reward


def gold_text(row: "Row") -> str:
    """The answer a row's solution holds. UserError when there is none."""
    answer, reason = answer_in(row.solution)
    text = answer if reason in (None, "empty") else row.solution.strip()
    if not text:
        raise UserError(f"row {row.problem_id}: no answer in its solution; a gold-answer reward needs one")
    return text


def _gold(
    rollout: "Rollout", scorer: rc.Scorer, tokenizer: Any, *, with_baseline: bool
) -> tuple[rc.TokenStats, list[int], list[int], Tensor | None]:
    """log p of the gold answers, their lengths, the tokens before each, and the baseline [B]."""
    groups = list[list[rc.Splice]]()
    for prompt, completions in zip(rollout.prompts, rollout.groups, strict=True):
        ids = [*completions, []] if with_baseline else completions
        groups.append(rc.splice_gold(ids, [gold_text(prompt.row)] * len(ids), tokenizer))
    stats = rc.spliced_stats(scorer, rollout.inputs, groups, features=rollout.features)
    logp, lengths, reasoning, baseline = list[Tensor](), list[int](), list[int](), list[float]()
    for own, spliced, completions in zip(stats, groups, rollout.groups, strict=True):
        values = [s.logp.cpu() for s in own if s.logp is not None]
        logp += values[: len(completions)]
        lengths += map(len, values[: len(completions)])
        reasoning += [len(s.before) for s in spliced[: len(completions)]]
        if with_baseline:
            baseline += [float(values[-1].double().exp().mean())] * len(completions)
    packed = rc.TokenStats(logp=torch.cat([*logp, torch.zeros(0)]))
    return packed, lengths, reasoning, torch.tensor(baseline) if with_baseline else None
