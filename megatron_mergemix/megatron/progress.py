"""Progress of a long stage: a bar on a terminal, lines in a log, scalars for TensorBoard."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.processes.distributed import rank


class Progress:
    """Shows how far a stage is, on rank 0 only; on other ranks it does nothing.

    A terminal gets one bar that moves; anything else gets a line at most every few seconds, so
    that a log stays readable. Scalars go to TensorBoard at every call.
    """

    _SECONDS_BETWEEN_LINES = 5.0

    def __init__(
        self, label: str, total: int, done: int, tensorboard: Path, record: Path | None = None
    ):
        """Start at ``done`` of ``total`` steps.

        Args:
            label: what a bar or line begins with.
            total: steps in the end.
            done: steps of earlier starts.
            tensorboard: folder of the scalars.
            record: file that tells other processes the step, ``{"step": 3, "total": 10}``; kept
                current to some seconds.
        """
        self._label = label
        self._total = total
        self._first = done
        self._directory = tensorboard
        self._record = record
        self._started = time.monotonic()
        self._last_line = -math.inf
        self._bar: Any = None
        self._writer: Any = None

    def __enter__(self) -> Progress:
        if rank() != 0:
            return self
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory), purge_step=self._first + 1)
        if sys.stdout.isatty():
            from rich.progress import Progress as Bar

            self._bar = Bar(*Bar.get_default_columns(), "{task.fields[text]}")
            self._bar.start()
            self._task = self._bar.add_task(
                self._label, total=self._total, completed=self._first, text=""
            )
        return self

    def advance(
        self, step: int, unit_per_step: float = 0.0, unit: str = "", **values: float
    ) -> None:
        """Report that ``step`` steps are done, with the numbers worth showing."""
        if rank() != 0:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (step - self._first) * unit_per_step / seconds
        if unit:
            self._writer.add_scalar(unit, rate, step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        text += f"  {rate:,.0f} {unit}" if unit else ""
        is_due = step == self._total or self._line_is_due()
        if is_due and self._record is not None:
            publish_json(self._record, {"step": step, "total": self._total})
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif is_due:
            left = (self._total - step) * seconds / max(step - self._first, 1)
            print(f"{self._label}: {step}/{self._total}  {text}  {left:.0f} s left", flush=True)

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last_line < self._SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()
