"""GPUs by name, by name with changes, and by figures alone."""

from __future__ import annotations

import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.plan.hardware import GPUS, gpu_of

OWN = "bf16=4e14,fp32=5e13,bandwidth=2e12,memory=9e10,host_link=3e10,host_memory=1e11,file_read=1e9"


@pytest.mark.parametrize("name", ["a100-80g", "h100", "h200", "b200"])
def test_the_gpus_of_data_sheets_are_known_by_name(name: str) -> None:
    gpu = gpu_of(name)
    assert gpu is GPUS[name]
    # Ranges, so that a slip of a power of ten or a figure with sparsity shows.
    assert 300e12 < gpu.bf16 < 2300e12
    assert 2e12 <= gpu.bandwidth <= 8e12
    assert 80e9 <= gpu.memory < gpu.host_memory
    assert gpu.file_read < gpu.host_link < gpu.bandwidth
    assert gpu.peak("bf16") == gpu.bf16 > gpu.peak("fp32") == gpu.fp32


def test_a_known_gpu_takes_figures_of_ones_own() -> None:
    gpu = gpu_of("h100, memory=94e9, host_memory=128e9")
    assert (gpu.memory, gpu.host_memory, gpu.bf16) == (94e9, 128e9, GPUS["h100"].bf16)
    assert gpu.name == "h100, memory=94e9, host_memory=128e9"


def test_figures_alone_are_a_gpu() -> None:
    gpu = gpu_of(OWN)
    assert (gpu.bf16, gpu.host_link, gpu.file_read) == (4e14, 3e10, 1e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10", r"'h10' is not known. Did you mean h100\? Known: a100-80g, h100, h200, b200; or"),
        ("h100,memroy=1e9", r"'memroy=1e9' is no figure. Did you mean memory\? Expected NAME="),
        ("h100,memory", r"'memory' is no figure"),
        ("h100,memory=much", r"'memory=much', expected a number greater than 0"),
        ("h100,memory=0", r"'memory=0', expected a number greater than 0"),
        ("h100,memory=inf", r"'memory=inf', expected a number greater than 0"),
        ("bf16=1e12,memory=1e9", r"lacks fp32, bandwidth, host_link, host_memory, file_read"),
    ],
)
def test_what_is_no_gpu_is_refused_with_what_is(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gpu_of(text)
