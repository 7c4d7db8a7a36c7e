"""Where the parameters of a rank live."""

from __future__ import annotations

import torch

from megatron_mergemix.megatron import cpu_mode


def device() -> torch.device:
    """Return where this rank's parameters live."""
    return torch.device("cpu") if cpu_mode.wanted() else torch.device("cuda")
