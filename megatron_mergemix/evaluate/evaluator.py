"""The contract between the search loop and whatever scores a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from megatron_mergemix.journal import Scores

if TYPE_CHECKING:
    from megatron_mergemix.evaluate.proxy import Proxy


class Evaluator(Protocol):
    """Scores the model that a proxy currently is.

    An evaluator is built once per job and reused for every candidate, so whatever does not
    depend on the weights (tokenised requests, fixed batches) is prepared in its constructor.
    """

    def evaluate(self, proxy: Proxy) -> Scores:
        """Return the scores of the proxy's present weights.

        Collective: every rank calls it and every rank gets the same scores.

        Raises:
            EvaluationError: this candidate cannot be scored; raised on every rank alike. The
                trial is marked failed and the search goes on. Anything else ends the job.
        """
        ...

    def digest(self) -> Mapping[str, str]:
        """Return what the scores depend on besides the weights, by name.

        A search that is resumed with another digest is refused, naming the entries that differ.
        """
        ...
