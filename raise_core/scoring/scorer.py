"""Score a group once: log-probabilities and rewards of all completions of a prompt that is run one time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raise_core.ops import Rewards, TokenStats, confidence_rewards, linear_token_stats
from raise_core.pieces import TokenizerLike
from raise_core.scoring.backbone import Head, VisionFeatures
from raise_core.scoring.engine import Engine
from raise_core.scoring.inputs import (
    Completions,
    check_completions,
    packed_spans,
    skipped,
    split_stats,
    trees,
    whole,
)
from raise_core.scoring.packing import Branch
from raise_core.spans import Found, find_answer_spans
from raise_core.tags import ANSWER_CLOSE, ANSWER_OPEN


@dataclass(frozen=True, eq=False)
class CompletionRows:
    """Hidden states that predict the tokens of B completions, prompt by prompt, with gradient.

    hidden [T, D]: row t predicts targets [T]. offsets [B+1]: completion b is offsets[b]:offsets[b+1].
    group [B]: its prompt. Indices are int64, on the device of hidden.
    """

    hidden: Tensor
    targets: Tensor
    offsets: Tensor
    group: Tensor


@dataclass(frozen=True)
class SamplerCheck:
    """A sampler against the scored model: mean and largest absolute difference [nats] over `tokens` tokens.

    agrees: whether the mean is within what was let pass.
    """

    mean: float
    largest: float
    tokens: int
    agrees: bool


class Scorer:
    """Statistics and rewards of completions under a Hugging Face model; a prompt is run once for its group.

    model: a causal or image-text-to-text model object (or its PEFT wrapper), which is not changed. Packed:
        Qwen2-VL, Qwen2.5-VL, Qwen3-VL, and text models with rotary positions (Llama, Qwen, Gemma, …) under
        "sdpa" or "eager" attention. Others take the plain path, one pass for each completion, and so do
        sequences longer than a sliding window; a warning says so once.
    packing: "auto"; "packed": [prompt | c_1 | … | c_G] in one pass; "suffix": the prompt's keys and values
        kept, with gradient, and the completions in passes after it; "plain". What cannot be had as told
        raises ValueError.
    max_tokens: tokens in one pass, prompt included, unless a prompt and one completion are longer; media
        tokens in one pass of the vision tower, unless one prompt has more.
    self_check: compare the first group of each kind (text, image, video) with the plain path and the head
        with the model's own logits; a group that disagrees is a RuntimeWarning and the plain path from then
        on, a head that does raises ValueError.
    impl: as in `linear_token_stats`.

    prompts: what the model's processor returns for each prompt (input_ids [1, L], pixel_values,
        pixel_values_videos, image_grid_thw, video_grid_thw, second_per_grid_ts, …); padding is dropped.
        A prompt whose media tokens were truncated raises ValueError.
    completions: for each prompt the token ids of its G completions; they may be empty, and G may differ. A
        media placeholder that was generated is text like any other token, in embedding and position.
    features: what `vision_features(prompts)` gave, to run the vision tower once for several calls.

    The model's mode, dropout and precision are left as they are; call under `torch.no_grad()` for scores.
    Under autocast the model runs as autocast has it, and the self-check allows that dtype's roundings. The
    head's statistics are fp32 all the same, from the hidden states as they come and the weights as they are
    stored: autocast does not reach them.

    Under FSDP2 a call is a forward pass of the sharded model, and the backward pass reduces all gradients.
    Wrap the layers, then the whole model; embedding, vision tower and head by themselves if wanted. Weights
    beside the layers stay gathered until the next backward pass, so `reshard()` before an optimiser step
    that comes right after scoring. All processes must make equally many passes: as many packs of max_tokens,
    and the same kinds of prompts in the first call, or self_check=False.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        packing: str = "auto",
        max_tokens: int = 32768,
        self_check: bool = True,
        impl: str = "auto",
    ) -> None:
        self._engine = Engine(model, packing, max_tokens, self_check)
        self.model = model
        self.impl = impl

    def head(self) -> Head:
        """The model's language head: `**scorer.head().options()` goes into `linear_policy_loss`."""
        return self._engine.backbone.head()

    def vision_features(self, prompts: Sequence[Mapping[str, Any]]) -> list[VisionFeatures | None]:
        """The vision tower's output for each prompt, None without media; shared pixels are encoded once."""
        read = self._engine.read(prompts)
        return self._engine.backbone.forward_pass(lambda: self._engine.features(read))

    def completion_rows(
        self,
        prompts: Sequence[Mapping[str, Any]],
        completions: Completions,
        *,
        features: Sequence[VisionFeatures | None] | None = None,
    ) -> CompletionRows:
        """Hidden states of all completion tokens, with gradient: the policy update's forward pass.

        Splitting a step by prompts leaves the sum of its gradients as it is.
        """
        groups = check_completions(prompts, completions)
        branches = whole(groups)
        hidden = self._hidden(prompts, branches, features)
        flat = [ids for group in groups for ids in group]
        lengths = torch.tensor([0, *(len(ids) for ids in flat)])
        group = torch.tensor([p for p, g in enumerate(groups) for _ in g], dtype=torch.long)
        targets = torch.tensor([i for ids in flat for i in ids], dtype=torch.long)
        device = hidden.device
        return CompletionRows(hidden, targets.to(device), lengths.cumsum(0).to(device), group.to(device))

    def token_stats(
        self,
        prompts: Sequence[Mapping[str, Any]],
        completions: Completions,
        *,
        want: Sequence[str] = ("logp",),
        temperature: float = 1.0,
        topk: int = 20,
        features: Sequence[VisionFeatures | None] | None = None,
    ) -> list[list[TokenStats]]:
        """For each prompt and completion the statistics of all its tokens, an end-of-sequence token included.

        temperature: 1 for confidence; the sampling temperature for a policy ratio. Other arguments are those
        of `linear_token_stats`. Differentiable.
        """
        rows = self.completion_rows(prompts, completions, features=features)
        stats = self._stats(rows.hidden, rows.targets, want, temperature, topk)
        split = iter(split_stats(stats, [len(ids) for group in completions for ids in group]))
        return [[next(split) for _ in group] for group in completions]

    @torch.no_grad()
    def rewards(
        self,
        prompts: Sequence[Mapping[str, Any]],
        completions: Completions,
        score: Tensor | Sequence[float],
        strict: Tensor | Sequence[bool],
        tokenizer: TokenizerLike,
        *,
        score_wrong: bool | str = "auto",
        needed_by: Sequence[str] = ("logging",),
        found: Sequence[Found] | None = None,
        open: str = ANSWER_OPEN,
        close: str = ANSWER_CLOSE,
        features: Sequence[VisionFeatures | None] | None = None,
        **options: Any,
    ) -> Rewards:
        """SCRE and IGSR rewards [B] of the answers; only rows that predict answer tokens reach the head.

        score [B] in [0, 1], strict [B]: as in `confidence_rewards`, B completions prompt by prompt; options
        are its options. found: answer spans, if they are known. score_wrong: whether answers with score 0 are
        scored too; their reward is 0 either way. "auto" scores them when `needed_by` names someone who reads
        their confidence (logging, KL, evaluation, another reward). An answer that is not scored has
        confidence NaN and length 0.
        """
        groups = check_completions(prompts, completions)
        flat = [ids for group in groups for ids in group]
        spans = list(find_answer_spans(flat, tokenizer, open=open, close=close) if found is None else found)
        score, strict = torch.as_tensor(score, dtype=torch.float32), torch.as_tensor(strict, dtype=torch.bool)
        for name, given in (("score", score), ("strict", strict), ("found", spans)):
            if len(given) != len(flat):
                raise ValueError(
                    f"{name}: got {len(given)} entries, wanted one for each of {len(flat)} completions"
                )
        wrong = skipped(spans, score, score_wrong, needed_by)
        bounds = [(0, 0) if skip else (f.start, f.stop) for f, skip in zip(spans, wrong, strict=True)]
        pairs = iter(zip(flat, bounds, strict=True))
        branches = [[Branch(ids, *bound) for ids, bound in (next(pairs) for _ in g)] for g in groups]
        hidden = self._hidden(prompts, branches, features)
        packed = packed_spans(flat, bounds, [p for p, g in enumerate(groups) for _ in g]).to(hidden.device)
        result = confidence_rewards(
            packed,
            score.to(hidden.device),
            strict.to(hidden.device),
            hidden=hidden,
            impl=self.impl,
            **self.head().options(),
            **options,
        )
        unknown = torch.tensor(wrong, device=hidden.device)
        confidence = result.confidence.masked_fill(unknown, float("nan"))
        return Rewards(result.reward, confidence, result.parts)

    def candidates(
        self,
        prompts: Sequence[Mapping[str, Any]],
        candidates: Completions,
        *,
        after: Completions | None = None,
        want: Sequence[str] = ("logp",),
        temperature: float = 1.0,
        features: Sequence[VisionFeatures | None] | None = None,
    ) -> list[list[list[TokenStats]]]:
        """Statistics of several answers to each prompt: its options, or the reference answer.

        candidates: for each prompt the token ids of K answers. after: for each prompt the texts that they
        follow, such as each completion up to its answer; each is run once for its K answers. Without it they
        follow the prompt. Returns, by prompt, by such text (one, without `after`), by answer, the statistics
        of the answer's tokens.
        """
        answers = check_completions(prompts, candidates, "candidates")
        before = [[[]] for _ in answers] if after is None else check_completions(prompts, after, "after")
        branches = list[list[Branch]]()
        for texts, options in zip(before, answers, strict=True):
            tree = list[Branch]()
            for text in texts:
                trunk = len(tree)
                tree.append(Branch(text, 0, 0))
                tree += [Branch(ids, 0, len(ids), trunk) for ids in options]
            branches.append(tree)
        hidden = self._hidden(prompts, branches, features)
        flat = [b.ids for tree in branches for b in tree if b.parent >= 0]
        targets = torch.tensor([i for ids in flat for i in ids], dtype=torch.long, device=hidden.device)
        split = iter(
            split_stats(self._stats(hidden, targets, want, temperature, 20), [len(ids) for ids in flat])
        )
        return [
            [[next(split) for _ in options] for _ in texts]
            for texts, options in zip(before, answers, strict=True)
        ]

    def check_sampler(
        self,
        prompts: Sequence[Mapping[str, Any]],
        completions: Completions,
        sampled_logp: Sequence[Sequence[Any]],
        *,
        temperature: float = 1.0,
        tolerance: float = 0.05,
    ) -> SamplerCheck:
        """Compare a sampler's log-probabilities [nats] of its own tokens with this model's; warn when apart.

        sampled_logp: as completions, a number for each token (or a tensor [n] for each completion), at
        `temperature`. tolerance: mean absolute difference that is let pass. Some thousandths are usual
        between two engines in bf16; more means other weights, other positions or another prompt.
        """
        with torch.no_grad():
            stats = self.token_stats(prompts, completions, temperature=temperature)
        own = [s.logp.double().cpu() for group in stats for s in group if s.logp is not None]
        theirs = [torch.as_tensor(x).double().cpu() for group in sampled_logp for x in group]
        if [len(x) for x in theirs] != [len(x) for x in own]:
            raise ValueError(
                "sampled_logp: got other lengths than completions, wanted one number for each sampled token"
            )
        off = torch.cat([*own, torch.zeros(0)]) - torch.cat([*theirs, torch.zeros(0)])
        mean, worst = (float(off.abs().mean()), float(off.abs().max())) if len(off) else (0.0, 0.0)
        agrees = mean <= tolerance
        if not agrees:
            warnings.warn(
                f"a sampler's log-probabilities are off by {mean:.3g} nats on average, {worst:.3g} at most: "
                "it does not sample from the model that is scored (weights, positions, prompt, temperature)",
                RuntimeWarning,
                stacklevel=2,
            )
        return SamplerCheck(mean, worst, len(off), agrees)

    def plan(self, prompts: Sequence[Mapping[str, Any]], completions: Completions) -> list[str]:
        """How each prompt would be run: "packed", "suffix" or "plain"."""
        branches = whole(check_completions(prompts, completions))
        return self._engine.modes(trees(self._engine.read(prompts), branches))

    def _hidden(
        self,
        prompts: Sequence[Mapping[str, Any]],
        branches: Sequence[Sequence[Branch]],
        features: Sequence[VisionFeatures | None] | None,
    ) -> Tensor:
        """Hidden states [T, D] of everything wanted, by prompt, by branch."""
        read = self._engine.read(prompts)
        return self._engine.hidden(read, trees(read, branches), features)

    def _stats(
        self, hidden: Tensor, targets: Tensor, want: Sequence[str], temperature: float, topk: int
    ) -> TokenStats:
        return linear_token_stats(
            hidden,
            targets=targets,
            want=want,
            temperature=temperature,
            topk=topk,
            impl=self.impl,
            **self.head().options(),
        )
