"""The errors a user can meet. Everything else that escapes is a bug of ours."""


class MergeMixError(Exception):
    """Says what is wrong, what was expected, where, and what to do.

    The command line prints the message alone; ``--traceback`` shows the rest.
    """


class ConfigError(MergeMixError):
    """A setting in the YAML or on the command line is wrong."""


class DataError(MergeMixError):
    """A dataset file is missing, damaged, or too small for what is asked of it."""


class CheckpointError(MergeMixError):
    """A checkpoint is missing, damaged, or does not fit the others."""


class TrainingError(MergeMixError):
    """A training run cannot start, cannot continue, or went wrong."""


class DivergedError(TrainingError):
    """A training run is no longer finite, on all ranks; another run may well be."""


class EvaluationError(MergeMixError):
    """A candidate cannot be scored."""


class SearchError(MergeMixError):
    """The search cannot start, cannot resume, or cannot draw a conclusion."""


class BlendError(MergeMixError):
    """A mixture cannot be expressed as a Megatron blend."""
