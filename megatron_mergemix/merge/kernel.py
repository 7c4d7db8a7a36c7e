"""The compiled kernel (``kernel.c``), where the installation could build it.

Without it torch does the same arithmetic to the same bits, several times slower. Here is also said
which kernel serves which device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_NOT_COMPILED = (
    "the merge kernel was not compiled when megatron-mergemix was installed, so torch does its "
    "work: the same result, several times slower. Install again where GCC 12 or newer is."
)

_NO_TRITON = (
    "Triton is not installed, so torch merges on the GPU: the same within rounding, about three "
    "times slower. Install the triton that this torch names as its requirement."
)

_NO_RUN = (
    "Triton's kernel cannot be run here, so torch merges on the GPU: the same within rounding, "
    "about three times slower. Triton compiles when it is first used: it needs a C compiler (gcc, "
    "clang, or what CC names), the headers of Python (python3-dev) and a cache that it can write "
    "(TRITON_CACHE_DIR). The error: "
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""As ``enum dtype`` in kernel.c."""

BLOCKS = {dtype: 8192 // dtype.itemsize for dtype in _DTYPES}
"""Elements of a block of interleaved copies, by dtype: ``COPY_BLOCK`` bytes, as in kernel.c."""

STEP = 64
"""Every tensor begins at a multiple of as many elements in a copy; as in kernel.c."""


class _Copies(ctypes.Structure):
    """``struct copies`` in kernel.c."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("num", ctypes.c_int),
    )


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, None where there is none."""
    spec = find_spec("megatron_mergemix.merge._kernel")
    if spec is None or spec.origin is None:
        return None
    loaded = ctypes.CDLL(spec.origin)
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    loaded.weighted_sum.argtypes = [*(pointer, integer, pointer, pointer, pointer, integer, size)]
    loaded.weighted_sum.restype = None
    loaded.weighted_sums.argtypes = [
        *(pointer, pointer, pointer, integer, _Copies, pointer, pointer, integer)
    ]
    loaded.weighted_sums.restype = None
    loaded.all_finite.argtypes, loaded.all_finite.restype = [pointer, integer, size], integer
    return loaded


def takes(*tensors: Tensor) -> bool:
    """Say whether the kernel is there and works on such tensors: contiguous fp32 or bf16 on CPU."""
    return library() is not None and all(
        t.dtype in _DTYPES and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


def missing(device_type: str) -> str | None:
    """Return why sums are slower there than they could be, and what to do; None if they are not.

    On a GPU the kernel (:mod:`.gpu_kernel`) is run once: that it is installed says little about
    what it needs to be compiled.
    """
    if device_type == "cpu":
        return _NOT_COMPILED if library() is None else None
    if find_spec("triton") is None:
        return _NO_TRITON
    try:
        from megatron_mergemix.merge.gpu_kernel import try_out

        try_out(device_type)
    except Exception as error:  # of Triton, the compilers that it calls, or the driver
        return f"{_NO_RUN}{type(error).__name__}: {error}"
    return None


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


class Outputs:
    """Where sums of copies go: addresses of tensors, and where each begins and ends in a copy.

    Args:
        places: ``(tensor, start, offset, count)``: ``count`` elements of a contiguous tensor from
            ``offset`` on, which begin at element ``start`` of every copy, a multiple of ``STEP``.
            The tensors must keep their storage, and all have the same dtype.
    """

    def __init__(self, places: Sequence[tuple[Tensor, int, int, int]]) -> None:
        self.count = len(places)
        self.dtype = places[0][0].dtype
        assert all(takes(tensor) and tensor.dtype == self.dtype for tensor, *_ in places)
        assert all(start % STEP == 0 for _, start, _, _ in places)
        size = self.dtype.itemsize
        self.addresses = (ctypes.c_void_p * self.count)(
            *(tensor.data_ptr() + offset * size for tensor, _, offset, _ in places)
        )
        self.starts = (ctypes.c_size_t * self.count)(*(start for _, start, _, _ in places))
        self.counts = (ctypes.c_size_t * self.count)(*(count for *_, count in places))


def weighted_sums(outputs: Outputs, copies: Tensor, weights: Sequence[float]) -> None:
    """Write sums of interleaved copies into tensors; other threads go on meanwhile.

    Args:
        outputs: where the sums go.
        copies: ``[blocks, copies, BLOCKS[dtype]]``, contiguous, of the outputs' dtype.
        weights: one per copy, rounded to fp32; copies of weight zero are not read.
    """
    loaded = library()
    assert loaded is not None
    assert takes(copies)
    assert copies.dtype == outputs.dtype
    assert len(weights) == copies.shape[1]
    used = [(copy, weight) for copy, weight in enumerate(weights) if weight != 0.0]
    assert copies.shape[2] == BLOCKS[copies.dtype]
    loaded.weighted_sums(
        outputs.addresses,
        outputs.starts,
        outputs.counts,
        outputs.count,
        _Copies(copies.data_ptr(), _DTYPES[copies.dtype], copies.shape[1]),
        (ctypes.c_int * len(used))(*(copy for copy, _ in used)),
        (ctypes.c_float * len(used))(*(weight for _, weight in used)),
        len(used),
    )


def all_finite(values: Tensor) -> bool:
    """Say whether no element of such a tensor is NaN or infinite."""
    loaded = library()
    assert loaded is not None
    return bool(loaded.all_finite(values.data_ptr(), _DTYPES[values.dtype], values.numel()))
