"""``--mergemix-mixture``: the name of a reference, or shares of domains."""

from __future__ import annotations

import math
import re

from megatron_mergemix.config import Config
from megatron_mergemix.errors import ConfigError

_TOLERANCE = 1e-6


def with_reference(text: str, config: Config) -> tuple[str, Config]:
    """Return the name of the reference that is meant, and the experiment that has it.

    Args:
        text: a name among ``references``, or shares such as ``math=0.3,code=0.7``; domains that
            are not named have none.
        config: the experiment.

    Raises:
        ConfigError: it is neither, or the shares are no mixture.
    """
    if text in config.references:
        return text, config
    if "=" not in text:
        raise ConfigError(
            f"--mergemix-mixture is {text!r}, expected one of {', '.join(config.references)} or "
            "shares such as math=0.3,code=0.7."
        )
    mixture = _parsed(text, config)
    shown = "-".join(f"{domain}_{share:.6g}" for domain, share in mixture.items() if share > 0)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", shown)
    return name, config.model_copy(update={"references": {**config.references, name: mixture}})


def _parsed(text: str, config: Config) -> dict[str, float]:
    mixture = dict.fromkeys(config.domains, 0.0)
    named: set[str] = set()
    for part in text.split(","):
        domain, _, share = part.strip().partition("=")
        if domain not in mixture or domain in named:
            what = "is there twice" if domain in named else "is no domain"
            raise ConfigError(
                f"--mergemix-mixture {text!r}: {domain!r} {what}; domains: "
                f"{', '.join(config.domains)}."
            )
        named.add(domain)
        mixture[domain] = _share(share, text)
    total = math.fsum(mixture.values())
    if abs(total - 1.0) > _TOLERANCE:
        raise ConfigError(f"--mergemix-mixture {text!r}: shares sum to {total:.6g}, expected 1.")
    return mixture


def _share(text: str, whole: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"--mergemix-mixture {whole!r}: {text!r} is no share, expected 0 to 1.")
    return share
