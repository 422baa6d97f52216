"""Steps scored by a process reward model, or by what each does for the reference answer; prompts run once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import Any

import torch
from torch import Tensor

from raise_core.chain import (
    BAD,
    CHAIN_ANSWER_CLOSE,
    CHAIN_ANSWER_OPEN,
    END,
    GOOD,
    STEP_TAG,
    StepTokens,
    TaggedChain,
    step_ends,
    tag_steps,
)
from raise_core.ops import step_margins
from raise_core.pieces import TokenizerLike
from raise_core.scoring.backbone import VisionFeatures
from raise_core.scoring.inputs import Completions, check_completions
from raise_core.scoring.packing import Branch
from raise_core.scoring.scorer import Scorer

LEAD = f"\n{END}\nAnswer:\n{CHAIN_ANSWER_OPEN}"  # what the structured chain has between a step and its answer


@dataclass(frozen=True)
class StepScores:
    """A PRM's scores of one completion, each in [0, 1].

    steps: of its complete steps in order, () without one. answer: at the tag after the answer, None without
    a complete answer. ends: for each step, how many tokens of the completion it takes to have it whole.
    """

    steps: tuple[float, ...]
    answer: float | None
    ends: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean of the steps' scores; 0 without steps."""
        return sum(self.steps) / max(len(self.steps), 1)


class StepScorer:
    """Scores of the steps of completions under a process reward model (Chain-of-Step, arXiv 2509.19003).

    scorer: a `raise_core.Scorer` of the PRM; a prompt is run once for its completions, and a completion once
        for all its steps. tokenizer: the PRM's, which holds the three tokens; else ValueError.
    temperature: of the score sigmoid((z_good - z_bad) / temperature). max_length: longest tagged sequence in
        tokens, prompt included; the PRM's context when None.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: TokenizerLike,
        *,
        tag: str = STEP_TAG,
        good: str = GOOD,
        bad: str = BAD,
        temperature: float = 1.0,
        max_length: int | None = None,
    ) -> None:
        self.scorer, self.tokenizer, self.temperature = scorer, tokenizer, temperature
        self.tokens = StepTokens.of(tokenizer, tag, good, bad)
        model: Any = scorer.model
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = context if max_length is None else max_length

    def tag(self, completions: Completions) -> list[list[TaggedChain]]:
        """Completions by prompt, marked for scoring; token ids are those of the PRM's tokenizer."""
        return [tag_steps(group, self.tokenizer, self.tokens) for group in completions]

    def margins(
        self,
        prompts: Sequence[Mapping[str, Any]],
        tagged: Sequence[Sequence[TaggedChain]],
        *,
        features: Sequence[VisionFeatures | None] | None = None,
    ) -> Tensor:
        """Log-odds of good at every tag, [K] nats with gradient: by prompt, by completion, in tag order.

        Raises ValueError for a chain that is longer than the context, naming it.
        """
        return self.row_margins(self.tag_rows(prompts, tagged, features=features))

    def tag_rows(
        self,
        prompts: Sequence[Mapping[str, Any]],
        tagged: Sequence[Sequence[TaggedChain]],
        *,
        features: Sequence[VisionFeatures | None] | None = None,
    ) -> Tensor:
        """Last hidden state at every tag, [K, D] with gradient, ordered as `margins`, which takes it on.

        For a loss of one's own at the tags, beside that of the scores. Raises what `margins` raises.
        """
        for p, group in enumerate(tagged):
            size = int(torch.as_tensor(prompts[p]["input_ids"]).shape[-1])
            for g, chain in enumerate(group):
                self._check_length(p, g, size, chain)
        # The row at a tag is the one that predicts what follows it: one more token is named, and never fed.
        fed = [[[*t.ids[: max(t.positions) + 1], self.tokens.tag] if t.positions else [] for t in group]
               for group in tagged]  # fmt: skip
        rows = self.scorer.completion_rows(prompts, fed, features=features)
        starts = torch.tensor([0, *(len(ids) for group in fed for ids in group)]).cumsum(0).tolist()
        flat = [chain for group in tagged for chain in group]
        at = [start + q + 1 for start, t in zip(starts, flat, strict=False) for q in t.positions]
        return rows.hidden[torch.tensor(at, dtype=torch.long, device=rows.hidden.device)]

    def row_margins(self, rows: Tensor) -> Tensor:
        """Log-odds of good, [K] nats with gradient, of `tag_rows` [K, D]."""
        head = self.scorer.head()
        return step_margins(
            rows, head.weight, torch.arange(len(rows), device=rows.device),
            self.tokens.good, self.tokens.bad, bias=head.bias, temperature=self.temperature,
            logit_scale=head.logit_scale, softcap=head.softcap, impl=self.scorer.impl,
        )  # fmt: skip

    @torch.no_grad()
    def scores(
        self,
        prompts: Sequence[Mapping[str, Any]],
        completions: Completions,
        *,
        features: Sequence[VisionFeatures | None] | None = None,
    ) -> list[list[StepScores]]:
        """By prompt, by completion, its scores. prompts and completions: as `Scorer` takes them.

        A completion with neither a complete step nor a complete answer has StepScores((), None, ()).
        """
        tagged = self.tag(check_completions(prompts, completions))
        margins = self.margins(prompts, tagged, features=features)
        values = iter(torch.sigmoid(margins).tolist())
        found = list[list[StepScores]]()
        for group in tagged:
            found.append([])
            for chain in group:
                own = [next(values) for _ in chain.positions]
                answer = own[chain.steps] if len(own) > chain.steps else None
                found[-1].append(StepScores(tuple(own[: chain.steps]), answer, chain.ends[: chain.steps]))
        return found

    def _check_length(self, p: int, g: int, size: int, chain: TaggedChain) -> None:
        length = size + (max(chain.positions) + 1 if chain.positions else 0)
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"completions[{p}][{g}]: got {chain.steps} steps, {length} tokens with the prompt and the "
                f"tags; the PRM's context has {self.max_length}: shorten the chain or the prompt, or leave "
                "the completion out"
            )


