"""Write ``docs/settings.md``: every key of ``mix.yaml``, from the models that check it.

python tools/settings_page.py
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_mergemix.config import Config

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

NOT_IN_THE_YAML = {"launched", "groups"}
"""Filled in by the program."""

BEGINNING = """\
# Every setting of mix.yaml

Written by `tools/settings_page.py` from the models that check the file
(`megatron_mergemix/config/`). `mergemix init` writes a commented example. Any key can be set on
the command line: `--set search.trials=64`. An unknown key is an error.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")


def page() -> str:
    """Return the page."""
    return "\n".join([BEGINNING, *_sections("", Config)])


def _sections(path: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield the lines of a section, then those of the sections in it."""
    if path:
        yield f"## {path}\n"
        yield f"{_prose(model.__doc__ or '')}\n"
    fields = {
        name: field for name, field in model.model_fields.items() if name not in NOT_IN_THE_YAML
    }
    yield "| key | value | default | what |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        what = _prose(field.description or "")
        yield f"| `{name}` | {_kind(field.annotation)} | {_default(field)} | {what} |"
    yield ""
    for name, field in fields.items():
        key = f"{path}.{name}" if path else name
        for inner, is_named in _models(field.annotation):
            yield from _sections(f"{key}.NAME" if is_named else key, inner)


def _models(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """Yield the models in a type, and whether each is under a name of the user's own."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
    elif get_origin(annotation) is dict:
        yield from ((model, True) for model, _ in _models(get_args(annotation)[1]))
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            yield from _models(part)


def _kind(annotation: Any) -> str:
    """Return for people what a type takes."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in parts if part is not type(None))
    if origin is dict:
        return f"name: {_kind(parts[1])}"
    if origin is list or origin is tuple:
        return f"list of {_kind(parts[0])}" if origin is list else "two numbers"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}
    return names.get(annotation, "anything")


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be given"
    if field.default is None or field.default in ({}, []) or isinstance(field.default, BaseModel):
        return ""
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, dict):
        return ", ".join(f"`{name}: {value}`" for name, value in field.default.items())
    if isinstance(field.default, float):
        return f"`{field.default:g}`"
    return f"`{list(field.default) if isinstance(field.default, tuple) else field.default}`"


def _prose(text: str) -> str:
    """Return a docstring as one line of Markdown."""
    line = " ".join(text.split())
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line.replace("``", "`")).replace("|", "\\|")


if __name__ == "__main__":
    main()
