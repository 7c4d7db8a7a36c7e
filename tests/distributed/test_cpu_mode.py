"""Megatron Core on CPU ranks: every layout computes what one rank computes, and resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_distributed import run_distributed

SEQUENCE, BATCH, VOCABULARY = 32, 4, 64
SHARDINGS = ("dp_reshardable", "fully_reshardable")  # all that can still be saved


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    moe: bool = False
    bf16: bool = False
    distributed_optimizer: bool = False
    dropout: float = 0.0


DENSE = {
    "TP2": Layout(tensor=2),
    "PP2": Layout(pipeline=2),
    "DP2": Layout(distributed_optimizer=True),
}
MOE = {
    "EP2": Layout(expert=2, moe=True),
    "EP2 sharded": Layout(expert=2, moe=True, distributed_optimizer=True),
}
BF16 = {
    "TP2 bf16": Layout(tensor=2, bf16=True),
    "PP2 bf16": Layout(pipeline=2, bf16=True, distributed_optimizer=True),
}


class Training:
    """A tiny GPT and its optimizer; every data parallel rank sees all the data."""

    def __init__(self, layout: Layout, sharding: str = "fully_reshardable") -> None:
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.core.transformer.module import Float16Module

        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            layout.tensor, layout.pipeline, expert_model_parallel_size=layout.expert
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
        self.layout, self.sharding = layout, sharding
        model = _gpt(layout).cuda()
        if layout.bf16:
            model = Float16Module(model.config, model)
        self.model = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=layout.distributed_optimizer, grad_reduce_in_fp32=True
            ),
            model,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                min_lr=1e-3,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=layout.bf16,
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=layout.distributed_optimizer,
            ),
            [self.model],
        )
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=1e-2,
            min_lr=1e-3,
            lr_warmup_steps=0,
            lr_decay_steps=20,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=20,
            wd_incr_style="constant",
        )

    def step(self, number: int) -> tuple[float | None, float]:
        """Return the loss (None where the last stage is elsewhere) and the gradient norm."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=_batches(number),
            model=[self.model],
            num_microbatches=2,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        loss = sum(float(report["loss"]) for report in reports) / 2 if reports else None
        return loss, float(norm)

    def steps(self, *numbers: int) -> list[tuple[float | None, float]]:
        return [self.step(number) for number in numbers]

    def save(self, folder: Path) -> None:
        import torch.distributed as dist
        from megatron.core import dist_checkpointing

        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(self._state(is_loading=False), folder)

    def load(self, folder: Path) -> None:
        import torch
        from megatron.core import dist_checkpointing, tensor_parallel

        state = dist_checkpointing.load(self._state(is_loading=True), folder)
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.cuda.set_rng_state(state["random"]["default"])
        tensor_parallel.get_cuda_rng_tracker().set_states(state["random"]["tracked"])

    def load_weights(self, folder: Path) -> None:
        from megatron.core import dist_checkpointing

        wanted = {"model": self._weights()}
        self.model.module.load_state_dict(dist_checkpointing.load(wanted, folder)["model"])
        self.optimizer.reload_model_params()

    def _state(self, is_loading: bool) -> dict[str, Any]:
        import torch
        import torch.distributed as dist
        from megatron.core import tensor_parallel
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        random = {
            "default": torch.cuda.get_rng_state(),
            "tracked": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
        weights = self._weights()
        return {
            "model": weights,
            "optimizer": self.optimizer.sharded_state_dict(
                weights, is_loading=is_loading, metadata=self._metadata()
            ),
            "scheduler": self.scheduler.state_dict(),
            "random": ShardedObject(
                "random", random, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0
            ),
        }

    def _weights(self) -> Any:
        return self.model.module.sharded_state_dict(metadata=self._metadata())

    def _metadata(self) -> dict[str, Any]:
        from megatron.core import parallel_state

        return {
            "distrib_optim_sharding_type": self.sharding,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }


def _gpt(layout: Layout) -> Any:
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    experts: dict[str, Any] = {}
    if layout.moe:
        experts = {
            "num_moe_experts": 4,
            "moe_router_topk": 2,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.0,
        }
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        add_bias_linear=False,
        hidden_dropout=layout.dropout,
        attention_dropout=layout.dropout,
        bf16=layout.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        **experts,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=4 if layout.moe else None, moe_grouped_gemm=False),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
    )


