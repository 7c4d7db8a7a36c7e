"""What stands in for ``torch.cuda`` in CPU mode: streams, events, devices, generators, memory."""

from __future__ import annotations

import os
import time
from contextlib import ContextDecorator
from types import SimpleNamespace
from typing import Any

_TYPED_CONSTRUCTORS = (
    *("FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "LongTensor", "IntTensor"),
    *("ShortTensor", "CharTensor", "ByteTensor", "BoolTensor"),
)


def stand_in_for_cuda(torch: Any) -> None:
    """Replace what Megatron uses of ``torch.cuda``, for the whole process.

    There are as many devices as ranks on this machine, all of them the CPU.
    """
    cuda = torch.cuda
    random, memory = _generators(torch.default_generator), _memory()
    typed = {name: getattr(torch, name) for name in _TYPED_CONSTRUCTORS}
    _replace(cuda, _devices() | _streams() | random | memory | typed)
    _replace(cuda.random, random)
    _replace(cuda.memory, memory)
    _replace(cuda.nvtx, {"range_push": _zero, "range_pop": _zero, "mark": _nothing, "range": _Null})


def _replace(module: Any, stand_ins: dict[str, Any]) -> None:
    for name, stand_in in stand_ins.items():
        setattr(module, name, stand_in)


def _devices() -> dict[str, Any]:
    properties = SimpleNamespace(
        name="cpu",
        major=8,
        minor=0,
        total_memory=_memory_bytes("SC_PHYS_PAGES"),
        multi_processor_count=os.cpu_count(),
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "init": _nothing,
        "_lazy_init": _nothing,
        "_lazy_call": lambda callback, **kwargs: callback(),
        "device_count": _device_count,
        "current_device": _zero,
        "set_device": _nothing,
        "device": _Null,
        "get_device_name": lambda *args: properties.name,
        "get_device_capability": lambda *args: (properties.major, properties.minor),
        "get_device_properties": lambda *args: properties,
        "cudart": lambda: SimpleNamespace(cudaProfilerStart=_zero, cudaProfilerStop=_zero),
        "check_error": _nothing,
    }


def _streams() -> dict[str, Any]:
    the_stream = _Stream()
    return {
        "Stream": _Stream,
        "ExternalStream": _Stream,
        "Event": _Event,
        "stream": _Null,
        "current_stream": lambda *args: the_stream,
        "default_stream": lambda *args: the_stream,
        "set_stream": _nothing,
        "synchronize": _nothing,
        "is_current_stream_capturing": lambda: False,
    }


def _generators(generator: Any) -> dict[str, Any]:
    return {
        "default_generators": (generator,) * _device_count(),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "initial_seed": generator.initial_seed,
        "get_rng_state": lambda *args, **kwargs: generator.get_state(),
        "set_rng_state": lambda state, *args, **kwargs: generator.set_state(state),
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state_all": lambda states: generator.set_state(states[0]),
    }


def _memory() -> dict[str, Any]:
    return {
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
        "reset_peak_memory_stats": _nothing,
        "memory_allocated": _zero,
        "max_memory_allocated": _zero,
        "memory_reserved": _zero,
        "max_memory_reserved": _zero,
        "device_memory_used": _zero,
        "memory_stats": _NoMemoryUsed,
        "mem_get_info": lambda *args: (
            _memory_bytes("SC_AVPHYS_PAGES"),
            _memory_bytes("SC_PHYS_PAGES"),
        ),
    }


def _device_count() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _memory_bytes(pages: str) -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


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


class _Null(ContextDecorator):
    """A context manager and decorator that takes any arguments and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        pass


class _NoMemoryUsed(dict[str, int]):
    """The memory statistics of a device that is not there: every one of them is zero."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __missing__(self, key: str) -> int:
        return 0
