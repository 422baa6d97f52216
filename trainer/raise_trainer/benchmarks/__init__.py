"""Benchmarks of video question answering: published files to questions, answers, scores. docs/evaluate.md.

Import from the files: a decoding process loads `clips.py`, and never PyTorch.
"""
