"""What is wrong with a configuration, in words: where, which value, what was expected instead.

Knows pydantic's error records and the shape of the models, but no particular setting.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_mergemix.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""The way to a value: keys of mappings and places in lists."""

MAX_PROBLEMS = 8


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; ``text`` reads on from the dotted path of the key."""

    path: KeyPath
    text: str


def dotted(path: KeyPath) -> str:
    """Return a path as people write it: ``domains.math.prefixes[2]``."""
    parts = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in path]
    return "".join(parts).removeprefix(".")


def shown(value: Any) -> str:
    """Return a value as it would stand in the YAML, cut to 60 characters."""
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def refuse(
    problems: Sequence[Problem],
    name: str,
    lines: Mapping[KeyPath, int] | None = None,
    overridden: Sequence[KeyPath] = (),
) -> None:
    """Raise one error that lists the problems; return if there are none.

    Args:
        problems: what is wrong.
        name: the file the settings come from.
        lines: line of every key of the file.
        overridden: keys whose value comes from ``--set`` instead.

    Raises:
        ConfigError: there is at least one problem.
    """
    if not problems:
        return
    texts = [
        f"{_place(problem.path, name, lines or {}, overridden)}: "
        + f"{dotted(problem.path)} {problem.text}".strip()
        for problem in problems
    ]
    if len(texts) == 1:
        raise ConfigError(texts[0])
    listed = "".join(f"\n  {text}" for text in texts[:MAX_PROBLEMS])
    more = len(texts) - MAX_PROBLEMS
    rest = f"\n  and {more} more" if more > 0 else ""
    raise ConfigError(f"{len(texts)} problems in the configuration:{listed}{rest}")


def explain(error: ValidationError, root: type[BaseModel], data: Any) -> list[Problem]:
    """Return what pydantic found wrong in ``data``, one problem per value, in order.

    A value that fits no member of a union is one problem, and so is a value inside of the member
    that was meant.
    """
    by_path: dict[KeyPath, list[str]] = {}
    whole: dict[KeyPath, list[KeyPath]] = {}
    for record in error.errors(include_url=False):
        path, union = _walk(record["loc"], data, missing=record["type"] == "missing")
        if union is not None and path != union:
            whole.setdefault(union, []).append(path)
        by_path.setdefault(path, []).append(_expected(record, path, root))
    for union in whole:
        by_path.pop(union, None)
    return [Problem(path, _sentence(texts, path, data)) for path, texts in by_path.items() if texts]


def _sentence(texts: Sequence[str], path: KeyPath, data: Any) -> str:
    """Join what would have been accepted; a text with a verb of its own stands as it is."""
    if not texts[0].startswith("expected "):
        return texts[0]
    wanted = " or ".join(text.removeprefix("expected ") for text in dict.fromkeys(texts))
    value = _value(path, data)
    return f"is {shown(value)}, expected {wanted}{_hint(value, wanted)}"


def _walk(loc: Sequence[str | int], data: Any, missing: bool) -> tuple[KeyPath, KeyPath | None]:
    """Return the real path of an error, and the path of the innermost union around it.

    Pydantic puts the name of the union's member it tried into ``loc``; such names are not keys.
    """
    path: KeyPath = ()
    union = None
    for place, key in enumerate(loc):
        inside = (isinstance(data, dict) and key in data) or (
            isinstance(data, list) and isinstance(key, int) and key < len(data)
        )
        if inside:
            path, data = (*path, key), data[key]
        elif missing and place == len(loc) - 1:
            return ((*path, key) if isinstance(key, str) else path), union
        elif key == "[key]":
            return (*path[:-1], str(path[-1])), union
        elif loc[-1] == "[key]" and place == len(loc) - 2:
            return (*path, str(key)), union  # YAML's null and booleans, which pydantic renames
        else:
            union = path
    return path, union


def _value(path: KeyPath, data: Any) -> Any:
    for key in path:
        data = data[key]
    return data


def _expected(record: Mapping[str, Any], path: KeyPath, root: type[BaseModel]) -> str:
    kind, limits = record["type"], record.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, root)
    if kind == "missing" and isinstance(record["loc"][-1], str):
        return "is missing" + _meaning(path, root)
    if kind == "literal_error":
        return f"expected {limits['expected']}"
    if "[key]" in record["loc"]:
        return f"is the key {shown(record['input'])}, expected text: write the key in quotes"
    for limit, words in _LIMITS.items():
        if limit in limits:
            return f"expected a number {words} {limits[limit]:g}"
    known = _KINDS.get(kind)
    return f"expected {known}" if known else f"is wrong: {record['msg']}"


_LIMITS = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "of at most"}

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "dict_type": "a mapping",
    "model_type": "a mapping of settings",
    "list_type": "a list",
    "tuple_type": "a list of two numbers",
    "missing": "a list of two numbers",
    "too_long": "a list of two numbers",
}


def _hint(value: Any, wanted: str) -> str:
    if isinstance(value, str) and "number" in wanted:
        try:
            float(value)
        except ValueError:
            return ""
        return "; remove the quotes"
    if isinstance(value, str) and "true or false" in wanted:
        return f"; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
    if isinstance(value, str) and wanted.startswith("'"):
        meant = suggestion(value, wanted.replace("'", "").replace(" or ", ", ").split(", "))
        return "." + meant if meant else ""
    if wanted == "text" and value is not None and not isinstance(value, (list, dict)):
        return ": write it in quotes"
    return ""


def _unknown_key(path: KeyPath, root: type[BaseModel]) -> str:
    section = _model_at(path[:-1], root)
    assert section is not None, f"no model at {dotted(path)}"
    key, valid = str(path[-1]), sorted(section.model_fields)
    meant = suggestion(key, valid)
    if not meant:
        elsewhere = [place for place in _fields(root) if place.split(".")[-1] == key]
        meant = f" Did you mean {elsewhere[0]}?" if elsewhere else ""
    return f"is not a setting.{meant} Valid here: {', '.join(valid)}."


def _meaning(path: KeyPath, root: type[BaseModel]) -> str:
    section = _model_at(path[:-1], root)
    field = section.model_fields.get(str(path[-1])) if section else None
    if field is None or not field.description:
        return ""
    return ": " + " ".join(field.description.split("\n\n")[0].split())


def _model_at(path: KeyPath, root: type[BaseModel]) -> type[BaseModel] | None:
    """Return the model that reads the mapping at ``path``."""
    found: Any = root
    for key in path:
        models = list(_models(found))
        if models and isinstance(key, str) and key in models[0].model_fields:
            found = models[0].model_fields[key].annotation
        else:
            found = _item(found)
    return next(_models(found), None)


def _members(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    elif origin is typing.Annotated:
        yield from _members(typing.get_args(annotation)[0])
    else:
        yield annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            yield member


def _item(annotation: Any) -> Any:
    """Return the type of the values of a mapping or the items of a list."""
    for member in _members(annotation):
        arguments = typing.get_args(member)
        if arguments and typing.get_origin(member) in (dict, list, tuple):
            return arguments[-1]
    return None


def _fields(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in root.model_fields.items():
        yield prefix + name
        annotation = field.annotation
        for model in _models(annotation):
            yield from _fields(model, f"{prefix}{name}.")
        for model in _models(_item(annotation)):
            yield from _fields(model, f"{prefix}{name}.NAME.")


def _place(
    path: KeyPath, name: str, lines: Mapping[KeyPath, int], overridden: Sequence[KeyPath]
) -> str:
    prefixes = [path[:length] for length in range(len(path), 0, -1)]
    for prefix in prefixes:
        if prefix in overridden:
            return f"--set {dotted(prefix)}"
    return next((f"{name}:{lines[prefix]}" for prefix in prefixes if prefix in lines), name)
