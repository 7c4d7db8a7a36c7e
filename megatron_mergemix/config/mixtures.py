"""Rules of a mixture that is given as shares by domain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from megatron_mergemix.config.problems import KeyPath, Problem, suggestion
from megatron_mergemix.errors import ConfigError

SUM_TOLERANCE = 1e-6


def mixture_problems(
    path: KeyPath, mixture: Mapping[str, float], domains: Iterable[str]
) -> Iterator[Problem]:
    """Return what is wrong with shares by domain."""
    yield from known_keys(path, mixture, domains, "domain")
    for name, weight in mixture.items():
        if weight < 0:
            yield Problem((*path, name), f"is {weight:g}, expected a share of at least 0")
    total = math.fsum(mixture.values())
    if abs(total - 1) > SUM_TOLERANCE:
        yield Problem(path, f"has weights that sum to {total:.6g}, expected 1")


def mixture_of(text: str, domains: Sequence[str], flag: str) -> dict[str, float]:
    """Return the mixture that a flag gives as ``math=0.3,code=0.7``; others have no share.

    Raises:
        ConfigError: it is no mixture.
    """
    mixture = dict.fromkeys(domains, 0.0)
    named: set[str] = set()
    for part in text.split(","):
        domain, _, share = part.strip().partition("=")
        if domain not in mixture or domain in named:
            what = "is there twice" if domain in named else "is no domain"
            raise ConfigError(f"{flag} {text!r}: {domain!r} {what}; domains: {', '.join(domains)}.")
        named.add(domain)
        try:
            mixture[domain] = float(share)
        except ValueError:
            mixture[domain] = math.nan
        if not 0.0 <= mixture[domain] <= 1.0:
            raise ConfigError(f"{flag} {text!r}: {share!r} is no share, expected 0 to 1.")
    total = math.fsum(mixture.values())
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise ConfigError(f"{flag} {text!r}: shares sum to {total:.6g}, expected 1.")
    return mixture


def known_keys(
    path: KeyPath, given: Iterable[str], known: Iterable[str], kind: str
) -> Iterator[Problem]:
    """Return which of the given names are not known, each with the nearest known one."""
    names = list(known)
    for name in given:
        if name not in names:
            yield Problem(
                (*path, name),
                f"names no {kind}.{suggestion(name, names)} Known: {', '.join(names)}.",
            )
