"""Learn the data mixture of a Megatron-LM run by merging domain experts (MergeMix)."""

__version__ = "0.1.0"
