"""Evaluation while training: greedy answers to every row of the evaluation data."""

from collections.abc import Callable

import torch

import raise_core as rc

from . import ranks
from .errors import BadRow
from .media.loader import MediaLoader
from .models import Policy
from .prompts import Prompt, PromptBuilder
from .rollout import sample
from .row_files import RowSource
from .train_config import TrainConfig


class HeldOutRows:
    """The rows of `eval_data`, shared out over the processes; an unusable one counts as unanswered."""

    def __init__(self, config: TrainConfig, policy: Policy, builder: PromptBuilder) -> None:
        self.config, self.policy, self.builder = config, policy, builder
        self.source = RowSource.open(config.eval_data, config.sampling)

    @torch.no_grad()
    def figures(self, advance: Callable[[int], None] = lambda n: None) -> dict[str, float]:
        """Mean text score of all rows, share without an answer, share that could not be used.

        All processes call it. The model is afterwards in training or evaluation mode as before.
        """
        mine = range(ranks.rank(), len(self.source), ranks.size())
        score = missing = unused = 0.0
        training = self.policy.model.training
        self.policy.model.eval()
        with MediaLoader(workers=self.config.workers) as loader:
            for start in range(0, len(mine), self.config.prompts):
                some = mine[start : start + self.config.prompts]
                prompts = self._prompts(some, loader)
                unused += len(some) - len(prompts)
                for row_score, is_missing in self._answers(prompts):
                    score += row_score
                    missing += is_missing
                advance(len(some))
        self.policy.model.train(training)
        score, missing, unused = ranks.totals(score, missing, unused)
        rows = len(self.source)
        return {
            "text_score_mean": score / rows,
            "answer_missing_share": (missing + unused) / rows,
            "unused_share": unused / rows,
        }

    def _prompts(self, numbers: range, loader: MediaLoader) -> list[Prompt]:
        rows = []
        for number in numbers:
            try:
                rows.append(self.source[number])
            except BadRow:
                continue
        return [p for p in self.builder.build(rows, loader) if isinstance(p, Prompt)]

    def _answers(self, prompts: list[Prompt]) -> list[tuple[float, bool]]:
        """For each prompt its text score, and whether the answer is missing."""
        policy = self.policy
        rollout = sample(
            policy.model, prompts, group_size=1, max_new_tokens=self.config.max_new_tokens,
            temperature=0.0, eos=policy.eos, suppress=policy.suppress, draws=None,
        )  # fmt: skip
        found = rc.find_answer_spans(rollout.completions, policy.tokenizer)
        texts = [policy.tokenizer.decode(ids) for ids in rollout.completions]
        return [
            (p.row.text_score(text), f.reason is not None)
            for p, text, f in zip(prompts, texts, found, strict=True)
        ]
