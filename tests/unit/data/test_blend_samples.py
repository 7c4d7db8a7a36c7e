"""What Megatron's own dataset builder draws from a blend that was written here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list

from megatron_mergemix.config import Domain
from megatron_mergemix.data.blend import blend_arguments, blend_of
from megatron_mergemix.data.indexed import IndexedDataset

SEQ_LENGTH = 8
NUM_SAMPLES = 1000
SIZES = {"a": 240, "b": 60, "c": 150, "d": 7}


@pytest.fixture
def prefixes(tmp_path: Path) -> dict[str, str]:
    """Datasets whose every token tells which dataset it is from."""
    rng = np.random.default_rng(0)
    for token, (name, num_documents) in enumerate(SIZES.items(), start=1):
        builder = IndexedDatasetBuilder(f"{tmp_path / name}.bin", dtype=np.uint8)
        for length in rng.integers(3, 40, num_documents):
            builder.add_document(np.full(length, token), [int(length)])
        builder.finalize(f"{tmp_path / name}.idx")
    return {name: str(tmp_path / name) for name in SIZES}


def megatron_datasets(words: list[str], split: str, sizes: list[int]) -> list:
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LENGTH,
        blend=get_blend_from_list(words),
        split=split,
        tokenizer=SimpleNamespace(unique_identifiers={}, vocab_size=257, eod=0, pad=0),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def drawn(dataset: object, prefixes: dict[str, str]) -> Counter[str]:
    """Return how many of the first NUM_SAMPLES samples each prefix supplied."""
    counts: Counter[str] = Counter()
    for index in range(NUM_SAMPLES):
        tokens = set(dataset[index]["tokens"].tolist())  # type: ignore[index]
        assert len(tokens) == 1
        counts[list(prefixes.values())[tokens.pop() - 1]] += 1
    return counts


@pytest.mark.parametrize(
    "mixture",
    [
        {"math": 0.6, "code": 0.3, "web": 0.1},
        {"math": 1 / 3, "code": 1 / 3, "web": 1 / 3},
        {"math": 0.999, "web": 0.001},
        {"code": 1.0},
    ],
)
def test_every_prefix_supplies_its_share_of_the_samples(
    prefixes: dict[str, str], mixture: dict[str, float]
) -> None:
    domains = {
        "math": Domain(prefixes=[prefixes["a"], prefixes["b"]]),
        "code": Domain(prefixes=[prefixes["c"]]),
        "web": Domain(prefixes={prefixes["d"]: 1.0}),
    }
    split = "90,10,0"
    blend = blend_of(mixture, domains, split)
    train = megatron_datasets(blend_arguments(blend), split, [NUM_SAMPLES, 0, 0])[0]
    counts = drawn(train, prefixes)
    assert set(counts) == {prefix for _, prefix in blend}
    for weight, prefix in blend:
        assert abs(counts[prefix] - NUM_SAMPLES * weight) <= 1
    for name, domain in domains.items():
        share = sum(counts[prefix] for prefix in domain.prefixes) / NUM_SAMPLES
        assert abs(share - mixture.get(name, 0.0)) <= len(domain.prefixes) / NUM_SAMPLES


def test_a_millionth_is_a_weight_megatron_builds(prefixes: dict[str, str]) -> None:
    domains = {name: Domain(prefixes=[prefixes[name]]) for name in "ad"}
    blend = blend_of({"a": 1 - 1e-9, "d": 1e-9}, domains, "1,0,0")
    train = megatron_datasets(blend_arguments(blend), "1,0,0", [NUM_SAMPLES, 0, 0])
    assert drawn(train[0], prefixes)[prefixes["a"]] >= NUM_SAMPLES - 1


@pytest.mark.parametrize("split", ["90,10,0", "9, 30, 1", "1,1,1"])
def test_token_counts_per_part_are_those_of_megatrons_datasets(
    prefixes: dict[str, str], split: str
) -> None:
    parts = megatron_datasets([prefixes["a"]], split, [1, 1, 1])
    ours = IndexedDataset(prefixes["a"])
    for which, part in zip(("train", "valid", "test"), parts, strict=True):
        indices = [] if part is None else part.indices
        assert ours.tokens_in_split(split, which) == sum(ours.lengths[index] for index in indices)
        assert list(ours.sequences_in_split(split, which)) == list(indices)
