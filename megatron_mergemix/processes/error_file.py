"""The error that a failing rank leaves in a file, for the launching side and for `status`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_mergemix.errors import MergeMixError

ERROR_FILE = "MERGEMIX_ERROR_FILE"
"""Environment variable with the file in which a stage of a Megatron-LM launch leaves its error."""

_SECONDS_FOR_THE_CAUSE = 20.0
"""How long a rank that lost another one waits for the launcher to find out which and why."""


def leave_error(path: str | Path, error: BaseException) -> None:
    """Write the error for the launching side; the first rank to fail wins.

    A rank that merely lost the connection to another one waits: either the launcher ends it,
    because it saw the other one die, or the other one leaves the error that matters.
    """
    if isinstance(error, MergeMixError):
        text = str(error)
    else:
        if _is_lost_peer(error):
            time.sleep(_SECONDS_FOR_THE_CAUSE)
        log = Path(path).with_suffix(".log")
        where = f"The traceback is in {log}. " if log.exists() else ""
        text = (
            f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}\n"
            f"{where}What is finished is kept: mend the cause and start it again."
        )
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        pass


def _is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective failed, as it does when another rank is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)
