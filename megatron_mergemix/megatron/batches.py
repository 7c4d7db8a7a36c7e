"""Training batches: Megatron's own blended dataset over a list of prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mergemix.data.index_cache import remove_torn
from megatron_mergemix.megatron.device import device
from megatron_mergemix.processes.distributed import rank, together


@dataclass(frozen=True)
class TokenInfo:
    """What Megatron's datasets ask of a tokenizer: they read tokens and never see text."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """Return what the cache keys of the datasets are made of."""
        return {"vocab_size": self.vocab_size, "eod": self.eod}


def blended_dataset(
    blend: Sequence[tuple[float, str]],
    *,
    split: str,
    num_samples: int,
    seq_length: int,
    seed: int,
    tokens: TokenInfo,
    cache: Path,
) -> torch.utils.data.Dataset:
    """Collective: return Megatron's dataset over the training part of ``split``.

    Args:
        blend: weight and prefix pairs; weights are shares of samples.
        split: Megatron's split string; only its first part is built.
        num_samples: samples of ``seq_length`` tokens that will be drawn.
        seq_length: tokens per sample.
        seed: of Megatron's document and sample shuffling.
        tokens: vocabulary facts.
        cache: folder for index files, shared by all ranks.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    with together():
        if rank() == 0:
            remove_torn(cache)
    prefixes = [prefix for _, prefix in blend]
    weights = [weight for weight, _ in blend] if len(blend) > 1 else None
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(prefixes, weights),
        split=split,
        path_to_cache=str(cache),
        tokenizer=tokens,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # Validation has its own held-out datasets here; building Megatron's costs time for nothing.
    config.split_matrix = [config.split_matrix[0], None, None]
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config)
    return builder.build()[0]


def training_batches(
    dataset: torch.utils.data.Dataset,
    *,
    first_sample: int,
    global_batch_size: int,
    micro_batch_size: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this data-parallel rank's micro-batches in order, starting at ``first_sample``.

    Sample ``i`` of a global batch goes to data-parallel rank ``i // (batch per rank)``. All ranks
    of a model-parallel group yield the same micro-batches, so nothing has to be broadcast.

    Yields:
        ``{"tokens", "labels", "position_ids"}``, int64, each ``[micro_batch_size, seq_length]``.
    """
    from megatron.core import parallel_state

    data_rank = parallel_state.get_data_parallel_rank()
    per_rank = global_batch_size // parallel_state.get_data_parallel_world_size()
    start = first_sample
    while True:
        for offset in range(0, per_rank, micro_batch_size):
            first = start + data_rank * per_rank + offset
            samples = [dataset[index] for index in range(first, first + micro_batch_size)]
            yield {
                name: torch.stack([sample[name] for sample in samples]).to(device())
                for name in ("tokens", "labels", "position_ids")
            }
        start += global_batch_size
