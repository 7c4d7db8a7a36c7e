"""Saving and loading on real ranks: what does not fit is refused, what is foreign never runs."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.test_resident import start
from tests.support.run_distributed import run_distributed


def load_into_other_models(config_path: Path, changes: list[list[str]]) -> list[str]:
    """Save a fresh model of the first changes, load it into models of the others; what is said."""
    from megatron_mergemix.config import load_config
    from megatron_mergemix.errors import CheckpointError
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.dist_checkpoint import load_model, save
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.model_facts import vocab_size

    saved, *others = (load_config(config_path, [*PIPELINE, *change]) for change in changes)
    parallel.start(saved.parallel)
    chunks = build_model(saved, vocab_size(saved), seed=0)
    path = save(config_path.parent / "other_model", 1, chunks, training={}, keep=1)
    messages = []
    for other in others:
        try:
            load_model(path, build_model(other, vocab_size(other), seed=1))
            messages.append("no error")
        except CheckpointError as error:
            messages.append(str(error))
    return messages


PIPELINE = ["parallel.tensor=1", "parallel.pipeline=2"]
"""Each rank asks for other names, so that what one rank does not ask for is not superfluous yet."""


def test_a_model_of_another_shape_is_refused_before_anything_is_read(
    trained_experiment: Path,
) -> None:
    changes = [[], ["model.hidden_size=64"]]
    for messages in run_distributed(load_into_other_models, 2, trained_experiment, changes):
        assert "does not fit the model" in messages[0]
        assert "more" in messages[0]


def test_tensors_that_the_model_section_does_not_have_are_refused(
    trained_experiment: Path,
) -> None:
    learned = "model.position_embedding=learned_absolute"
    changes = [["model.tie_embeddings=false", learned], [], ["model.tie_embeddings=false", learned]]
    for messages in run_distributed(load_into_other_models, 2, trained_experiment, changes):
        assert "output_layer.weight is in the checkpoint only" in messages[0]
        assert "embedding.position_embeddings.weight is in the checkpoint only" in messages[0]
        assert messages[1] == "no error"


def test_another_precision_is_refused_instead_of_rounding_task_vectors_away(
    trained_experiment: Path,
) -> None:
    changes = [[], ["model.precision=bf16"]]
    for messages in run_distributed(load_into_other_models, 2, trained_experiment, changes):
        assert "are float32, the model has bfloat16: set model.precision to fp32" in messages[0]


def test_an_architecture_that_tensors_do_not_show_is_refused(trained_experiment: Path) -> None:
    changes = [
        ["model.norm_epsilon=1.0e-4"],
        ["model.norm_epsilon=1.0e-4"],
        ["model.num_attention_heads=2", "model.rotary_base=500000"],
    ]
    for messages in run_distributed(load_into_other_models, 2, trained_experiment, changes):
        assert messages[0] == "no error"
        for problem in (
            "model.num_attention_heads is 2, the checkpoint was saved with 4",
            "model.rotary_base is 500000, the checkpoint was saved with 10000",
            "model.norm_epsilon is 1e-05, the checkpoint was saved with 0.0001",
        ):
            assert problem in messages[1]


def load_a_planted_extra_state(config_path: Path) -> tuple[bool, int]:
    """Save a payload in every ``_extra_state`` and load it; say whether it ran, and how many."""
    from megatron.core.dist_checkpointing import ShardedObject

    from megatron_mergemix.megatron import dist_checkpoint

    _, chunks = start(config_path, (1, 1, 1))
    whole = dist_checkpoint.model_state
    planted = 0

    def with_payload(live):
        nonlocal planted
        state = whole(live)
        for value in state["model"].values():
            if isinstance(value, ShardedObject):
                value.data = Payload(config_path.parent / "payload_ran")
                planted += 1
        return state

    dist_checkpoint.model_state = with_payload
    path = dist_checkpoint.save(config_path.parent / "planted", 1, chunks, training={}, keep=1)
    dist_checkpoint.model_state = whole
    dist_checkpoint.load_model(path, chunks)
    return (config_path.parent / "payload_ran").exists(), planted


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_an_extra_state_never_runs(trained_experiment: Path) -> None:
    ((ran, planted),) = run_distributed(load_a_planted_extra_state, 1, trained_experiment)
    assert planted > 0
    assert not ran


def save_twice(config_path: Path) -> list[str]:
    """Save two times and keep one; return what was done to the root's names, in order."""
    from megatron_mergemix.megatron import dist_checkpoint

    _, chunks = start(config_path, (1, 1, 1))
    root = config_path.parent / "saved_twice"
    dist_checkpoint.save(root, 1, chunks, training={}, keep=1)
    done: list[str] = []
    sync, replace = dist_checkpoint.sync_folder, dist_checkpoint.os.replace

    def record_sync(path: Path) -> None:
        done.append(f"sync {Path(path).name}")
        sync(path)

    def record_replace(source, target) -> None:
        if "iter_" in str(target):
            done.append(Path(target).name)
        replace(source, target)

    dist_checkpoint.sync_folder, dist_checkpoint.os.replace = record_sync, record_replace
    dist_checkpoint.save(root, 2, chunks, training={}, keep=1)
    return done


def test_a_save_survives_a_power_failure_before_older_ones_are_removed(
    trained_experiment: Path,
) -> None:
    (done,) = run_distributed(save_twice, 1, trained_experiment)
    assert done == ["iter_0000002", "sync saved_twice", ".removing_iter_0000001"]
