"""CPU mode: Megatron, unmodified, on a machine without CUDA, for trying and for testing.

With ``MERGEMIX_DEVICE=cpu`` and the gloo backend the same program runs that runs on GPUs. Tensors
live on the CPU and claim to be CUDA tensors wherever Megatron asks (``is_cuda``, ``type()``); every
request for a CUDA device gets the CPU; streams, events and the memory bookkeeping of
``torch.cuda`` are stand-ins that do nothing. Nothing of Megatron is replaced.

The entry points of torch that take a device are wrapped, once per process. A
``TorchFunctionMode`` would do the same in a quarter of the lines, but it intercepts every
operation (a tiny model then spends a fifth of its step in it) and holds for one thread only.
Wrapped entry points hold for all threads and for forked processes.

Only speed and CUDA-only features differ: no TransformerEngine, hence no context parallelism, no
sequence parallelism and no FP8; nothing is compiled or captured; CUDA memory reads as zero.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import runpy
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from megatron_mergemix.errors import ConfigError, MergeMixError

DEVICE_VARIABLE = "MERGEMIX_DEVICE"
_MAIN_OF_PARENT = "_MERGEMIX_MAIN_OF_PARENT"
_THIS_MODULE = "megatron_mergemix.megatron.cpu_mode"

_LIKE_FACTORIES = (
    *("empty_like", "zeros_like", "ones_like", "full_like"),
    *("rand_like", "randn_like", "randint_like"),
)
_TENSOR_FACTORIES = (
    *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full", "new_tensor"),
)
_TYPED_CONSTRUCTORS = (
    *("FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "LongTensor", "IntTensor"),
    *("ShortTensor", "CharTensor", "ByteTensor", "BoolTensor"),
)
_CUDA_LIBRARIES = ("transformer_engine", "apex", "amp_C", "flash_attn", "flash_attn_3")

_active = False


def wanted() -> bool:
    """Whether ``MERGEMIX_DEVICE`` asks for CPU mode.

    Raises:
        ConfigError: The variable is neither ``cpu`` nor ``cuda`` (unset or empty means ``cuda``).
    """
    value = os.environ.get(DEVICE_VARIABLE, "")
    if value not in ("", "cpu", "cuda"):
        raise ConfigError(
            f"{DEVICE_VARIABLE} is {value!r}; expected 'cpu' or 'cuda'. "
            f"Set it to 'cpu' to run without CUDA, or unset it."
        )
    return value == "cpu"


def activate() -> None:
    """Make this process, its threads and its forked children run Megatron on the CPU.

    Call it before ``megatron.core`` is imported. A second call does nothing. There is no way back.

    Raises:
        MergeMixError: CUDA is present and ``MERGEMIX_DEVICE=cpu`` is not set, the variable says
            ``cuda``, or ``megatron.core`` has been imported already.
    """
    global _active
    if _active:
        return
    import torch
    import torch._dynamo  # every optimizer imports it, and it wants to see torch unwrapped

    if not wanted():
        if os.environ.get(DEVICE_VARIABLE):
            raise MergeMixError(
                f"{DEVICE_VARIABLE}=cuda forbids CPU mode. Set {DEVICE_VARIABLE}=cpu to run on the "
                f"CPU."
            )
        if torch.cuda.is_available():
            raise MergeMixError(
                f"CPU mode was asked for on a machine with {torch.cuda.device_count()} CUDA "
                f"devices. Set {DEVICE_VARIABLE}=cpu if you really want to leave them unused."
            )
    if "megatron.core" in sys.modules:
        raise MergeMixError(
            "CPU mode must be activated before megatron.core is imported, which has already "
            "happened. Call cpu_mode.activate() first."
        )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asserts it when TP > 1
    _wrap_factories(torch)
    _wrap_tensor(torch.Tensor)
    _stand_in_for_cuda(torch)
    _settle_the_rest(torch)
    _lend_spawned_children_our_main()
    sys.meta_path.insert(0, _Repairer())
    _active = True


def main() -> None:
    """Run ``SCRIPT ARGS...`` in CPU mode, as ``python SCRIPT ARGS...`` would run it."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m megatron_mergemix.megatron.cpu_mode SCRIPT [ARGS...]")
    from megatron_mergemix.megatron import cpu_mode  # this file runs as __main__, a second copy

    cpu_mode.activate()
    script = Path(sys.argv[1]).resolve()
    if not script.is_file():
        raise SystemExit(f"{script} does not exist or is not a file.")
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def _to_cpu(device: Any) -> Any:
    """``device`` with every way to write a CUDA device replaced by ``"cpu"``."""
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, int):
        return "cpu"
    return "cpu" if getattr(device, "type", None) == "cuda" else device


