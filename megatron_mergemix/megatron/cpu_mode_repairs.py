"""The few spots where CPU mode changes Megatron itself, and those that any device needs changed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from types import ModuleType
from typing import Any

from megatron_mergemix.megatron import cpu_mode_attention, repairs
from megatron_mergemix.processes.process_life import die_with_spawner, tell_children_their_parent


class Repairer(MetaPathFinder):
    """Repairs the few modules of Megatron that want CUDA or TransformerEngine, when imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Find a module that needs repair where it would be found anyway."""
        repair = REPAIRS.get(name)
        spec = PathFinder.find_spec(name, path, target) if repair else None
        if repair is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_repair(module: ModuleType) -> None:
            execute(module)
            repair(module)

        spec.loader.exec_module = execute_and_repair  # type: ignore[method-assign]
        return spec


def _repair_fused_kernels(fused_kernels: Any) -> None:
    # Megatron-LM 0.16 asks nvcc for its version here, and then builds nothing.
    fused_kernels.load = lambda args: None


def _fork_the_server_of_saves(filesystem_async: Any) -> None:
    """Fork the process that serves the checkpoint writer a queue.

    Megatron asks for a fresh interpreter, because a fork is not safe beside CUDA. On every rank
    that saves, that one imports torch for seconds, to serve a few small objects.
    """

    def queue(mp_mode: str = "fork") -> Any:
        if filesystem_async._results_queue is None:
            server = SyncManager(ctx=get_context("fork"))
            tell_children_their_parent()
            server.start(die_with_spawner)
            filesystem_async._results_queue = server.Queue()
        return filesystem_async._results_queue

    for name in ("_get_write_results_queue", "get_write_results_queue"):  # 0.16, later ones
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, queue)


REPAIRS: dict[str, Callable[[Any], None]] = {
    **repairs.REPAIRS,
    "megatron.legacy.fused_kernels": _repair_fused_kernels,
    "megatron.core.transformer.dot_product_attention": cpu_mode_attention.fuse,
    "megatron.core.dist_checkpointing.strategies.filesystem_async": _fork_the_server_of_saves,
}
