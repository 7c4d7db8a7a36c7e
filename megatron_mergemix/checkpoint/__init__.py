"""Megatron checkpoints, torch_dist and legacy: finding, describing, checking, reading."""
