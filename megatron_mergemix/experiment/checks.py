"""Whether a search can begin or go on, asked before any process is started. No torch."""

from __future__ import annotations

from megatron_mergemix.checkpoint.checks import check_compatible, check_intact
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.config import Config
from megatron_mergemix.experiment.digests import ensemble_digests, trial_digests
from megatron_mergemix.experiment.strategy import ensemble_paths, make_strategy
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.ensemble_files import has_tokens
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints


def check_checkpoints(config: Config) -> None:
    """Check that base and experts are whole and fit each other, without reading any weights.

    Raises:
        CheckpointError: a file is missing or truncated, or names, shapes or dtypes differ.
    """
    base = read_index(base_checkpoint(config))
    experts = {name: read_index(path) for name, path in expert_checkpoints(config).items()}
    for index in (base, *experts.values()):
        check_intact(index)
    check_compatible(base, experts)


def check_journal(config: Config) -> None:
    """Check that a search that was begun can be continued, before any process is started.

    Raises:
        SearchError: the journal is damaged, or its trials were measured on something else.
    """
    path = RunDir(config.run_dir).trials
    if not path.exists():
        return
    trials = Journal(path, trial_digests(config)).trials()
    if _is_ensemble_there(config):  # else the search measures it anew before it looks
        make_strategy(config).tell(trials)


def _is_ensemble_there(config: Config) -> bool:
    """Return whether nothing of the experts' token probabilities is to be measured.

    Raises:
        SearchError: a file is damaged, or was measured on something else.
    """
    if not config.search.ensemble:
        return True
    digests = ensemble_digests(config)
    return all(has_tokens(path, digests[name]) for name, path in ensemble_paths(config).items())
