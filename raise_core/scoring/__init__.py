"""Scoring whole groups: a prompt run once, its completions as branches of a tree."""
