"""``mix.yaml`` as strict typed models: every setting, its unit and its default.

Long sections have files of their own: ``evaluate``, ``search``, ``validation``. Rules over several
settings are in ``checks`` and beside the sections. ``docs/settings.md`` is written from the models.

An unknown key is an error. :func:`load_config` is the way in; it turns whatever is wrong into
one :class:`ConfigError` that names the path of the key, the value, what was expected and the
nearest valid key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path as _Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from megatron_mergemix.config.checks import cross_field_problems
from megatron_mergemix.config.evaluate import Evaluate
from megatron_mergemix.config.groups import Group, flattened, leaves_by_group
from megatron_mergemix.config.problems import explain, refuse
from megatron_mergemix.config.search import Search
from megatron_mergemix.config.section import Bounds, Path, Positive, Section, Share
from megatron_mergemix.config.validation import Validation, with_fillings
from megatron_mergemix.config.words import words_of
from megatron_mergemix.config.yaml_file import apply_overrides, read_yaml


class Tokenizer(Section):
    """How text becomes tokens; must be the one the datasets were made with."""

    kind: Literal["byte", "huggingface"] = "byte"
    """``byte``: 256 bytes + end of document, no files. ``huggingface``: from ``path``."""
    path: Path | None = None
    """Folder of a Hugging Face tokenizer; only with ``huggingface``."""


class Model(Section):
    """Architecture for the built-in trainer. A Megatron-LM launch brings its own and omits this."""

    num_layers: Positive
    hidden_size: Positive
    num_attention_heads: Positive
    num_query_groups: Positive | None = None
    """Key-value heads (GQA); default: as many as attention heads."""
    ffn_hidden_size: Positive | None = None
    """Default: 4 x hidden_size, with swiglu 8/3 x hidden_size rounded up to 32."""
    seq_length: Positive = 1024
    """Tokens per training sample."""
    vocab_size: Positive | None = None
    """Default: the tokenizer's."""
    make_vocab_size_divisible_by: Positive = 128
    """The embedding is padded to a multiple of this, independently of the parallel layout."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the variance inside every normalisation."""
    position_embedding: Literal["rope", "learned_absolute"] = "rope"
    rotary_base: Positive = 10000
    """Base of the wavelengths of rope."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""
    num_moe_experts: Positive | None = None
    """MoE experts per layer; default: a dense model."""
    moe_top_k: Positive = 2
    """MoE experts that see a token."""
    moe_ffn_hidden_size: Positive | None = None
    """Default: ffn_hidden_size."""
    moe_aux_loss_coeff: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight of the loss that spreads tokens over MoE experts."""
    init_std: Annotated[float, Field(gt=0.0)] = 0.02
    """Standard deviation of the first weights of a base that is trained here."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations; with bf16 the optimizer keeps fp32 weights."""

    def ffn_width(self) -> int:
        """Return ``ffn_hidden_size`` with its default filled in."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            return -(-(self.hidden_size * 8 // 3) // 32) * 32
        return 4 * self.hidden_size

    def padded_vocab(self, vocab_size: int) -> int:
        """Return the rows of the embedding for a vocabulary of ``vocab_size`` tokens."""
        multiple = self.make_vocab_size_divisible_by
        return -(-vocab_size // multiple) * multiple


class Parallel(Section):
    """Parallel layout of the built-in trainer and search. Data parallel is what remains."""

    processes: Positive = 1
    """Ranks in total: tensor x pipeline x data; expert parallel divides the data ranks."""
    tensor: Positive = 1
    """Ranks that share every layer."""
    pipeline: Positive = 1
    """Stages, each with as many layers."""
    expert: Positive = 1
    """Ranks that share the MoE experts of a layer."""
    distributed_optimizer: bool = False
    """Shard optimizer states over the data-parallel ranks."""


class Training(Section):
    """What every run of the built-in trainer has in common."""

    global_batch_size: Positive = 64
    """Sequences per step."""
    micro_batch_size: Positive = 8
    """Sequences per forward pass and data-parallel rank."""
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.95
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled, as in AdamW."""
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0
    """Maximum gradient norm; 0 switches clipping off."""
    save_interval: Positive = 500
    """Steps between saves; a killed run continues from its last save."""
    log_interval: Positive = 10
    """Steps between progress lines and TensorBoard scalars."""


class BaseTraining(Section):
    """A base trained from scratch by the built-in trainer, for trying the method out."""

    tokens: Annotated[float, Field(gt=0)]
    lr: Annotated[float, Field(gt=0)]
    """Constant after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate grows to ``lr``."""
    mixture: Literal["uniform", "proportional"] | dict[str, float] = "uniform"
    """``proportional``: by tokens of the domains."""
    seed: int = 1
    """Of the first weights and of the order of the data."""


