"""Iterative preference optimisation: paths sampled, scored by a PRM, paired best against worst."""
