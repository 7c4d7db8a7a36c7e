"""Tasks of lm-evaluation-harness on the resident model; importing it needs the extra lm-eval."""

from megatron_mergemix.errors import ConfigError

try:
    import lm_eval as _package  # noqa: F401
except ImportError as error:
    raise ConfigError(
        "a capability of the kind lm_eval needs the lm-eval package. "
        "Install it with: pip install 'megatron-mergemix[lm-eval]'"
    ) from error