@torch.no_grad()
def gold_logp_after_steps(
    scorer: Scorer,
    prompts: Sequence[Mapping[str, Any]],
    completions: Completions,
    gold: Sequence[str],
    tokenizer: Any,
    *,
    lead: str = LEAD,
    close: str = CHAIN_ANSWER_CLOSE,
    reduce: str = "mean",
    features: Sequence[VisionFeatures | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the reference answer before any step and after each one: what `rc.pacr` takes.

    Returns (logp [T] in nats, offsets [B+1]): completion b has n_b + 1 values, for its n_b complete steps;
    their differences are what each step did for the answer, a stand-in where no PRM exists (PACR, arXiv
    2605.13467).
    gold: the reference answer of each prompt. lead, close: written before and behind it; close is scored with
        it, since without it "4" is as good a beginning of "42". All three are tokenised together. reduce:
        "mean" over its tokens, or "sum".
    The model whose likelihood this is may be the policy or a reference. All prefixes and answers of a prompt
    are branches of one packed pass: a chain is run once, not once for each step.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f'reduce: got {reduce!r}, wanted "mean" or "sum"')
    groups = check_completions(prompts, completions)
    if isinstance(gold, str) or len(gold) != len(groups):
        raise ValueError(
            f"gold: got {len(gold)}, wanted one reference answer for each of {len(groups)} prompts"
        )

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    before, counts = ids_of(lead), list[list[int]]()
    branches = list[list[Branch]]()
    for p, group in enumerate(groups):
        if not gold[p].strip():
            raise ValueError(f"gold[{p}]: got no text, wanted the reference answer; leave the prompt out")
        ids = ids_of(lead + gold[p].strip() + close)
        # One text, as the model would write it: a token that holds the end of `lead` belongs to the answer.
        first = sum(takewhile(bool, map(eq, before, ids)))
        tree, counts_here = [Branch(ids, first, len(ids))], list[int]()
        for completion in group:
            ends, steps = step_ends(completion, tokenizer)
            parent = -1
            for start, stop in zip([0, *ends], ends[:steps], strict=False):
                tree.append(Branch(completion[start:stop], 0, 0, parent))
                parent = len(tree) - 1
                tree.append(Branch(ids, first, len(ids), parent))
            counts_here.append(steps)
        branches.append(tree)
        counts.append(counts_here)
    hidden = scorer._hidden(prompts, branches, features)
    wanted = [b for tree in branches for b in tree if b.stop]
    targets = torch.tensor([i for b in wanted for i in b.ids[b.start :]], dtype=torch.long)
    stats = scorer._stats(hidden, targets.to(hidden.device), ("logp",), 1.0, 20)
    assert stats.logp is not None
    logp: Tensor = stats.logp.double().cpu()
    parts = torch.split(logp, [b.stop - b.start for b in wanted])
    each = [x.mean() if reduce == "mean" else x.sum() for x in parts]
    return _by_completion(each, counts)


def _by_completion(each: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Each prompt's first value stands before the steps of all its completions."""
    values, lengths, at = list[Tensor](), [0], 0
    for group in counts:
        first, at = each[at], at + 1
        for steps in group:
            values += [first, *each[at : at + steps]]
            lengths.append(steps + 1)
            at += steps
    logp = torch.stack(values).float() if values else torch.zeros(0)
    return logp, torch.tensor(lengths).cumsum(0)
