"""The stage that diagnoses the experts on the model that Megatron-LM built."""

from __future__ import annotations

import torch

from megatron_mergemix.diagnosis.record import is_complete, on_record
from megatron_mergemix.jobs.diagnose import diagnose_on
from megatron_mergemix.megatron_lm.model_setup import padded_vocab_size
from megatron_mergemix.megatron_lm.scoring_stage import ScoringStage
from megatron_mergemix.megatron_lm.stage import NothingToDo
from megatron_mergemix.processes.distributed import rank
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import expert_checkpoints


class DiagnoseStage(ScoringStage):
    """Measures what ``mergemix diagnose`` shows."""

    name = "diagnose"
    lock_name = "diagnose"

    def begin(self) -> None:
        """Check that the experts are there and that something is left to measure."""
        expert_checkpoints(self.config)
        if is_complete(self.config, on_record(self.config)):
            path = RunDir(self.config.run_dir).diagnosis_measured
            raise NothingToDo(f"the experts are diagnosed already: {path}")

    def work(self, chunks: list[torch.nn.Module]) -> None:
        """Collective: measure and write down; the verb computes and shows the rest."""
        diagnose_on(self.config, chunks, padded_vocab_size())
        if rank() == 0:
            print("mergemix: measured; `mergemix diagnose mix.yaml` shows it", flush=True)
