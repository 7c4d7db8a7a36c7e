"""Reading ``mix.yaml``: plain data, and the line every key stands on.

The scalars follow YAML 1.2 rather than PyYAML's YAML 1.1, because the older rules bite exactly
what people write here: ``5e9`` would be text, ``no`` a boolean, ``1:30`` the number 90 and
``010`` the number 8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mergemix.config.problems import KeyPath, Problem, dotted, shown
from megatron_mergemix.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Builds plain Python data only, with the scalars of YAML 1.2 (and ``1_000``)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_INT = r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+"
_FLOAT = (
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
for _tag, _pattern in (
    ("merge", "<<"),
    ("null", "~|null|Null|NULL|"),
    ("bool", "true|True|TRUE|false|False|FALSE"),
    ("int", _INT),
    ("float", _FLOAT),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass(frozen=True)
class Source:
    """What a YAML file says.

    Attributes:
        name: the file, as the user wrote it.
        data: its content.
        lines: line number (from 1) of every key and list item that stands in the file itself.
        problems: keys that occur twice.
    """

    name: str
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    problems: list[Problem]


def read_yaml(path: Path) -> Source:
    """Return the content of a YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error
    loader = _Loader(text)
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    try:
        node = loader.get_single_node()
        _index(node, (), (), lines, problems)
        data = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(_describe(str(path), error)) from error
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds {shown(data)}"
        raise ConfigError(
            f"{path} {found}; expected a mapping of settings. "
            "`mergemix init` writes a file to start from."
        )
    return Source(str(path), data, lines, problems)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[KeyPath]:
    """Change ``data`` in place by ``a.b.c=value`` texts and return the paths that were set.

    Values are YAML. Missing sections are created.

    Raises:
        ConfigError: an override has no ``=``, an empty key, a value that is not YAML, or a path
            that leads through something that is not a mapping.
    """
    paths: list[KeyPath] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"--set {override}: expected key=value, such as search.trials=64")
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(_describe(f"--set {override}", error)) from error
        section = data
        for depth, name in enumerate(path[:-1], 1):
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                raise ConfigError(
                    f"--set {override}: {dotted(path[:depth])} is {shown(section)}, not a mapping; "
                    "set it as a whole, in YAML: key={a: 1, b: 2}"
                )
        section[path[-1]] = value
        paths.append(path)
    return paths


def _index(
    node: yaml.Node | None,
    path: KeyPath,
    above: tuple[yaml.Node, ...],
    lines: dict[KeyPath, int],
    problems: list[Problem],
) -> None:
    """Record the line of every key below ``node``, and the keys that occur twice."""
    if node in above:
        raise yaml.constructor.ConstructorError(
            problem="the value contains itself", problem_mark=above[-1].start_mark
        )
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            here: KeyPath = (*path, place)
            lines[here] = item.start_mark.line + 1
            _index(item, here, (*above, node), lines, problems)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            here = (*path, key.value)
            line = key.start_mark.line + 1
            if here in lines:
                problems.append(
                    Problem(here, f"occurs twice, on lines {lines[here]} and {line}; keep one")
                )
                continue
            lines[here] = line
            _index(value, here, (*above, node), lines, problems)


def _describe(where: str, error: yaml.YAMLError | ValueError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    reason = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    return f"{where}{line}: not valid YAML: {reason}" + (f" ({context})" if context else "")
