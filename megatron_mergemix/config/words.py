"""Words of a command: how a text in the YAML becomes them, and what no shell will read in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from megatron_mergemix.config.problems import KeyPath, Problem, shown

_CONTINUED = re.compile(r"\\\n|(?<!\S)\\(?!\S)")
_FOR_A_SHELL = re.compile(r"\$[A-Za-z_{(0-9@*]|`")


def words_of(value: Any) -> Any:
    """Return the words of a command that is given as text; anything else as it is.

    Backslashes at the ends of lines join them, also where YAML has folded the lines already.

    Raises:
        ValueError: a quotation is not closed.
    """
    return shlex.split(_CONTINUED.sub(" ", value)) if isinstance(value, str) else value


def word_problems(path: KeyPath, words: list[str], of: str = "launch") -> Iterator[Problem]:
    """Yield what keeps words from being a command that is started without a shell."""
    if not words:
        yield Problem(path, f"is empty, expected the words of a {of}")
    for word in words:
        if _FOR_A_SHELL.search(word):
            yield Problem(
                path,
                f"has {shown(word)}, but no shell reads the words of a {of}: write out what the "
                "variable stands for",
            )
        if of == "launch" and word.startswith("--mergemix-"):
            yield Problem(
                path, f"has {shown(word)}, which is appended for each stage; leave it away"
            )
        if "\n" in word:
            yield Problem(path, f"has {shown(word)}, expected no line breaks inside of a word")
