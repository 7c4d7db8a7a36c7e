"""The stage that searches the mixture on the model that Megatron-LM built."""

from __future__ import annotations

import torch

from megatron_mergemix.experiment.checks import check_checkpoints
from megatron_mergemix.experiment.search_record import search_result, write_learned_blend
from megatron_mergemix.jobs.search import search_on
from megatron_mergemix.megatron_lm.model_setup import padded_vocab_size
from megatron_mergemix.megatron_lm.scoring_stage import ScoringStage
from megatron_mergemix.megatron_lm.stage import NothingToDo, is_rank_0
from megatron_mergemix.processes.distributed import rank, together
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import expert_checkpoints
from megatron_mergemix.training_runs.mixtures import assumed_components


class SearchStage(ScoringStage):
    """Searches the mixture in place."""

    name = "search"
    lock_name = "search"

    def begin(self) -> None:
        """Check that the experts are there and the search is not done."""
        expert_checkpoints(self.config)
        if search_result(self.config) is not None:
            raise NothingToDo(f"the search is done already: {RunDir(self.config.run_dir).result}")
        if is_rank_0() and (assumed := assumed_components(self.config)):
            print(f"mergemix: note: {assumed}", flush=True)

    def work(self, chunks: list[torch.nn.Module]) -> None:
        """Collective: search, write the result and the blend files."""
        config = self.config
        with together():
            if rank() == 0:
                check_checkpoints(config)
        search_on(config, chunks, padded_vocab_size())
        with together():
            if rank() == 0 and (result := search_result(config)) is not None:
                shares = [f"{name} {share:.4f}" for name, share in result["mixture"].items()]
                print(f"mergemix: learned mixture: {', '.join(shares)}")
                folder = write_learned_blend(config, result)
                print(f"mergemix: blend files in {folder}", flush=True)
