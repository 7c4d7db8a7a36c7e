"""``--mergemix-mixture``: the name of a reference, or shares of domains."""

from __future__ import annotations

import re

from megatron_mergemix.config import Config
from megatron_mergemix.config.mixtures import mixture_of
from megatron_mergemix.errors import ConfigError


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
    mixture = mixture_of(text, list(config.domains), "--mergemix-mixture")
    shown = "-".join(f"{domain}_{share:.6g}" for domain, share in mixture.items() if share > 0)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", shown)
    return name, config.model_copy(update={"references": {**config.references, name: mixture}})
