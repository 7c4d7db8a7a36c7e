"""Models that are really trained beside merges: scores, rank fidelity, and what both cost."""
