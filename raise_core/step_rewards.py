"""From step scores to rewards, to advantages of tokens, and to a reward model's loss; pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from raise_core.advantages import Scale, group_advantages
from raise_core.spans import Spans

STEP_SHARE = 0.2  # the best of 0 to 1 for best-of-16 in the paper


def trajectory_reward(
    step_scores: Tensor,  # [K]
    offsets: Tensor,  # [B+1] integer
    answer_score: Tensor,  # [B]
    step_share: float = STEP_SHARE,
) -> Tensor:
    """Reward of each of B completions, [B] in [0, 1] (Chain-of-Step, arXiv 2509.19003).

        reward = step_share * mean(step scores) + (1 - step_share) * answer score

    step_scores [K] in [0, 1]: of all steps, packed; completion b has the steps offsets[b]:offsets[b+1].
    answer_score [B] in [0, 1]: a PRM's score at the tag after the answer, or a verifier's. A completion
    without steps has a step mean of 0, never of 1; score a missing answer 0. fp32 (fp64 for fp64 scores), no
    gradient. Raises ValueError / TypeError naming the argument.
    """
    if not 0.0 <= step_share <= 1.0:
        raise ValueError(f"step_share: got {step_share}, wanted a number from 0 to 1")
    for name, values in (("step_scores", step_scores), ("answer_score", answer_score)):
        _check_scores(name, values)
    if offsets.dtype.is_floating_point or offsets.ndim != 1 or len(offsets) != len(answer_score) + 1:
        raise ValueError(
            f"offsets: got {offsets.dtype} of shape {list(offsets.shape)}, wanted {len(answer_score) + 1} "
            "integers: where each completion's steps begin, and how many there are in all"
        )
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != len(step_scores) or bounds != sorted(bounds):
        raise ValueError(
            f"offsets: got {bounds[:8]}, wanted bounds that rise from 0 to {len(step_scores)}; for counts n "
            "use cat([0, cumsum(n)])"
        )
    counts = offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(counts), device=offsets.device), counts)
    total = torch.zeros(len(counts), dtype=torch.float64).index_add_(
        0, owner.cpu(), step_scores.detach().to("cpu", torch.float64)
    )
    mean = total / counts.cpu().clamp(min=1)
    reward = step_share * mean + (1 - step_share) * answer_score.detach().to("cpu", torch.float64)
    wide = torch.float64 if answer_score.dtype == torch.float64 else torch.float32
    return reward.to(answer_score.device, wide)


def _check_scores(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or not values.dtype.is_floating_point or values.ndim != 1:
        got = f"{values.dtype} of shape {list(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise TypeError(f"{name}: got {got}, wanted a floating tensor of one dimension")
    wrong = (~((values >= 0) & (values <= 1))).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{name}[{at}]: got {float(values[at])}, wanted a score from 0 to 1; drop the completion or "
            "score it 0"
        )


def step_advantages(
    step_scores: Tensor,  # [K]
    steps: Spans,
    num_tokens: int,
    *,
    scale: Scale = "group",
    min_std: float = 0.02,
) -> Tensor:
    """Advantage of each token from its step's score, [num_tokens]; 0 for a token of no step.

    Each step is measured against all steps of its prompt: `group_advantages` of the scores, with `scale` and
    `min_std` in units of score, so that a longer chain weighs more in the mean. Every token of a step has its
    step's advantage.
    steps: K spans over packed completion tokens, as `build_spans(found, completion_ids, first_rows, group)`
        makes of `find_step_spans`, with first_rows[b] = the place of completion b's first token among the
        `num_tokens` tokens. Where steps overlap, a token has the sum.
    To weigh steps against outcomes add outcome advantages token by token: a * outcome[owner] + b * this.
    fp32 (fp64 for fp64 scores), on the device of step_scores, no gradient. Raises ValueError for scores that
    are not finite, and for steps beyond num_tokens.
    """
    if len(step_scores) != len(steps):
        raise ValueError(f"step_scores: got {len(step_scores)}, wanted one for each of {len(steps)} steps")
    rows = steps.rows.cpu()
    if len(rows) and int(rows.max()) >= num_tokens:
        raise ValueError(
            f"num_tokens: got {num_tokens}, but a step holds token {int(rows.max())}; wanted the number of "
            "packed completion tokens, with first_rows where each completion begins among them"
        )
    each = group_advantages(step_scores, steps.group, scale=scale, min_std=min_std)
    per_token = each.cpu().repeat_interleave(steps.lengths.cpu())
    out = torch.zeros(num_tokens, dtype=each.dtype).index_add_(0, rows, per_token)
    return out.to(step_scores.device)


def step_loss(margins: Tensor, targets: Tensor, num_tags: float) -> Tensor:
    """What a process reward model is trained to minimise: a scalar in nats, differentiable in margins.

        loss = -2 / num_tags * sum_t [y_t * log sigmoid(d_t) + (1 - y_t) * log sigmoid(-d_t)]

    margins d [K]: `step_margins`. targets y [K] in [0, 1]: 1 good, 0 bad, 0.5 neutral; a share of rollouts
    that came out right is one too. This is the binary cross-entropy over both tokens of Chain-of-Step (arXiv
    2509.19003), in which a neutral step is labelled neither good nor bad: each term counts twice, and a
    neutral step's optimum is a score of 0.5. num_tags: tags of the whole optimiser step, so that the
    gradients of its micro-batches add up; 0 counts as 1. Raises ValueError for shapes or targets that do not
    fit.
    """
    if margins.shape != targets.shape or margins.ndim != 1:
        raise ValueError(
            f"margins, targets: got shapes {list(margins.shape)} and {list(targets.shape)}, "
            "wanted the same [K]"
        )
    _check_scores("targets", targets)
    y = targets.to(margins.device, margins.dtype)
    each = y * torch.nn.functional.logsigmoid(margins) + (1 - y) * torch.nn.functional.logsigmoid(-margins)
    return -2.0 * each.sum() / max(num_tags, 1)
