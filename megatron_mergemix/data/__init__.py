"""Data: indexed datasets, tokenizers, text into datasets, and blends."""
