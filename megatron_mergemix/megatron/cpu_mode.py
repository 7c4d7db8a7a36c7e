"""CPU mode: Megatron, unmodified, on a machine without CUDA, for trying and for testing.

With ``MERGEMIX_DEVICE=cpu`` and the gloo backend the same program runs that runs on GPUs. Tensors
live on the CPU and claim to be CUDA tensors wherever Megatron asks (``is_cuda``, ``type()``); every
request for a CUDA device gets the CPU; streams, events and the memory bookkeeping of
``torch.cuda`` are stand-ins that do nothing; the libraries that need CUDA are hidden.

The entry points of torch that take a device are wrapped, once per process: some 80 calls, 0.04 ms,
in a training step of three layers. A ``TorchFunctionMode`` would take half the lines, but it
intercepts every operation, which costs 2.5 ms of the same step, and holds for one thread only.
Wrapped entry points hold for all threads and for forked processes; spawned ones start here.

What stays out of reach: TransformerEngine, hence context parallelism, sequence parallelism and FP8;
compiled or captured graphs. And there is one random generator where CUDA has its own, so that a
run with dropout does not resume with the masks that it would have drawn.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any

from megatron_mergemix.errors import ConfigError, MergeMixError
from megatron_mergemix.megatron.cpu_mode_repairs import Repairer
from megatron_mergemix.megatron.cpu_mode_stand_ins import stand_in_for_cuda
from megatron_mergemix.megatron.script import run_script
from megatron_mergemix.processes.distributed import leave_process_groups
from megatron_mergemix.processes.process_life import die_with_spawner, tell_children_their_parent

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
    _wrap_moves(torch)
    stand_in_for_cuda(torch)
    _settle_the_rest(torch)
    _lend_spawned_children_our_main()
    sys.meta_path.insert(0, Repairer())
    _active = True


def main() -> None:
    """Run ``SCRIPT ARGS...`` in CPU mode, as ``python SCRIPT ARGS...`` would run it."""
    from megatron_mergemix.megatron import cpu_mode  # this file runs as __main__, a second copy

    run_script(_THIS_MODULE, cpu_mode.activate)
    leave_process_groups()


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
    originals = {id(function) for function in _device_constructors()}
    for home in (torch, torch.fft, torch.nested):
        for name, function in list(vars(home).items()):
            if id(function) in originals:
                setattr(home, name, _ignoring_cuda(function))
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
            # Under a TorchFunctionMode the original comes back to this function, and is done.
            name = original_type(self)
            return name if "cuda" in name else name.replace("torch.", "torch.cuda.", 1)
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


def _wrap_moves(torch: Any) -> None:
    original_load, original_module_to = torch.load, torch.nn.Module.to

    def load(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        map_location = "cpu" if map_location is None else _to_cpu(map_location)
        return original_load(file, map_location, *args, **kwargs)

    def module_to(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {
            name: _to_cpu(value) if name == "device" else value for name, value in kwargs.items()
        }
        return original_module_to(self, *(_to_cpu(args[0]), *args[1:]) if args else (), **kwargs)

    torch.load = functools.wraps(original_load)(load)
    torch.nn.Module.to = functools.wraps(original_module_to)(module_to)


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


def _lend_spawned_children_our_main() -> None:
    """Make spawned processes start from this file, which activates CPU mode there as well.

    They would otherwise begin by running their parent's script again, without CPU mode. It still
    runs, as ``__mp_main__``, when a child asks for something that is defined in it.
    """
    original = spawn.get_preparation_data

    def preparation_data(name: str) -> dict[str, Any]:
        data = original(name)
        by_name = data.pop("init_main_from_name", None)
        by_path = data.pop("init_main_from_path", None)
        if by_name != _THIS_MODULE:  # it is, where a spawned child spawns
            os.environ[_MAIN_OF_PARENT] = json.dumps([by_name, by_path])
        data["init_main_from_name"] = _THIS_MODULE
        tell_children_their_parent()
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

    die_with_spawner()
    cpu_mode.activate()
    __getattr__ = cpu_mode._from_main_of_parent
