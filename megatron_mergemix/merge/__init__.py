"""Merges: arithmetic on tensors, and checkpoints on disk merged piece by piece. No ranks."""
