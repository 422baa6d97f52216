"""How each prompt of a call is run: the choice, the first-use checks, the passes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raise_core.scoring.backbone import Backbone, VisionFeatures
from raise_core.scoring.check import group_fault, head_fault
from raise_core.scoring.group_forward import Call, wanted_rows
from raise_core.scoring.packing import Tree, choose
from raise_core.scoring.prompts import IMAGE, VIDEO, Prompt, read_prompts

PACKINGS = ("auto", "packed", "suffix", "plain")
KINDS = {
    (False, False): "text alone",
    (True, False): "images",
    (False, True): "videos",
    (True, True): "images and videos",
}


class Engine:
    """The state of a scorer: its model, its settings, what has been checked and what has been said."""

    def __init__(self, model: nn.Module, packing: str, max_tokens: int, self_check: bool) -> None:
        if packing not in PACKINGS:
            raise ValueError(f"packing: got {packing!r}, wanted one of {PACKINGS}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, wanted 1 or more tokens in a pass")
        self.backbone = Backbone(model)
        self.packing, self.max_tokens = packing, max_tokens
        self._unchecked = {"head", *KINDS.values()} if self_check else set[str]()
        self._distrusted: str | None = None
        self._announced = set[str]()

    def read(self, prompts: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        """The prompts, checked."""
        return read_prompts(prompts, self.backbone.media)

    def features(self, prompts: Sequence[Prompt]) -> list[VisionFeatures | None]:
        """The vision tower's output, by passes of at most max_tokens media tokens."""
        return self.backbone.vision_features(prompts, self.max_tokens)

    def modes(self, planned: Sequence[Tree]) -> list[str]:
        """ "packed", "suffix" or "plain" for each prompt."""
        return [self._mode(tree) for tree in planned]

    def hidden(
        self,
        prompts: Sequence[Prompt],
        planned: Sequence[Tree],
        features: Sequence[VisionFeatures | None] | None,
    ) -> Tensor:
        """Hidden states [T, D] of everything wanted, by prompt, by branch."""
        modes = self.modes(planned)
        if features is not None and len(features) != len(prompts):
            raise ValueError(f"features: got {len(features)}, wanted one for each of {len(prompts)} prompts")

        def rows() -> Tensor:
            call = self._call(prompts, planned, modes, features)
            return wanted_rows(call, planned, self._check(call, planned, modes))

        return self.backbone.forward_pass(rows)

    def _mode(self, tree: Tree) -> str:
        """How to run one prompt; announces a plain path that was not asked for."""
        if self.packing == "plain":
            return "plain"
        why, window = self._distrusted or self.backbone.why_plain, self.backbone.window
        if why is None and window is not None and tree.longest > window:
            why = f"{tree.longest} tokens are more than the model's sliding window of {window}"
        if why is not None:
            if self.packing != "auto" and self._distrusted is None:
                raise ValueError(f'packing: got {self.packing!r}, but {why}; use "auto" or "plain"')
            self._announce(why)
            return "plain"
        cacheable = self.backbone.cacheable
        if self.packing == "suffix" and not cacheable:
            raise ValueError(
                'packing: got "suffix" under gradient checkpointing, where transformers keeps no keys; '
                'wanted "packed" or "auto"'
            )
        if self.packing != "auto":
            return self.packing
        dense = self.backbone.attention != "sdpa"
        return choose(tree, self.max_tokens, dense=dense, cacheable=cacheable, width=self.backbone.width)

    def _announce(self, why: str) -> None:
        kind = "window" if "sliding window" in why else why
        if kind not in self._announced:
            self._announced.add(kind)
            warnings.warn(f"raise_core.Scorer runs each completion by itself: {why}", stacklevel=5)

    def _call(
        self,
        prompts: Sequence[Prompt],
        planned: Sequence[Tree],
        modes: Sequence[str],
        features: Sequence[VisionFeatures | None] | None,
    ) -> Call:
        """Positions of every prompt; features of those that are run in pieces."""
        merged = [t.index for t, m in zip(planned, modes, strict=True) if t.wanted and self._merged(t, m)]
        if features is None:
            got = dict(zip(merged, self.features([prompts[i] for i in merged]), strict=True))
            features = [got.get(i) for i in range(len(prompts))]
        positions = {
            t.index: self.backbone.positions(prompts[t.index], t.longest)
            for t in planned
            if t.wanted and (self.backbone.why_plain is None or self.backbone.family)
        }
        return Call(self.backbone, prompts, features, positions, self.max_tokens)

    def _merged(self, tree: Tree, mode: str) -> bool:
        """Whether the media are put into the embeddings here, not by the model's own forward pass."""
        if not self.backbone.family:
            return False
        kinds = self.backbone.media.kinds
        ids = torch.tensor([i for b in tree.branches for i in b.ids], dtype=torch.long)
        return mode != "plain" or bool(kinds(ids).any())

    def _check(self, call: Call, planned: Sequence[Tree], modes: list[str]) -> list[str]:
        """The modes, all "plain" when the first group of a kind does not agree with its plain pass."""
        if "head" in self._unchecked:
            fault = head_fault(self.backbone)
            if fault is not None:
                raise ValueError(
                    f"model: {fault}; wanted a head that is a linear layer with a cap and a scale"
                )
            self._unchecked.discard("head")
        for tree, mode in zip(planned, modes, strict=True):
            prompt = call.prompts[tree.index]
            kind = KINDS[prompt.has(IMAGE), prompt.has(VIDEO)]
            if mode == "plain" or kind not in self._unchecked or len(list(tree.limbs())) < 2:
                continue
            self._unchecked.discard(kind)
            fault = group_fault(call, tree, mode)
            if fault is not None:
                self._distrusted = f"a packed group with {kind} disagrees with its plain passes: {fault}"
                warnings.warn(
                    f"raise_core.Scorer: {self._distrusted}; every completion is run by itself from now on",
                    RuntimeWarning,
                    stacklevel=5,
                )
                self._announced.add(self._distrusted)
                return ["plain"] * len(modes)
        return modes
