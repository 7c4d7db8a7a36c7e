"""The section ``evaluate`` of ``mix.yaml``: what is measured on every candidate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_mergemix.config.section import Path, Positive, Section
from megatron_mergemix.config.words import words_of


class LossTask(Section):
    """Held-out loss on fixed batches."""

    prefixes: list[str]
    """Datasets that training never sees."""
    sequences: Positive = 128
    """Windows of ``seq_length`` tokens, spread evenly over the data."""
    metric: Literal["loss", "bpb"] = "loss"
    """What the utility sees: ``loss`` in nats per token or ``bpb`` in bits per byte. Both are
    recorded where ``<prefix>.json``, which ``mergemix data`` writes, tells the bytes of a dataset;
    elsewhere ``bpb`` is refused."""


class LmEvalTask(Section):
    """Tasks of lm-evaluation-harness, scored on the resident model (extra ``lm-eval``)."""

    tasks: list[str]
    """Names of tasks, groups or tags, or paths of task files (``.yaml``)."""
    include_path: list[Path] = []
    """Folders with task files of your own, whose names ``tasks`` may use."""
    metric: str | None = None
    """What the utility sees of every task: a metric of the task such as ``acc_norm``, or
    ``gold_bpb``, the bits per byte of the right answers, which is recorded for every task that has
    them and has the least noise. With it documents without a right answer are left out, and no
    answer is written. Default: the task's first metric."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Worked examples before every question; default: as the task says."""
    limit: Positive | None = None
    """Documents per task, drawn by ``seed``; default: all. With ``gold_bpb`` those of them count
    that have a right answer."""
    seed: int = 1234
    """Of the few-shot examples, of ``limit``, and of what a task itself shuffles."""
    chat_template: bool = False
    """Put questions into the tokenizer's chat template; few-shot examples become turns."""
    system_instruction: str | None = None
    """Put before every question."""


class CommandTask(Section):
    """A program of your own that scores a checkpoint."""

    run: Annotated[list[str], BeforeValidator(words_of)]
    """Its words, with ``{checkpoint}``, the folder of the candidate in torch_dist format, and
    ``{output}``, the JSON file that it must write. Text is cut into words as a shell would, but no
    shell reads them."""
    metrics: list[str]
    """What the utility sees, as the mean: numbers in the JSON, ``a.b`` for nested ones. All other
    numbers are recorded too."""
    higher_is_better: bool = True
    stderr: str | None = None
    """Where the JSON has the standard error of the only metric."""
    timeout: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds; a program that takes longer is killed with all that it has started."""
    retries: Annotated[int, Field(ge=0)] = 0
    """How often it is started again after it failed."""


class Capability(Section):
    """A named group of benchmarks: exactly one of the three."""

    loss: LossTask | None = None
    lm_eval: LmEvalTask | None = None
    command: CommandTask | None = None

    @property
    def kinds(self) -> list[str]:
        """Return which of the three are given; one, once the settings are checked."""
        return [name for name in KINDS if getattr(self, name) is not None]


KINDS = tuple(Capability.model_fields)


class Utility(Section):
    """The number that is maximised."""

    kind: Literal["mean", "worst"] = "mean"
    """``mean``: weighted mean over capabilities. ``worst``: their minimum."""
    normalize: Literal["vertices", "zscore", "none"] = "vertices"
    """``vertices``: 0 is the worst and 1 the best score of the capability over the mixtures of one
    domain alone.
    ``zscore``: over the trials of the design. ``none``: raw, with losses negated."""
    weights: dict[str, Annotated[float, Field(ge=0.0)]] = {}
    """Capability -> weight, of each of them; 0 leaves it out. Default: all equal."""

    def weight(self, capability: str) -> float:
        """Return the weight of a capability."""
        return self.weights.get(capability, 1.0)

    def counts(self, capability: str) -> bool:
        """Return whether a capability has a weight."""
        return self.weight(capability) > 0


class Evaluate(Section):
    """What is measured on every candidate."""

    capabilities: dict[str, Capability]
    utility: Utility = Utility()
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Share of the items of every capability that the search never sees: on them the recommended
    mixture is compared with others once more when the search has ended, because what wins among
    many on some items wins there partly by luck. 0 switches it off. ``loss`` takes them from the
    windows that are left beside ``sequences``, so they cost the search nothing; ``lm_eval`` splits
    the documents of a task, and with a fifth the noise of the search grows by 12 % while the
    comparison has twice that noise, which the paired gain of a search that found something
    survives. A ``command`` cannot be split."""
    commands_at_once: Positive = 1
    """Commands that score one candidate at the same time; they share its checkpoint."""
    scratch: Path | None = None
    """Folder for the checkpoint of a candidate that a ``command`` scores, where memory (/dev/shm)
    has no room for it; default: ``scratch`` in ``run_dir``. One candidate is there at a time."""
    micro_batch_size: Positive = 8
    """Sequences per forward pass."""

    @property
    def losses(self) -> dict[str, LossTask]:
        """Return the capabilities that are held-out losses."""
        return {name: c.loss for name, c in self.capabilities.items() if c.loss is not None}

    @property
    def lm_evals(self) -> dict[str, LmEvalTask]:
        """Return the capabilities that are tasks of lm-evaluation-harness."""
        return {n: c.lm_eval for n, c in self.capabilities.items() if c.lm_eval is not None}

    @property
    def commands(self) -> dict[str, CommandTask]:
        """Return the capabilities that programs of the user's own score."""
        return {n: c.command for n, c in self.capabilities.items() if c.command is not None}
