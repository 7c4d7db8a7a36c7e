"""How many tokens requests are read from."""

from __future__ import annotations

import itertools

from megatron_mergemix.evaluate.continuations import Continuations


def num_tokens(continuations: Continuations) -> int:
    """Return the tokens in all rows without padding: a row ends where something is asked for."""
    ends: dict[tuple[int, int], int] = {}
    for number, (first, end) in enumerate(itertools.pairwise(continuations.slot_starts)):
        for slot in range(first, end):
            row = (number, int(continuations.slot_rows[slot]))
            ends[row] = max(ends.get(row, 0), int(continuations.slot_positions[slot]) + 1)
    return sum(ends.values())
