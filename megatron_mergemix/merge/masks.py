"""Random masks that depend on the place of an element and on nothing else.

An element is kept or dropped by a hash of (seed, expert, tensor, position in the whole tensor),
so slices, files, workers and the parallel layout do not matter.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mergemix.merge.slices import Slice

Words = NDArray[np.uint64]


def kept(seed: int, expert: int, place: Slice, part: slice, density: float) -> Tensor:
    """Return one boolean per element of ``part`` of a box, true with probability ``density``.

    Args:
        seed: of the merge.
        expert: number of the expert.
        place: the box.
        part: elements of the box, in row-major order.
        density: between 0 and 1.
    """
    key = hashlib.sha256(f"{seed} {expert} {place.name}".encode()).digest()
    state = np.full(part.stop - part.start, int.from_bytes(key[:8], "little"), dtype=np.uint64)
    for coordinate in _coordinates(place, part):
        state = _mix(state ^ coordinate)
    threshold = min(int(math.ldexp(density, 53)), 1 << 53)
    return torch.from_numpy((state >> np.uint64(11)) < np.uint64(threshold))


def _coordinates(place: Slice, part: slice) -> list[Words]:
    """Return the coordinates of the elements in the whole tensor, one array per dim."""
    flat = np.arange(part.start, part.stop, dtype=np.int64)
    inside = np.unravel_index(flat, place.sizes) if place.sizes else ()
    return [
        (axis + offset).astype(np.uint64) + np.uint64(1)
        for axis, offset in zip(inside, place.offsets, strict=True)
    ]


def _mix(words: Words) -> Words:
    """Return the next state of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), elementwise."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