def _batches(number: int) -> Iterator[Any]:
    import torch

    generator = torch.Generator().manual_seed(number)
    while True:
        tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
        tokens[:, 1::2] = tokens[:, :-1:2]  # half of it can be learned
        yield tokens.cuda()


def _forward_step(batches: Iterator[Any], model: Any) -> tuple[Any, Any]:
    import torch

    tokens = next(batches)
    device = torch.cuda.current_device()
    positions = torch.arange(SEQUENCE, device=device).expand(BATCH, SEQUENCE)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device="cuda").triu(1)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def mean(losses: Any) -> tuple[Any, dict[str, Any]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}

    return model(inputs, positions, mask, labels=labels), mean


def train_on_one_rank(folder: Path) -> dict[str, list[Any]]:
    measured = {}
    for name, layout in {"dense": Layout(), "moe": Layout(moe=True)}.items():
        training = Training(layout)
        training.save(folder / name)
        measured[name] = training.steps(1, 2, 3)
    return measured


def train_on_two_ranks(folder: Path) -> dict[str, list[Any]]:
    measured = {}
    for name, layout in (DENSE | MOE | BF16).items():
        training = Training(layout)
        training.load_weights(folder / ("moe" if layout.moe else "dense"))
        measured[name] = training.steps(1, 2, 3)
    return measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("weights")
    (alone,) = run_distributed(train_on_one_rank, 1, folder)
    first_rank, last_rank = run_distributed(train_on_two_ranks, 2, folder)
    for name in DENSE | MOE | BF16:
        if "PP2" not in name:
            assert first_rank[name] == last_rank[name]
    return alone | last_rank


@pytest.mark.parametrize("name", DENSE)
def test_dense_layouts_train_like_one_rank(measured: dict[str, list[Any]], name: str) -> None:
    for step, alone in zip(measured[name], measured["dense"], strict=True):
        assert step == pytest.approx(alone, rel=2e-5)


@pytest.mark.parametrize("name", MOE)
def test_expert_parallel_layouts_train_like_one_rank(
    measured: dict[str, list[Any]], name: str
) -> None:
    for step, alone in zip(measured[name], measured["moe"], strict=True):
        assert step == pytest.approx(alone, rel=2e-5)


@pytest.mark.parametrize("name", BF16)
def test_bf16_layouts_train_like_fp32_up_to_bf16(measured: dict[str, list[Any]], name: str) -> None:
    for step, alone in zip(measured[name], measured["dense"], strict=True):
        assert step == pytest.approx(alone, rel=2e-2)
        assert step != alone


def test_training_learns(measured: dict[str, list[Any]]) -> None:
    for name in ("dense", "moe"):
        losses = [loss for loss, _ in measured[name]]
        assert losses == sorted(losses, reverse=True)


def resume(folder: Path) -> dict[str, tuple[list[Any], list[Any]]]:
    layouts = {
        "TP2": Layout(tensor=2, dropout=0.1),
        "PP2 bf16": Layout(pipeline=2, bf16=True, distributed_optimizer=True, dropout=0.1),
    }
    cases = {name: (layout, SHARDINGS[0]) for name, layout in layouts.items()}
    for sharding in SHARDINGS:
        cases[f"DP2 {sharding}"] = (Layout(distributed_optimizer=True, dropout=0.1), sharding)
    straight_and_resumed = {}
    for name, (layout, sharding) in cases.items():
        training = Training(layout, sharding)
        training.steps(1, 2)
        training.save(folder / name)
        straight = training.steps(3, 4)
        training = Training(layout, sharding)
        training.load(folder / name)
        straight_and_resumed[name] = (straight, training.steps(3, 4))
    return straight_and_resumed


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for of_rank in run_distributed(resume, 2, tmp_path):
        assert len(of_rank) == 2 + len(SHARDINGS)
        for name, (straight, resumed) in of_rank.items():
            assert resumed == straight, name
