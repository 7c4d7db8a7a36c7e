"""What every part of ``mix.yaml`` is made of: a strict model and a few kinds of numbers."""

from __future__ import annotations

from pathlib import Path as _Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
# Strict models refuse text for a path and a list for a pair; YAML has nothing else to offer.
Path = Annotated[_Path, Field(strict=False)]
Bounds = Annotated[tuple[Share, Share], Field(strict=False)]


class Section(BaseModel):
    """A part of the YAML: unknown keys refused, values never coerced from another kind."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
