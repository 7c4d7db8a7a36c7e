"""The built-in trainer: constant learning rate, Megatron Core all the way down.

It trains the base, the experts and the reference models. A killed run continues from its last
save with the result it would have had: the data position follows from the step, and nothing in
training draws random numbers (no dropout).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_mergemix.checkpoint.saves import complete_saves
from megatron_mergemix.config import Config
from megatron_mergemix.data.tokenizers import load_tokenizer
from megatron_mergemix.errors import DivergedError
from megatron_mergemix.megatron import dist_checkpoint
from megatron_mergemix.megatron.batches import TokenInfo, blended_dataset, training_batches
from megatron_mergemix.megatron.device import device
from megatron_mergemix.megatron.model import build_model
from megatron_mergemix.megatron.progress import Progress
from megatron_mergemix.megatron.resident import ResidentProxy
from megatron_mergemix.model_facts import vocab_size
from megatron_mergemix.processes.distributed import from_rank_0, rank
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.run import TrainingRun
from megatron_mergemix.training_runs.saves import averaged_saves


@dataclass
class _Trainee:
    """Model, optimizer and schedule of one run."""

    chunks: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any


def train(run: TrainingRun, config: Config) -> None:
    """Collective: train ``run`` to its end, from its last save if there is one.

    Raises:
        DivergedError: the loss, the gradients or the weights stopped being finite; what was
            saved before is whole, and nothing else is.
    """
    if rank() == 0:
        run.mark_started()
    dist.barrier()
    trainee = _set_up(run, config)
    step = _restore(run, trainee)
    batches = _batches(run, config, step)
    loss = math.nan
    scalars, record = RunDir(config.run_dir).tensorboard(run.name), run.directory / "progress.json"
    with Progress(run.name, run.steps, step, scalars, record) as bar:
        while step < run.steps:
            lr = trainee.optimizer.param_groups[0]["lr"]
            loss, grad_norm = _train_step(trainee, batches, config)
            step += 1
            _check_finite(run, step, loss, grad_norm)
            if step % config.training.log_interval == 0 or step == run.steps:
                bar.advance(
                    step,
                    config.training.global_batch_size * _seq_length(config),
                    "tokens/s",
                    loss=loss,
                    grad_norm=grad_norm,
                    lr=lr,
                )
            if step % config.training.save_interval == 0 or step == run.steps:
                _save(run, trainee, step)
    final = _average(run, trainee) if len(run.averaged_steps) > 1 else f"iter_{run.steps:07d}"
    if rank() == 0:
        run.mark_finished(
            {
                "checkpoint": f"checkpoints/{final}",
                "steps": run.steps,
                "tokens": run.steps * config.training.global_batch_size * _seq_length(config),
                "loss": loss if math.isfinite(loss) else None,
            }
        )
    dist.barrier()


def _set_up(run: TrainingRun, config: Config) -> _Trainee:
    """Collective: build the model, wrap it for data parallelism, make optimizer and schedule."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.utils import get_model_config

    assert config.model is not None
    settings = config.training
    chunks = build_model(config, vocab_size(config), run.seed)
    transformer = get_model_config(chunks[0])
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    chunks = [DistributedDataParallel(transformer, ddp, chunk) for chunk in chunks]
    for chunk in chunks:
        chunk.broadcast_params()  # type: ignore[operator]
    bf16 = config.model.precision == "bf16"
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=run.lr,
            min_lr=run.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            clip_grad=settings.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        ),
        chunks,
        config_overrides=_no_weight_decay_on_vectors(),
    )
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=run.lr,
        min_lr=run.lr,
        lr_warmup_steps=run.warmup_steps,
        lr_decay_steps=max(run.steps, run.warmup_steps + 1),
        lr_decay_style="constant",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=run.steps,
        wd_incr_style="constant",
    )
    return _Trainee(chunks, optimizer, scheduler)


def _no_weight_decay_on_vectors() -> dict[Any, Any]:
    """Return Megatron's usual rule: biases and normalisation weights are not decayed."""
    from megatron.core.optimizer import ParamKey
    from megatron.core.optimizer.optimizer_config import ParamPredicate

    vectors = ParamPredicate(name="vectors", fn=lambda parameter: parameter.dim() == 1)
    return {ParamKey(name="*.bias", predicate=vectors): {"wd_mult": 0.0}}


def _restore(run: TrainingRun, trainee: _Trainee) -> int:
    """Collective: load the run's last save, else its starting weights; return the step."""
    saves = from_rank_0(partial(complete_saves, run.checkpoints))
    if saves:
        step, path = saves[-1]
        dist_checkpoint.load_model(path, trainee.chunks)
        state = dist_checkpoint.load_training(path, _training_state(trainee, is_loading=True))
        trainee.optimizer.load_state_dict(state["optimizer"])
        trainee.scheduler.load_state_dict(state["opt_param_scheduler"])
        if rank() == 0:
            # Killed right after this save was complete, the run has not said so yet.
            dist_checkpoint.point_tracker(run.checkpoints, step)
            print(f"{run.name}: continues from step {step}", flush=True)
        return step
    if run.start is not None:
        dist_checkpoint.load_model(run.start, trainee.chunks)
        trainee.optimizer.reload_model_params()
    return 0