class Base(Section):
    """The checkpoint that every expert starts from: exactly one of the two."""

    checkpoint: Path | None = None
    """torch_dist checkpoint: a root with a tracker file, or one iteration's folder."""
    train: BaseTraining | None = None


class Domain(Section):
    """One named data source; or a group of them, with the keys ``children`` (name: domain) and
    ``bounds`` (of their total share) alone, for ``search.hierarchy``."""

    prefixes: list[str] | dict[str, float]
    """Megatron dataset prefixes (without .bin/.idx); a mapping gives each its weight within the
    domain, a list weighs them by tokens."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """The blend never repeats this domain more often than that over ``blend.train_tokens``. All its
    tokens count: where you give its prefixes weights, one of them may be repeated more often."""
    bounds: Bounds = (0.0, 1.0)
    """Least and largest share of this domain in any mixture the search may recommend."""


class Experts(Section):
    """The short runs that are merged: constant learning rate, from the base. One per domain, or
    those of ``components``."""

    tokens: Annotated[float, Field(gt=0)] = 5e9
    """Tokens per expert (paper: 5e9)."""
    lr: Annotated[float, Field(gt=0)] = 3.7e-4
    """Constant learning rate (paper: 3.74e-4 for the 16B model)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate grows to ``lr``."""
    general_share: Annotated[float, Field(ge=0.0, lt=1.0)] | None = 0.25
    """Share of general data in every expert's training mixture (DeMix). Expert k is trained on
    ``(1 - general_share) * domain k + general_share * general_mixture``. 0 is the paper. Means
    nothing, and is null, with ``components``; the same holds for ``general_mixture``."""
    general_mixture: Literal["uniform", "proportional"] | dict[str, float] | None = "uniform"
    """What ``general_share`` is drawn from; ``proportional``: by tokens of the domains."""
    components: dict[str, Literal["uniform", "proportional"] | dict[str, float]] = {}
    """Experts with mixtures of your own choice in place of one expert per domain: name of the
    expert -> what it is trained on. At least as many as there are domains; with more, a candidate
    has the smallest merge weights that stand for its mixture, which averages their noise."""
    average_last: Positive | None = None
    """The expert is the mean of its last n saves (WSM, arXiv 2507.17634), and so is a reference
    model; null means the saves in the last third of the steps. 1, the paper, takes the last one."""
    seed: int = 1
    """Of the order of the data, of reference models too."""
    checkpoints: dict[str, Path] = {}
    """Experts that are trained already: name of the expert (its domain, without ``components``) ->
    torch_dist checkpoint. All experts or none. ``general_share`` and ``general_mixture``, or
    ``components``, must say what they were trained on, for merge weights follow from it:
    ``general_share: 0`` for experts of one domain each."""

    @model_validator(mode="before")
    @classmethod
    def _no_general_data_beside_components(cls, given: Any) -> Any:
        """Leave out defaults that would mean nothing; what a user wrote stays, and is refused."""
        if isinstance(given, dict) and given.get("components"):
            return {"general_share": None, "general_mixture": None, **given}
        return given


class Blend(Section):
    """How the learned mixture is handed to Megatron."""

    train_tokens: Annotated[float, Field(gt=0)] | None = None
    """Tokens of the big run; needed for epochs per domain and ``max_epochs``."""
    split: str = "99,1,0"
    """Megatron's ``--split`` of the written files, and of base, experts and references, which train
    on its first part; tokens are counted there. With another split all are trained anew."""


Mixture = Literal["learned", "uniform", "proportional"] | dict[str, float]


class Launch(Section):
    """How jobs are started."""

    kind: Literal["builtin", "command"] = "builtin"
    """``builtin``: the trainer on Megatron Core, ``parallel.processes`` ranks on this machine.
    ``command``: your own launch of Megatron-LM's pretrain_gpt.py, which brings model, parallel
    layout and optimizer along."""
    command: Annotated[list[str] | None, BeforeValidator(words_of)] = None
    """Your launch, for the verbs that start stages (``run``, ``train``, ``search``, ``validate``,
    ``evaluate``, ``diagnose``, ``submit``), such as
    ``torchrun --nproc-per-node 8 -m megatron_mergemix.launch pretrain_gpt.py ...``: text that is
    cut into words as a shell would, or a list of words; no shell, so no variables. The stage is
    appended. On several nodes ``mergemix submit`` adds the rendezvous. Not needed where you start
    the stages yourself."""


class SlurmTime(Section):
    """Time limits as ``sbatch --time`` takes them. A job that has saved goes on in a new one."""

    base: str = "24:00:00"
    expert: str = "24:00:00"
    """Of each expert."""
    search: str = "12:00:00"
    blend: str = "00:10:00"
    reference: str = "24:00:00"
    """Of each reference model: it is trained, and scored beside the merge for its mixture."""
    validation: str = "00:30:00"
    """Of their comparison."""


class Slurm(Section):
    """What the jobs of ``mergemix submit`` ask a SLURM cluster for."""

    nodes: Positive = 1
    """Of every job with ranks: base, experts, search, references; each node starts
    parallel.processes / nodes of them. With launch.kind command the launch says how many. Blend and
    validation take one process on one node."""
    gpus_per_node: Positive | None = None
    """One per rank; default: none."""
    cpus_per_node: Positive | None = None
    """Default: whole nodes with all their memory (``--exclusive``, ``--mem=0``)."""
    time: SlurmTime = SlurmTime()
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    experts_at_once: Positive | None = None
    """Experts that are trained at the same time; default: as many as the cluster starts."""
    references_at_once: Positive | None = None
    """The same for reference models."""
    options: dict[str, str | int | bool] = {}
    """Other options of sbatch by their long names, ``constraint: h100``; true: without a value."""
    srun: dict[str, str | int | bool] = {}
    """Options of srun, such as ``container-image: /images/megatron.sqsh`` (pyxis)."""
    setup: list[str] = []
    """Lines of shell that begin every job: ``module load cuda``, ``source venv/bin/activate``."""
    python: str | None = None
    """Shell words that start Python on a node, such as ``apptainer exec --nv IMAGE python``;
    default: the interpreter that runs ``mergemix submit``."""


class ModelFacts(Section):
    """What results depend on beside data and checkpoints: the model and how it is trained."""

    seq_length: Positive
    """Tokens per training sample and held-out window."""
    global_batch_size: Positive
    """Sequences per optimizer step."""
    scoring: dict[str, Any]
    """Every setting that the scores of a checkpoint depend on, by name."""
    training: dict[str, Any]
    """Every setting that the result of training depends on, by name."""

    def steps(self, tokens: float) -> int:
        """Return the optimizer steps that make at least ``tokens``."""
        return math.ceil(tokens / (self.global_batch_size * self.seq_length))


class Config(Section):
    """One experiment."""

    run_dir: Path
    """Everything the experiment writes goes here. Relative paths in the YAML are relative to the
    working directory."""
    tokenizer: Tokenizer = Tokenizer()
    model: Model | None = None
    parallel: Parallel = Parallel()
    training: Training = Training()
    base: Base
    domains: dict[str, Domain]
    experts: Experts = Experts()
    evaluate: Evaluate
    search: Search = Search()
    blend: Blend = Blend()
    references: dict[str, Mixture] = {
        "learned": "learned",
        "uniform": "uniform",
        "proportional": "proportional",
    }
    """Name -> mixture of the reference models of ``mergemix validate``: each is really trained
    from the base with the experts' budget and learning rate."""
    validation: Validation = Validation()
    launch: Launch = Launch()
    slurm: Slurm | None = None
    """Only for ``mergemix submit``."""
    launched: ModelFacts | None = None
    """Filled in by the plugin from the arguments of a Megatron-LM launch; not for the YAML."""
    groups: dict[str, Group] = {}
    """Filled in from domains with ``children``, which are in ``domains`` themselves; not for the
    YAML."""

    def leaves_by_group(self) -> dict[str, tuple[str, ...]]:
        """Return group -> its domains; a domain without a group is a group of its own."""
        return leaves_by_group(list(self.domains), self.groups)

    @property
    def expert_names(self) -> list[str]:
        """Return the names of the experts, in the order of the rows of the component matrix."""
        return list(self.experts.components or self.domains)

    def steps(self, tokens: float) -> int:
        """Return the steps of the built-in trainer that make at least ``tokens``."""
        assert self.model is not None, "checked when the YAML was loaded"
        return math.ceil(tokens / (self.training.global_batch_size * self.model.seq_length))


def load_config(path: str | _Path, overrides: Sequence[str] = ()) -> Config:
    """Return the experiment that a YAML file describes.

    Checks everything that can be known without opening another file.

    Args:
        path: the YAML file.
        overrides: ``"a.b.c=value"`` with values in YAML; they win over the file.

    Raises:
        ConfigError: lists what is wrong, each with file and line, key, value and what was expected.
    """
    source = read_yaml(_Path(path))
    refuse(source.problems, source.name, source.lines)
    overridden = apply_overrides(source.data, overrides)
    flat = flattened(source.data)
    refuse(flat.problems, source.name, source.lines, overridden)
    try:
        config = Config.model_validate(flat.data)
    except ValidationError as error:
        problems = explain(error, Config, flat.data)
    else:
        problems = cross_field_problems(config)
        if not problems:
            config, problems = with_fillings(config)
    refuse(flat.in_yaml(problems), source.name, source.lines, overridden)
    return config
