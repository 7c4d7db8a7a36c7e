"""From a mixture over domains to Megatron's weighted list of dataset prefixes.

Megatron knows no domains, only prefixes with weights; weights are shares of the training samples.
"""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from megatron_mergemix import config
from megatron_mergemix.config.prefixes import is_cut_apart, is_misread
from megatron_mergemix.data.indexed import IndexedDataset, Part, share_of_split
from megatron_mergemix.errors import BlendError

Blend = list[tuple[float, str]]
"""Weight and prefix of every dataset; weights are positive and sum to one, see :func:`blend_of`."""

MAX_PREFIXES = 32766
"""Megatron numbers the datasets of a blend in 16 bits and refuses one more."""

_DECIMALS = (6, 9, 12)
"""Of weights: as few as leave every domain its share, to ``_OFF`` of it or ``_DUST``."""

_OFF, _DUST = 0.01, 1e-5

_SUM_TOLERANCE = 1e-6


def check_prefix(prefix: str) -> None:
    """Refuse a prefix that Megatron could not find again in a written blend.

    Raises:
        BlendError: it has white space, where Megatron cuts, reads as a number, which Megatron
            takes for a weight, or starts like an option.
    """
    if is_cut_apart(prefix):
        raise BlendError(
            f"dataset prefix {prefix!r} has white space or is empty, and Megatron cuts its list "
            "of datasets at white space. Rename the files, or link to them under another name."
        )
    if is_misread(prefix):
        raise BlendError(
            f"dataset prefix {prefix!r} would be taken for a weight or an option by Megatron. "
            f"Write it as ./{prefix}."
        )


def domain_tokens(domain: config.Domain, split: str) -> int:
    """Return the tokens of a domain in the training part of the split.

    Raises:
        DataError: a dataset is missing or damaged.
    """
    return sum(_train_tokens(domain, split).values())


def domain_prefix_weights(domain: config.Domain, split: str) -> dict[str, float]:
    """Return prefix -> its positive share of the domain; sums to one.

    A list of prefixes is weighted by their tokens in the training part of the split, so that
    every token of the domain is seen equally often; a mapping gives the weights itself. A dataset
    that is listed under two names counts once, with the sum of its given weights.

    Raises:
        BlendError: a weight is negative or not finite, nothing is left, or a prefix with a weight
            has no training tokens in this split.
        DataError: a dataset is missing or damaged.
    """
    tokens = _train_tokens(domain, split)
    if isinstance(domain.prefixes, Mapping):
        weights = _given_weights(domain.prefixes, list(tokens))
        for prefix, weight in weights.items():
            if weight > 0 and tokens[prefix] == 0:
                raise BlendError(
                    f"{prefix} has weight {weight:g}, but no tokens in the training part of split "
                    f"{split!r}. Give it no weight, or another split."
                )
    else:
        weights = {prefix: float(count) for prefix, count in tokens.items()}
    total = math.fsum(weights.values())
    if total <= 0:
        raise BlendError(
            f"{', '.join(list(tokens)[:5])}: no prefix of the domain has both a weight and tokens "
            f"in the training part of split {split!r}."
        )
    return {prefix: weight / total for prefix, weight in weights.items() if weight > 0}


def blend_of(
    mixture: Mapping[str, float], domains: Mapping[str, config.Domain], split: str
) -> Blend:
    """Return the blend that draws training tokens in the shares of the mixture.

    In the order of ``domains``. Domains without a share are left out, the weights of equal
    prefixes are added (Megatron would shuffle both alike and repeat samples), and weights are
    rounded, but never to zero: to 1e-6, or finer where thousands of small prefixes would otherwise
    add up to another share of their domain.

    Args:
        mixture: domain -> share, sums to one; a domain that is not named has none.
        domains: every domain by name.
        split: Megatron's ``--split``; tokens are counted in its training part.

    Raises:
        BlendError: the mixture is none, or Megatron cannot express it.
        DataError: a dataset is missing or damaged.
    """
    check_mixture(mixture, domains)
    parts: dict[str, dict[str, float]] = {}
    shares: dict[str, float] = {}
    spelling: dict[str, str] = {}
    for name, domain in domains.items():
        if mixture.get(name, 0.0) == 0:
            continue
        parts[name] = {}
        for prefix, weight in domain_prefix_weights(domain, split).items():
            check_prefix(prefix)
            file = _token_file(prefix)
            spelling.setdefault(file, prefix)
            parts[name][file] = mixture[name] * weight
            shares[file] = shares.get(file, 0.0) + parts[name][file]
    if len(shares) > MAX_PREFIXES:
        raise BlendError(
            f"the blend has {len(shares)} prefixes, but Megatron takes at most {MAX_PREFIXES}. "
            "Merge small datasets (Megatron-LM's tools/merge_datasets.py)."
        )
    weights = _weights(shares, list(parts.values()))
    return [(weight, spelling[file]) for file, weight in weights.items()]


