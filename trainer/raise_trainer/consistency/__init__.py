"""Does an answer follow from its chain of thought, and does confidence say so: `raise-core consistency`."""
