"""Reward operations over exact answer spans: spans, verifiers, SCRE, IGSR, advantages, policy losses."""

from .advantages import group_advantages
from .ema import EmaReference
from .policy_loss import PolicyLoss, pack, policy_loss
from .spans import Found, Spans, build_spans, find_answer_spans, find_step_spans
from .verify import Verdict, verify, verify_details

__all__ = [
    "EmaReference",
    "Found",
    "PolicyLoss",
    "Spans",
    "Verdict",
    "build_spans",
    "find_answer_spans",
    "find_step_spans",
    "group_advantages",
    "pack",
    "policy_loss",
    "verify",
    "verify_details",
]
