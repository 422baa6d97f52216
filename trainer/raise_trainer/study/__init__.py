"""The study in miniature: published rewards on the demo world, paired by seed, at equal compute.

`command` reads the arguments, `run` shares the runs out over processes, `one` is one of them, `page` writes
docs/study.md from what is recorded.
"""
