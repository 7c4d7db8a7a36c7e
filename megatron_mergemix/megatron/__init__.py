"""Megatron Core: models, passes over them, training, saves. Elsewhere only the plugin has it."""
