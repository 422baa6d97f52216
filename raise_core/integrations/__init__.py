"""The rewards in the trainers people use: one file for each of them, imported by its name, patching nothing.

trl, verl, ms_swift, easyr1, openrlhf, slime, video_r1; `common` is the path from log-probabilities to rewards
for any other trainer. None of them imports its trainer.
"""
