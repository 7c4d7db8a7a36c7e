from __future__ import annotations

import pytest
import torch

from megatron_mergemix.checkpoint.checks import check_compatible, check_intact
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.errors import CheckpointError
from tests.support.torch_dist import write_checkpoint

EMBEDDING = "embedding.word_embeddings.weight"
BASE = {
    EMBEDDING: torch.ones(8, 3),
    "decoder.layers.fc.weight": torch.ones(2, 4, 3, dtype=torch.bfloat16),
    "decoder.final_layernorm.weight": torch.ones(3),
    "output_layer.weight": torch.ones(8, 3),
}


@pytest.fixture
def base(tmp_path):
    return read_index(write_checkpoint(tmp_path / "base", BASE))


@pytest.fixture
def expert(tmp_path):
    """Make an expert from the base's tensors and some changes; None removes a tensor."""

    def make(changes, grids=None):
        tensors = {name: t for name, t in (BASE | changes).items() if t is not None}
        return read_index(write_checkpoint(tmp_path / "expert", tensors, grids))

    return make


def differences(base, **experts):
    with pytest.raises(CheckpointError) as error:
        check_compatible(base, experts)
    return str(error.value)


def test_other_chunks_and_optimizer_state_are_compatible(base, expert):
    other = expert(
        {"optimizer.state.exp_avg.output_layer.weight": torch.ones(5)}, {EMBEDDING: (4, 1)}
    )
    check_compatible(base, {"math": other, "code": base})


def test_missing_and_added_tensors_are_named_with_the_expert(base, expert):
    other = expert({"decoder.final_layernorm.weight": None, "decoder.bias": torch.ones(3)})
    text = differences(base, code=base, math=other)
    who = f"Expert 'math' ({other.path})"
    assert f"{who} lacks tensors of the base: decoder.final_layernorm.weight." in text
    assert f"{who} has tensors that the base lacks: decoder.bias." in text
    assert text.endswith("All experts must be trained from the base.")
    assert "'code'" not in text


def test_other_shapes_and_dtypes_are_shown_on_both_sides(base, expert):
    other = expert(
        {
            "decoder.final_layernorm.weight": torch.ones(4),
            "decoder.layers.fc.weight": torch.ones(2, 4, 3),
        }
    )
    text = differences(base, math=other)
    assert "other shapes: decoder.final_layernorm.weight is (4,) in it, (3,) in the base." in text
    assert "other dtypes: decoder.layers.fc.weight is float32 in it, bfloat16 in the base." in text


def test_at_most_five_problems_of_a_kind_are_named(base, expert):
    other = expert({f"extra.{i}": torch.ones(1) for i in range(7)})
    assert (
        "extra.0, extra.1, extra.2, extra.3, extra.4, and 2 more."
        in differences(base, math=other).splitlines()[0]
    )


def test_other_padding_of_the_vocabulary_has_its_own_message(base, expert):
    other = expert({EMBEDDING: torch.ones(16, 3), "output_layer.weight": torch.ones(16, 3)})
    text = differences(base, math=other)
    assert f"{EMBEDDING} is 16 rows in it, 8 rows in the base" in text
    assert "output_layer.weight is 16 rows in it, 8 rows in the base" in text
    assert "make_vocab_size_divisible_by" in text
    assert "other shapes" not in text


def test_a_vocabulary_tensor_of_another_width_is_no_matter_of_padding(base, expert):
    text = differences(base, math=expert({EMBEDDING: torch.ones(16, 4)}))
    assert f"other shapes: {EMBEDDING} is (16, 4) in it, (8, 3) in the base" in text
    assert "make_vocab_size_divisible_by" not in text


def test_every_expert_that_differs_is_reported(base, expert):
    other = expert({"decoder.final_layernorm.weight": None})
    text = differences(base, math=other, code=other)
    assert "Expert 'math'" in text
    assert "Expert 'code'" in text


def test_an_intact_checkpoint_passes_and_may_have_longer_files(base):
    check_intact(base)
    with (base.path / "__0_0.distcp").open("ab") as file:
        file.write(b"0" * 10)
    check_intact(base)


def test_missing_and_truncated_files_are_named_with_their_lengths(base):
    (base.path / "__0_0.distcp").unlink()
    path = base.path / "__1_0.distcp"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError) as error:
        check_intact(base)
    assert f"Checkpoint {base.path} is damaged: __0_0.distcp is missing, " in str(error.value)
    expected = f"__1_0.distcp has {len(whole) - 1} bytes, expected at least {len(whole)}"
    assert expected in str(error.value)


def test_a_truncated_file_is_found_through_its_opaque_entries(tmp_path):
    folder = write_checkpoint(tmp_path, {}, objects={"a._extra_state/shard_0_1": b"123"})
    (folder / "__0_0.distcp").write_bytes(b"12")
    with pytest.raises(CheckpointError, match="has 2 bytes, expected at least 3"):
        check_intact(read_index(folder))


def test_a_link_to_nowhere_counts_as_missing(base):
    (base.path / "__0_0.distcp").unlink()
    (base.path / "__0_0.distcp").symlink_to(base.path / "gone")
    with pytest.raises(CheckpointError, match="__0_0.distcp is missing"):
        check_intact(base)
