"""A process reward model beside a policy: step scores and trajectory rewards of sampled chains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import raise_core as rc
from raise_core.scoring.backbone import VisionFeatures
from raise_core.step_rewards import STEP_SHARE

from .errors import UserError
from .prm.chains import step_tokens

Features = Sequence[VisionFeatures | None]
NOT_FINITE = "is not finite; take an earlier checkpoint of it, or dtype=float32"


@dataclass(frozen=True)
class Judged:
    """A chain's scores, each in [0, 1].

    scores: of its steps and its answer. reward: `rc.trajectory_reward` of them, a missing answer counting 0.
    fits: False for one that is longer than the PRM's context, which has no scores and reward 0.
    """

    scores: rc.StepScores
    reward: float
    fits: bool = True

    @property
    def partial(self) -> float:
        """Mean score of its steps, for a chain that is to go on."""
        return self.scores.mean


class ChainJudge:
    """A PRM that reads the policy's own tokens.

    model, tokenizer: of the PRM. share: of the steps in the reward. micro_tokens: of a pass. name: of the PRM
    in messages. UserError where the PRM has no step tag, or a weight or a score that is not finite.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, share: float = STEP_SHARE, micro_tokens: int = 1 << 15,
        name: str | Path = "",
    ) -> None:  # fmt: skip
        step_tokens(tokenizer)
        self.name = f"prm {name}".strip()
        for weight, values in model.named_parameters():
            if not torch.isfinite(values).all():
                raise UserError(f"{self.name}: its weight {weight} {NOT_FINITE}")
        self.model, self.share = model, share
        self.scorer = rc.StepScorer(rc.Scorer(model, max_tokens=micro_tokens), tokenizer)

    @classmethod
    def load(
        cls, folder: str | Path, tokenizer: Any, *, share: float = STEP_SHARE, device: torch.device,
        dtype: str = "bfloat16", attention: str = "sdpa", micro_tokens: int = 1 << 15,
    ) -> "ChainJudge":  # fmt: skip
        """The PRM in a folder (what `raise-core prm train` left in checkpoints/…/model), frozen.

        tokenizer: the policy's, whose tokens are scored as they are. UserError where the PRM cannot be
        loaded, or has another vocabulary.
        """
        from .models import load_policy
        from .train_config import check

        fixed = {"data": "-", "out": ".", "gradient_checkpointing": False}
        config = check({"model": str(folder), "dtype": dtype, "attention": attention} | fixed)
        loaded = load_policy(config, device)
        check_same_tokens(loaded.tokenizer, tokenizer, folder)
        loaded.model.eval().requires_grad_(False)
        return cls(loaded.model, loaded.tokenizer, share=share, micro_tokens=micro_tokens, name=folder)

    @torch.no_grad()
    def features(self, inputs: Sequence[Mapping[str, Any]]) -> Features:
        """What the PRM sees of the prompts' media, to be given to several calls."""
        return self.scorer.scorer.vision_features(inputs)

    def __call__(
        self,
        inputs: Sequence[Mapping[str, Any]],
        groups: Sequence[Sequence[Sequence[int]]],
        features: Features | None = None,
    ) -> list[list[Judged]]:
        """Scores of the completions of each prompt, by prompt; a partial chain's answer has none."""
        fits = [[self._fits(one, ids) for ids in group] for one, group in zip(inputs, groups, strict=True)]
        kept = [
            [list(ids) if ok else [] for ids, ok in zip(group, oks, strict=True)]
            for group, oks in zip(groups, fits, strict=True)
        ]
        scores = self.scorer.scores(inputs, kept, features=features)
        flat = [one for group in scores for one in group]
        for one in flat:
            if not all(map(math.isfinite, (*one.steps, one.answer or 0.0))):
                raise UserError(f"{self.name}: its score of a step {NOT_FINITE}")
        steps = torch.tensor([s for one in flat for s in one.steps])
        offsets = torch.tensor([0, *(len(one.steps) for one in flat)]).cumsum(0)
        answers = torch.tensor([one.answer or 0.0 for one in flat])
        rewards = iter(rc.trajectory_reward(steps, offsets, answers, self.share).tolist())
        return [
            [Judged(one, next(rewards), ok) for one, ok in zip(group, oks, strict=True)]
            for group, oks in zip(scores, fits, strict=True)
        ]

    def _fits(self, inputs: Mapping[str, Any], ids: Sequence[int]) -> bool:
        """Whether a completion fits into the PRM's context with its prompt, however many tags it gets."""
        most = self.scorer.max_length
        if most is None:
            return True
        size = int(torch.as_tensor(inputs["input_ids"]).shape[-1])
        if size + 2 * len(ids) <= most:
            return True
        ((chain,),) = self.scorer.tag([[list(ids)]])
        return size + (max(chain.positions) + 1 if chain.positions else 0) <= most


def check_same_tokens(prm: Any, policy: Any, folder: str | Path) -> None:
    """UserError unless both tokenizers name the same tokens: ids are handed over as they are."""
    mine, theirs = prm.get_vocab(), policy.get_vocab()
    if mine != theirs:
        differing = sorted(set(mine.items()) ^ set(theirs.items()))[0][0]
        raise UserError(
            f"prm {folder}: its tokenizer differs from the policy's, in {differing!r} first; start both from "
            "one folder made by raise-core prm tokens"
        )
