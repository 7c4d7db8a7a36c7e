"""GPUs by name, and what a plan counts with: peak rates, memories, links. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from megatron_mergemix.config.problems import suggestion
from megatron_mergemix.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of the machine around it.

    Attributes:
        name: for people.
        bf16: dense bf16 FLOP/s of the data sheet, without structured sparsity.
        fp32: fp32 FLOP/s outside the tensor cores; PyTorch multiplies fp32 there by default.
        bandwidth: bytes per second of the GPU's memory.
        memory: bytes of it.
        host_link: bytes per second from host memory, one direction.
        host_memory: bytes of the machine's memory per GPU.
        file_read: bytes per second that the machine's disk gives each GPU.
    """

    name: str
    bf16: float
    fp32: float
    bandwidth: float
    memory: float
    host_link: float
    host_memory: float
    file_read: float

    def peak(self, precision: str) -> float:
        """Return the FLOP/s in ``bf16`` or ``fp32``."""
        return self.bf16 if precision == "bf16" else self.fp32


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 80GB SXM data sheet (2021): BF16 312 TFLOPS, FP32 19.5, 2,039 GB/s, 80 GB,
        # PCIe Gen4 64 GB/s in both directions. DGX A100 640GB data sheet: 2 TB of system memory
        # for 8 GPUs, 8 x 3.84 TB NVMe.
        Gpu("a100-80g", 312e12, 19.5e12, 2.039e12, 80e9, 32e9, 250e9, 3e9),
        # NVIDIA H100 SXM data sheet (2023): BF16 1,979 TFLOPS with sparsity, FP32 67, 3.35 TB/s,
        # 80 GB, PCIe Gen5 128 GB/s in both directions. DGX H100 data sheet: 2 TB, 8 x 3.84 TB NVMe.
        Gpu("h100", 989.5e12, 67e12, 3.35e12, 80e9, 64e9, 250e9, 3e9),
        # NVIDIA H200 SXM data sheet (2024): as H100, with 141 GB at 4.8 TB/s. DGX H200: 2 TB.
        Gpu("h200", 989.5e12, 67e12, 4.8e12, 141e9, 64e9, 250e9, 3e9),
        # NVIDIA HGX B200 (Blackwell data sheet, 2024): BF16 4.5 PFLOPS with sparsity, FP32 75
        # TFLOPS, PCIe Gen5. DGX B200 data sheet: 1,440 GB at 64 TB/s in 8 GPUs, 2 TB of system
        # memory.
        Gpu("b200", 2250e12, 75e12, 8e12, 180e9, 64e9, 250e9, 3e9),
    )
}
"""The last figure, ``file_read``, is of no data sheet: the NVMe drives of these machines read about
6 GB/s each when asked in sequence, one drive per GPU; pages that are mapped one after the other
come at about half of it."""

_FIGURES = tuple(field.name for field in fields(Gpu) if field.name != "name")


def gpu_of(text: str) -> Gpu:
    """Return the GPU that ``--gpu`` means.

    Args:
        text: a name, ``h100``; a name with figures of one's own, ``h100,memory=94e9``; or every
            figure of another GPU, ``bf16=4e14,fp32=5e13,...``. FLOP/s, bytes, bytes per second.

    Raises:
        ConfigError: the name or a figure is not known, a figure is no positive number, or one of
            a GPU without a known name is missing.
    """
    words = [word.strip() for word in text.split(",")]
    known = None
    if words and "=" not in words[0]:
        name = words.pop(0)
        if name not in GPUS:
            raise ConfigError(
                f"--gpu: {name!r} is not known.{suggestion(name, list(GPUS))} Known: "
                f"{', '.join(GPUS)}; or give its figures: {'=..., '.join(_FIGURES)}=..."
            )
        known = GPUS[name]
    given = dict(_figure(word) for word in words)
    if known is not None:
        return replace(known, name=text, **given) if given else known
    missing = [name for name in _FIGURES if name not in given]
    if missing:
        raise ConfigError(
            f"--gpu: {text!r} lacks {', '.join(missing)}. Give every figure, or begin with one of "
            f"{', '.join(GPUS)} to change some of its own."
        )
    return Gpu(name="own figures", **given)


def _figure(word: str) -> tuple[str, float]:
    name, equals, number = (part.strip() for part in word.partition("="))
    if not equals or name not in _FIGURES:
        raise ConfigError(
            f"--gpu: {word!r} is no figure.{suggestion(name, list(_FIGURES))} Expected NAME=NUMBER "
            f"with one of {', '.join(_FIGURES)}."
        )
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"--gpu: {word!r}, expected a number greater than 0.")
    return name, value