def _batches(run: TrainingRun, config: Config, step: int) -> Iterator[dict[str, torch.Tensor]]:
    settings = config.training
    dataset = blended_dataset(
        run.blend,
        split=config.blend.split,
        num_samples=run.steps * settings.global_batch_size,
        seq_length=_seq_length(config),
        seed=run.seed,
        tokens=TokenInfo(vocab_size(config), load_tokenizer(config.tokenizer).eod),
        cache=RunDir(config.run_dir).cache / run.name,
    )
    return training_batches(
        dataset,
        first_sample=step * settings.global_batch_size,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
    )


def _train_step(
    trainee: _Trainee, batches: Iterator[dict[str, torch.Tensor]], config: Config
) -> tuple[float, float]:
    """Collective: one optimizer step; return mean loss and gradient norm, equal on all ranks."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    settings = config.training
    per_rank = settings.global_batch_size // parallel_state.get_data_parallel_world_size()
    for chunk in trainee.chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    trainee.optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=batches,
        model=trainee.chunks,
        num_microbatches=per_rank // settings.micro_batch_size,
        seq_length=_seq_length(config),
        micro_batch_size=settings.micro_batch_size,
        forward_only=False,
    )
    _, grad_norm, _ = trainee.optimizer.step()
    trainee.scheduler.step(increment=1)
    return _means_over_ranks(losses, float(grad_norm or 0.0))


def _forward_step(
    batches: Iterator[dict[str, torch.Tensor]], chunk: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = losses.float().mean()
        # Cloned, because the schedule divides the loss in place.
        return loss, loss.detach().clone()

    return output, mean


def _means_over_ranks(losses: list[torch.Tensor], grad_norm: float) -> tuple[float, float]:
    """Collective: return the means of the losses that the last stages hold and of the norms.

    The norm should be the same everywhere; if it is NaN on one rank, it is now NaN on all.
    """
    total = torch.tensor([0.0, 0.0, grad_norm], dtype=torch.float64, device=device())
    for loss in losses:
        total[0] += loss.double()
        total[1] += 1
    dist.all_reduce(total)
    return (total[0] / total[1]).item(), total[2].item() / dist.get_world_size()


def _check_finite(run: TrainingRun, step: int, loss: float, grad_norm: float) -> None:
    if not math.isfinite(loss):
        raise _diverged(run, step, f"the loss is {loss}")
    if not math.isfinite(grad_norm):
        raise _diverged(run, step, f"the norm of the gradients is {grad_norm}")


def _diverged(run: TrainingRun, step: int, what: str) -> DivergedError:
    where = f"{run.name}: {what} at step {step}"
    if run.name.startswith("references/"):
        # Another learning rate would be one for the experts as well, and train them again.
        return DivergedError(
            f"{where}. The experts were trained like this, so it is this mixture that the "
            f"learning rate ({run.lr}) is too high for, or a chance of the hardware. Started again "
            f"it continues from its last save under {run.checkpoints}, which is from before."
        )
    return DivergedError(
        f"{where}. Lower the learning rate ({run.lr}) or add warmup_steps; the saves under "
        f"{run.checkpoints} are from before."
    )


def _weights_are_finite(trainee: _Trainee) -> bool:
    """Collective: return whether every weight on every rank is finite."""
    broken = torch.zeros((), device=device())
    for chunk in trainee.chunks:
        for parameter in chunk.parameters():
            broken += (~torch.isfinite(parameter.detach())).any()
    dist.all_reduce(broken)
    return broken.item() == 0


def _save(run: TrainingRun, trainee: _Trainee, step: int) -> None:
    """Collective: save the step, unless a weight is not finite."""
    if not _weights_are_finite(trainee):
        raise _diverged(run, step, "a weight is NaN or infinite")
    state = _training_state(trainee, is_loading=False)
    keep = len(run.averaged_steps)
    dist_checkpoint.save(run.checkpoints, step, trainee.chunks, state, keep)


def _training_state(trainee: _Trainee, is_loading: bool) -> dict[str, Any]:
    model = dist_checkpoint.model_state(trainee.chunks)
    return {
        "optimizer": trainee.optimizer.sharded_state_dict(
            model["model"] if len(model) == 1 else model,
            is_loading=is_loading,
            metadata=dict(dist_checkpoint.CONTENT),
        ),
        "opt_param_scheduler": trainee.scheduler.state_dict(),
    }


def _average(run: TrainingRun, trainee: _Trainee) -> str:
    """Collective: save the mean of the last saves (WSM, arXiv 2507.17634); return its folder.

    Raises:
        TrainingError: one of them is not there any more.
    """
    saves = averaged_saves(run, dict(from_rank_0(partial(complete_saves, run.checkpoints))))
    proxy = ResidentProxy(
        trainee.chunks, base=saves[-1], experts={path.name: path for path in saves}
    )
    proxy.apply({path.name: 1.0 / len(saves) for path in saves})
    path = dist_checkpoint.save(
        run.checkpoints / "averaged", run.steps, trainee.chunks, training={}, keep=1
    )
    if rank() == 0:
        steps = ", ".join(map(str, run.averaged_steps))
        print(f"{run.name}: the mean of its saves of the steps {steps}", flush=True)
    return str(path.relative_to(run.checkpoints))


def _seq_length(config: Config) -> int:
    assert config.model is not None
    return config.model.seq_length
