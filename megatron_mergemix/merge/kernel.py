"""The compiled kernel (``kernel.c``), where the installation could build it.

Without it torch does the same arithmetic to the same bits, several times slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

MISSING = (
    "the merge kernel was not compiled when megatron-mergemix was installed, so torch does its "
    "work: the same result, several times slower. Install again where GCC 12 or newer is."
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""As ``enum dtype`` in kernel.c."""


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, None where there is none."""
    spec = find_spec("megatron_mergemix.merge._kernel")
    if spec is None or spec.origin is None:
        return None
    loaded = ctypes.CDLL(spec.origin)
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    loaded.weighted_sum.argtypes = [pointer, integer, pointer, pointer, pointer, integer, size]
    loaded.weighted_sum.restype = None
    loaded.all_finite.argtypes, loaded.all_finite.restype = [pointer, integer, size], integer
    return loaded


def takes(*tensors: Tensor) -> bool:
    """Say whether the kernel is there and works on such tensors: contiguous fp32 or bf16 on CPU."""
    return library() is not None and all(
        t.dtype in _DTYPES and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


def weighted_sum(out: Tensor, sources: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Write ``sum_i weights[i] * sources[i]`` into ``out``; other threads go on meanwhile.

    Args:
        out: as :func:`takes` says; overlaps no source.
        sources: as :func:`takes` says, as long as ``out``.
        weights: one per source, rounded to fp32.
    """
    count = len(sources)
    assert count == len(weights)
    assert all(source.numel() == out.numel() for source in sources)
    loaded = library()
    assert loaded is not None
    loaded.weighted_sum(
        out.data_ptr(),
        _DTYPES[out.dtype],
        (ctypes.c_void_p * count)(*(source.data_ptr() for source in sources)),
        (ctypes.c_int * count)(*(_DTYPES[source.dtype] for source in sources)),
        (ctypes.c_float * count)(*weights),
        count,
        out.numel(),
    )


def all_finite(values: Tensor) -> bool:
    """Say whether no element of such a tensor is NaN or infinite."""
    loaded = library()
    assert loaded is not None
    return bool(loaded.all_finite(values.data_ptr(), _DTYPES[values.dtype], values.numel()))
