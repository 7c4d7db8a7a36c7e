"""Which dataset prefixes Megatron's blend lists cannot hold."""

from __future__ import annotations


def is_cut_apart(prefix: str) -> bool:
    """Return whether Megatron, which cuts its lists at white space, would not see one prefix."""
    return not prefix or any(letter.isspace() for letter in prefix)


def is_misread(prefix: str) -> bool:
    """Return whether Megatron would take the prefix for an option or for a weight."""
    if prefix.startswith("-"):
        return True
    try:
        float(prefix)
    except ValueError:
        return False
    return True