def _wrap_factories(torch: Any) -> None:
    from torch.utils._device import _device_constructors

    # Torch's own list of the functions that make tensors; it is cached before they are wrapped,
    # because torch.set_default_device compares against the originals.
    for original in _device_constructors():
        home = torch
        for part in ("fft", "nested"):
            if original is getattr(getattr(torch, part), original.__name__, None):
                home = getattr(torch, part)
        setattr(home, original.__name__, _ignoring_cuda(original))
    for name in _LIKE_FACTORIES:
        setattr(torch, name, _ignoring_cuda(getattr(torch, name)))


def _ignoring_cuda(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def _wrap_tensor(tensor_class: Any) -> None:
    original_to, original_type = tensor_class.to, tensor_class.type

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and not isinstance(args[0], bool):
            args = (_to_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        return original_to(self, *args, **kwargs)

    def type_(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original_type(self, dtype, *args, **kwargs)

    tensor_class.to = functools.wraps(original_to)(to)
    tensor_class.type = functools.wraps(original_type)(type_)
    tensor_class.is_cuda = property(lambda self: True)
    tensor_class.cuda = lambda self, *args, **kwargs: self
    tensor_class.pin_memory = lambda self, *args, **kwargs: self
    tensor_class.is_pinned = lambda self, *args, **kwargs: False
    tensor_class.record_stream = lambda self, stream: None
    for name in _TENSOR_FACTORIES:
        setattr(tensor_class, name, _ignoring_cuda(getattr(tensor_class, name)))


class _Stream:
    """A stream that is always done: what it is asked to run has run."""

    cuda_stream = 0
    device_index = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass


class _Event:
    """An event that has happened when it is recorded; ``elapsed_time`` tells wall time in ms."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self._recorded = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end._recorded - self._recorded) * 1000

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, stream: _Stream | None = None) -> None:
        pass


class _Null(nullcontext):
    """A context manager that takes any arguments and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _stand_in_for_cuda(torch: Any) -> None:
    cuda = torch.cuda
    device_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=memory, multi_processor_count=os.cpu_count()
    )
    the_stream = _Stream()

    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_current_stream_capturing": lambda: False,
        "init": _nothing,
        "_lazy_init": _nothing,
        "_lazy_call": lambda callback, **kwargs: callback(),
        "device_count": lambda: device_count,
        "current_device": _zero,
        "set_device": _nothing,
        "device": _Null,
        "get_device_name": lambda *args: "cpu",
        "get_device_capability": lambda *args: (properties.major, properties.minor),
        "get_device_properties": lambda *args: properties,
        "synchronize": _nothing,
        "Stream": _Stream,
        "ExternalStream": _Stream,
        "Event": _Event,
        "stream": _Null,
        "current_stream": lambda *args: the_stream,
        "default_stream": lambda *args: the_stream,
        "set_stream": _nothing,
        "cudart": lambda: SimpleNamespace(cudaProfilerStart=_zero, cudaProfilerStop=_zero),
        "check_error": _nothing,
        "default_generators": (torch.default_generator,) * device_count,
    }
    random = {
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
        "initial_seed": torch.default_generator.initial_seed,
        "get_rng_state": lambda *args, **kwargs: torch.default_generator.get_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.default_generator.set_state(state),
        "get_rng_state_all": lambda: [torch.default_generator.get_state()],
        "set_rng_state_all": lambda states: torch.default_generator.set_state(states[0]),
    }
    bookkeeping = {
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
        "reset_peak_memory_stats": _nothing,
        "memory_allocated": _zero,
        "max_memory_allocated": _zero,
        "memory_reserved": _zero,
        "max_memory_reserved": _zero,
        "memory_stats": _NoMemoryUsed,
        "mem_get_info": lambda *args: (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"),
            memory,
        ),
    }
    _replace(cuda, stand_ins | random | bookkeeping)
    _replace(cuda.random, random)
    _replace(cuda.memory, bookkeeping)
    _replace(
        cuda.nvtx,
        {"range_push": _nothing, "range_pop": _nothing, "mark": _nothing, "range": _Null},
    )
    _replace(cuda, {name: getattr(torch, name) for name in _TYPED_CONSTRUCTORS})


class _NoMemoryUsed(dict[str, int]):
    """The memory statistics of a device that is not there: every one of them is zero."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __missing__(self, key: str) -> int:
        return 0


def _replace(module: Any, stand_ins: dict[str, Any]) -> None:
    for name, stand_in in stand_ins.items():
        setattr(module, name, stand_in)


def _settle_the_rest(torch: Any) -> None:
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda check_available=False: None

    # Compiling a fused kernel takes longer than all the steps of a tiny model.
    torch.compile = lambda function=None, **options: function or (lambda inner: inner)

    # They need CUDA. A machine that has them gives the same results as one that has not.
    for library in _CUDA_LIBRARIES:
        sys.modules[library] = None  # type: ignore[assignment]

    # The CPU generator stands in for the CUDA one, so it does move where only the latter should.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


class _Repairer(MetaPathFinder):
    """Repairs the few modules of Megatron that rely on CUDA or TransformerEngine, when imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        repair = _REPAIRS.get(name)
        spec = PathFinder.find_spec(name, path, target) if repair else None
        if repair is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_repair(module: ModuleType) -> None:
            execute(module)
            repair(module)

        spec.loader.exec_module = execute_and_repair  # type: ignore[method-assign]
        return spec


def _repair_router_gating(moe_utils: Any) -> None:
    # Megatron Core 0.16 reads this name, but defines it only where TransformerEngine is present.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _repair_fused_kernels(fused_kernels: Any) -> None:
    # Megatron-LM 0.16 asks nvcc for its version here, and then builds nothing.
    fused_kernels.load = _nothing


def _repair_distributed_optimizer(distrib_optimizer: Any) -> None:
    """Let the distributed optimizer resume with torch's Adam, which has to replace the fused one.

    Megatron expects that step counts live in parameter groups. Torch's live in the states: there
    is none before the first step; loading then sets them back, misses them or, since all states
    get one and the same tensor, would count every parameter as a step. And the fp32 weights are
    copied into views that autograd guards.
    """
    import torch

    wrapped = distrib_optimizer.DistributedOptimizer
    original_state_dict, original_load = wrapped.state_dict, wrapped.load_state_dict
    original_set = wrapped._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> Any:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.optimizer.state or not parameters:
            return original_state_dict(self)
        self.optimizer.state[parameters[0]] = {"step": torch.tensor(0.0)}
        try:
            return original_state_dict(self)
        finally:
            self.optimizer.state.clear()

    def set_states(self: Any, model_parameter: Any, tensors: Any) -> None:
        group, place = self.model_param_group_index_map[model_parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        step_as_it_is = {"step": state["step"]} if "step" in state else {}
        original_set(self, model_parameter, {**tensors, **step_as_it_is})

    def load_state_dict(self: Any, state_dict: Any) -> None:
        with torch.no_grad():
            original_load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    wrapped.state_dict, wrapped.load_state_dict = state_dict, load_state_dict
    wrapped._set_main_param_and_optimizer_states = set_states


_REPAIRS: dict[str, Callable[[Any], None]] = {
    "megatron.core.transformer.moe.moe_utils": _repair_router_gating,
    "megatron.core.optimizer.distrib_optimizer": _repair_distributed_optimizer,
    "megatron.legacy.fused_kernels": _repair_fused_kernels,
}


def _lend_spawned_children_our_main() -> None:
    """Make spawned processes start from this file, which activates CPU mode there as well.

    They would otherwise begin by running their parent's script again, without CPU mode, only to
    serve Megatron's checkpoint writer a queue: seconds for each process that saves. The script
    still runs, as ``__mp_main__``, when a child asks for something that is defined in it.
    """
    original = spawn.get_preparation_data

    def preparation_data(name: str) -> dict[str, Any]:
        data = original(name)
        by_name = data.pop("init_main_from_name", None)
        by_path = data.pop("init_main_from_path", None)
        if by_name != _THIS_MODULE:  # it is, where a spawned child spawns
            os.environ[_MAIN_OF_PARENT] = json.dumps([by_name, by_path])
        data["init_main_from_name"] = _THIS_MODULE
        return data

    spawn.get_preparation_data = preparation_data


def _from_main_of_parent(attribute: str) -> Any:
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    by_name, by_path = json.loads(os.environ[_MAIN_OF_PARENT])
    lent = sys.modules["__main__"]
    if by_name:
        content = runpy.run_module(by_name, run_name="__mp_main__", alter_sys=True)
    else:
        content = runpy.run_path(by_path, run_name="__mp_main__")
    lent.__dict__.update(content)
    del lent.__dict__["__getattr__"]
    return getattr(lent, attribute)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    from megatron_mergemix.megatron import cpu_mode  # again not this copy

    cpu_mode.activate()
    __getattr__ = cpu_mode._from_main_of_parent
