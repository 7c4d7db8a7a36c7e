"""What ``mix.yaml`` may say, and what is wrong with what it says; start with ``settings.py``."""

from megatron_mergemix.config.search import Search
from megatron_mergemix.config.settings import (
    Base,
    Blend,
    Config,
    Domain,
    Model,
    ModelFacts,
    Parallel,
    Slurm,
    Tokenizer,
    load_config,
)

__all__ = [
    "Base",
    "Blend",
    "Config",
    "Domain",
    "Model",
    "ModelFacts",
    "Parallel",
    "Search",
    "Slurm",
    "Tokenizer",
    "load_config",
]
