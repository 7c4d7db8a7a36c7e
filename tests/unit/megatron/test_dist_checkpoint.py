"""What is never read from a checkpoint."""

from __future__ import annotations

from megatron_mergemix.megatron.dist_checkpoint import without_extra_state


def test_no_opaque_state_is_asked_for_however_many_a_layer_has() -> None:
    grouped = "decoder.layers.0.mlp.experts.linear_fc1"
    state = {
        f"{grouped}.weight0": 1,
        f"{grouped}.weight10": 2,
        f"{grouped}._extra_state": 3,
        f"{grouped}._extra_state1": 4,
        f"{grouped}._extra_state10": 5,
        "output_layer._extra_state": 6,
        "_extra_state_of_mine.weight": 7,
    }
    assert list(without_extra_state(state).values()) == [1, 2, 7]
