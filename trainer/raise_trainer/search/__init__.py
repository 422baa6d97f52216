"""Search at inference: pass@N, self-consistency, best-of-N by a PRM, and beam search over steps."""
