"""Megatron ``torch_dist`` checkpoints on disk: finding, describing, checking, reading."""
