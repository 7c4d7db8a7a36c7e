"""Merge arithmetic on plain tensors: no files, no ranks."""
