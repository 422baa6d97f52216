"""T-GRPO's bonus: questions are asked once more with the frames of their videos shuffled."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raise_core.bonuses import temporal_bonus

from .errors import UserError
from .prompts import Prompt
from .rollout import Rollout
from .scoring import Scored


@dataclass(frozen=True)
class Shuffled:
    """What to sample on shuffled frames: prompts, their indices among all, and draws for G // 2 of each."""

    prompts: list[Prompt]
    index: list[int]
    draws: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt], draws: Tensor, group_size: int, model: Any) -> "Shuffled":
        """The prompts with a video, G = group_size. Order and draws are functions of the prompt's own draws.

        So they depend on seed, step and place alone, as those do (`rollout.draws`), and not on the number of
        processes or restarts.
        """
        made, index, taken = list[Prompt](), list[int](), [draws.new_zeros(0, draws.shape[1])]
        for p, prompt in enumerate(prompts):
            if "pixel_values_videos" not in prompt.inputs:
                continue
            own = draws[p * group_size].contiguous().numpy().tobytes()
            digest = hashlib.sha256(b"shuffled frames" + own).digest()
            source = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            made.append(shuffled(prompt, model, source))
            index.append(p)
            taken.append(torch.rand(group_size // 2, draws.shape[1], dtype=torch.float64, generator=source))
        return cls(made, index, torch.cat(taken))


def shuffled(prompt: Prompt, model: Any, source: torch.Generator) -> Prompt:
    """The prompt with its video's frames in another order; positions, times and text stay.

    The same as preprocessing the shuffled frames: a patch holds `temporal_patch_size` frames in its columns
    [channel, frame, height, width], and an odd number of frames ends with the last one again. UserError for a
    model whose inputs are laid out otherwise.
    """
    vision = getattr(model.config, "vision_config", None)
    depth, side = (getattr(vision, name, None) for name in ("temporal_patch_size", "patch_size"))
    grid = prompt.inputs.get("video_grid_thw")
    if not isinstance(depth, int) or not isinstance(side, int) or grid is None or len(grid) != 1:
        raise UserError("bonus t-grpo: needs a model with the video inputs of Qwen2-VL; drop it from `bonus`")
    patches, times = prompt.inputs["pixel_values_videos"], int(grid[0, 0])
    count = times * depth if prompt.thumbnails is None else len(prompt.thumbnails)
    order = torch.randperm(count, generator=source)
    places = torch.cat([order, order[-1:].expand(times * depth - count)])
    # [time, patch of a frame, channel, frame of the time, pixel]
    whole = patches.view(times, -1, patches.shape[1] // (depth * side**2), depth, side**2)
    frames = whole.permute(0, 3, 1, 2, 4).flatten(0, 1)[places]
    mixed = frames.unflatten(0, (times, depth)).permute(0, 2, 3, 1, 4).reshape(patches.shape)
    seen = None if prompt.thumbnails is None else prompt.thumbnails[order]
    return replace(
        prompt, inputs=prompt.inputs | {"pixel_values_videos": mixed}, thumbnails=seen, medium=None
    )


def with_bonus(
    scored: Scored, rollout: Rollout, index: Sequence[int], other: Rollout, tokenizer: Any, weight: float
) -> Scored:
    """`scored`, of `rollout`, with the bonus; `other` has the completions on shuffled frames.

    index: of each prompt of `other` among those of `rollout`. Their text scores are all that is taken from
    them. Adds the figures t_grpo_share and shuffled_text_score_mean (0 without a video).
    """
    rows = [other.prompts[p].row for p in other.owner]
    answers = [tokenizer.decode(ids) for ids in other.completions]
    mixed = torch.tensor([row.text_score(text) for row, text in zip(rows, answers, strict=True)])
    bonus = temporal_bonus(
        scored.score,
        mixed.to(scored.score),
        torch.tensor(rollout.owner),
        torch.tensor([index[p] for p in other.owner], dtype=torch.long),
        weight=weight,
    )
    reward = scored.reward + bonus
    figures = {
        "reward_mean": float(reward.mean()),
        "t_grpo_share": float((bonus > 0).float().mean()),
        "shuffled_text_score_mean": float(mixed.mean()) if len(mixed) else 0.0,
    }
    return replace(scored, reward=reward, metrics=scored.metrics | figures)
