"""From a mixture over domains to Megatron's weighted list of dataset prefixes."""

from __future__ import annotations

from megatron_mergemix.errors import BlendError


def check_prefix(prefix: str) -> None:
    """Refuse a prefix that Megatron could not find again in a written blend.

    Raises:
        BlendError: it has white space, where Megatron cuts, or reads as a number, which Megatron
            takes for a weight.
    """
    if not prefix or any(letter.isspace() for letter in prefix):
        raise BlendError(
            f"dataset prefix {prefix!r} has white space or is empty, and Megatron cuts its list "
            "of datasets at white space. Rename the files, or link to them under another name."
        )
    try:
        float(prefix)
    except ValueError:
        return
    raise BlendError(
        f"dataset prefix {prefix!r} reads as a number, which Megatron takes for a weight. "
        f"Write it as ./{prefix}."
    )
