"""The settings of a loss on their way from `Method` to the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import raise_core as rc
from raise_trainer.errors import UserError
from raise_trainer.method import Method
from raise_trainer.update import Group, policy_step
from tests.budget import assert_as_exact_as_fp32
from tests.tiny_models import completions, text_model, text_prompt

LENGTHS = [4, 7, 5]
# What of Method reaches `policy_loss`, by the name it has there.
GIVEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"loss": "grpo", "clip": (0.1, 0.3)}, {"kind": "grpo", "eps_low": 0.1, "eps_high": 0.3}),
    (
        {"loss": "dapo", "clip": (0.1, 0.3, 1.4)},
        {"kind": "dapo", "eps_low": 0.1, "eps_high": 0.3, "dual_clip": 1.4},
    ),
    ({"loss": "gspo", "clip": (0.01, 0.02)}, {"kind": "gspo", "eps_low": 0.01, "eps_high": 0.02}),
    ({"loss": "cispo", "clip": (0.1, 0.3)}, {"kind": "cispo", "max_ratio": 1.3}),
    ({"loss": "sapo"}, {"kind": "sapo"}),
    ({"kl": 0.5, "kl_estimator": "k1"}, {"kind": "dr_grpo", "kl": 0.5, "kl_estimator": "k1"}),
    ({"kl": 0.5, "kl_estimator": "k2"}, {"kind": "dr_grpo", "kl": 0.5, "kl_estimator": "k2"}),
    ({"kl": 0.5}, {"kind": "dr_grpo", "kl": 0.5, "kl_estimator": "k3"}),
]


@pytest.mark.parametrize(("settings", "options"), GIVEN)
def test_the_loss_of_an_update_is_that_of_its_settings(
    settings: dict[str, Any], options: dict[str, Any]
) -> None:
    """Off-policy, each number of a setting shows in the loss; metrics are the library's."""
    scorer = rc.Scorer(text_model("Llama").double())
    prompt, texts = text_prompt(6), completions(LENGTHS)
    with torch.no_grad():
        logp = torch.cat([stats.logp for stats in scorer.token_stats([prompt], [texts])[0]])
    g = torch.Generator().manual_seed(0)
    old, ref = (logp + 0.5 * torch.randn(sum(LENGTHS), generator=g, dtype=torch.float64) for _ in range(2))
    advantage = torch.tensor([1.0, -0.5, -0.7], dtype=torch.float64)
    method = Method(group_size=3, max_new_tokens=9, **settings)
    groups = [Group(prompt, texts, advantage, ref if method.kl else None, old)]
    figures = policy_step(scorer, torch.optim.SGD(scorer.model.parameters(), lr=0.0), groups, method)
    want = rc.policy_loss(
        logp, old, advantage, torch.tensor([0, *LENGTHS]).cumsum(0), num_tokens=16,
        num_sequences=3, max_length=9, logp_ref=ref if method.kl else None, **options,
    )  # fmt: skip
    for name, value in (want.metrics | {"loss": want.loss}).items():
        assert_as_exact_as_fp32(figures[name], value.item(), name=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "cispo", "clip": (0.2, 0.2, 3.0)}, r"clip: got \[0.2, 0.2, 3.0\] with loss cispo"),
        (
            {"loss": "sapo", "clip": (0.2, 0.2, 3.0)},
            "with loss sapo; a third number is above 1, and the dual clip",
        ),
        ({"loss": "grpo", "clip": (0.2, 0.2, 1.0)}, "clip of grpo, dapo, dr_grpo, gspo; give two"),
        (
            {"loss": "grpo", "clip": (1.5, 0.2)},
            "clip: got .* the first number is the share below 1, at most 1",
        ),
    ],
)
def test_a_clip_that_the_loss_does_not_have_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Method(group_size=2, max_new_tokens=4, **settings)
    Method(group_size=2, max_new_tokens=4, loss="sapo", clip=(1.5, 0.2))