def check_mixture(mixture: Mapping[str, float], domains: Mapping[str, config.Domain]) -> None:
    """Check that a mixture can be a blend.

    Raises:
        BlendError: it names an unknown domain, a share is negative or not finite, or the shares
            do not sum to one within 1e-6.
    """
    unknown = [name for name in mixture if name not in domains]
    if unknown:
        raise BlendError(
            f"the mixture names {', '.join(unknown)}, expected domains: {', '.join(domains)}."
        )
    for name, share in mixture.items():
        if not math.isfinite(share) or share < 0:
            raise BlendError(
                f"the share of {name} is {share:g}, expected 0 to 1: data cannot be drawn "
                "negatively often."
            )
    total = math.fsum(mixture.values())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise BlendError(f"the shares of the mixture sum to {total:.9g}, expected 1.")


def check_parts(prefixes: Iterable[str], split: str) -> None:
    """Refuse a dataset that has no tokens in a part of the split: Megatron loops forever on it.

    It repeats the empty part until that has enough tokens (``GPTDataset._get_num_epochs``), even
    when none are asked for.

    Raises:
        BlendError: names the dataset and the part.
        DataError: a dataset is missing or damaged.
    """
    parts: tuple[Part, ...] = ("valid", "test")
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        for which in parts:
            if share_of_split(split, which) > 0 and dataset.tokens_in_split(split, which) == 0:
                raise BlendError(
                    f"{prefix} has {dataset.num_sequences} sequences, too few for the {which} part "
                    f"of blend.split {split!r}, and Megatron never ends on an empty part. Merge "
                    "small datasets, or set blend.split: '1,0,0' and validate on held-out data."
                )


def epochs(
    mixture: Mapping[str, float],
    domains: Mapping[str, config.Domain],
    split: str,
    train_tokens: float,
) -> dict[str, float]:
    """Return how often a run over ``train_tokens`` passes over each domain's training tokens."""
    return {
        name: mixture.get(name, 0.0) * train_tokens / max(domain_tokens(domain, split), 1)
        for name, domain in domains.items()
    }


def blend_arguments(blend: Blend) -> list[str]:
    """Return the words after Megatron's ``--data-path``: weight, prefix, weight, prefix."""
    return [word for weight, prefix in blend for word in (_text(weight), prefix)]


def _text(weight: float) -> str:
    """Return a weight with six decimals, or with as many more as it has."""
    text = f"{weight:.{_DECIMALS[-1]}f}"
    extra = _DECIMALS[-1] - _DECIMALS[0]
    return text[:-extra] + text[-extra:].rstrip("0")


def _train_tokens(domain: config.Domain, split: str) -> dict[str, int]:
    """Return prefix -> training tokens, without repeating a dataset."""
    distinct: dict[str, str] = {}
    for prefix in domain.prefixes:
        distinct.setdefault(_token_file(prefix), prefix)
    return {
        prefix: IndexedDataset(prefix).tokens_in_split(split, "train")
        for prefix in distinct.values()
    }


def _given_weights(given: Mapping[str, float], distinct: Sequence[str]) -> dict[str, float]:
    """Return prefix -> given weight, of a dataset's several names together."""
    spelling = {_token_file(prefix): prefix for prefix in distinct}
    weights = dict.fromkeys(distinct, 0.0)
    for prefix, weight in given.items():
        if not 0 <= weight < math.inf:
            raise BlendError(f"weight of {prefix} is {weight:g}, expected 0 or more.")
        weights[spelling[_token_file(prefix)]] += weight
    return weights


def _token_file(prefix: str) -> str:
    """Return what two prefixes of one dataset have in common, also through links."""
    return os.path.realpath(f"{prefix}.bin")


def _weights(shares: Mapping[str, float], parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return file -> weight, rounded to as few decimals as leave every domain its share.

    Args:
        shares: file -> exact share.
        parts: of every domain: file -> its part of that share.
    """
    for decimals in _DECIMALS:
        weights = dict(zip(shares, _rounded(list(shares.values()), decimals), strict=True))
        found = [sum(weights[f] * part / shares[f] for f, part in each.items()) for each in parts]
        wanted = [math.fsum(each.values()) for each in parts]
        if all(
            abs(got - share) <= max(_OFF * share, _DUST)
            for got, share in zip(found, wanted, strict=True)
        ):
            break
    return weights


def _rounded(shares: Sequence[float], decimals: int) -> list[float]:
    """Return the shares as multiples of a unit that sum to one, none of them zero."""
    whole = 10**decimals
    exact = np.asarray(shares) / math.fsum(shares) * whole
    units = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = whole - int(units.sum())
    if missing > 0:
        # The largest remainders first; the earlier one where they are equal.
        order = np.argsort(units - exact, kind="stable")
        units[order[:missing]] += 1
    elif missing < 0:
        # Shares below one unit were lifted; the largest ones pay, where it matters least.
        heap = [(-int(count), index) for index, count in enumerate(units)]
        heapq.heapify(heap)
        for _ in range(-missing):
            count, index = heap[0]
            heapq.heapreplace(heap, (count + 1, index))
            units[index] -= 1
    return [int(count) / whole for count in units]
