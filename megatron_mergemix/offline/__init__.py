"""Commands that work on checkpoints on disk: merge, average, inspect."""
