"""Reward operations over exact answer spans: spans, verifiers, SCRE, IGSR, advantages, policy losses."""
