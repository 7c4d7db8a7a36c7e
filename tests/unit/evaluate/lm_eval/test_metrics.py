"""What kind of number a metric of lm-eval is, by its name."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.evaluate.lm_eval.metrics import kind_of
from megatron_mergemix.evaluate.utility import check_kinds


class Task:
    def higher_is_better(self) -> dict[str, bool]:
        return {"ter": False}


TASK: Any = Task()


@pytest.mark.parametrize(
    ("metric", "kind"),
    [
        ("bleu", (True, "overlap")),
        ("bleu_max", (True, "overlap")),
        ("rouge1_diff,none", (True, "overlap")),
        ("rougeL", (True, "overlap")),
        ("chrf++", (True, "overlap")),
        ("ter", (False, "overlap")),
        ("bleu_acc", (True, "accuracy")),
        ("acc_norm", (True, "accuracy")),
        ("bleurt_max", (True, "bleurt_max")),
        ("terms", (True, "terms")),
    ],
)
def test_the_unit_follows_from_the_name(metric: str, kind: tuple[bool, str]) -> None:
    assert kind_of(TASK, metric) == kind


def test_right_answers_and_overlaps_of_texts_are_not_averaged() -> None:
    def check(*metrics: str) -> None:
        check_kinds("quiz", {metric: kind_of(TASK, metric) for metric in metrics})

    with pytest.raises(
        ConfigError,
        match=r"quiz would be the mean of acc \(higher is better\) and bleu_max "
        r"\(overlap, higher is better\), which means nothing",
    ):
        check("acc", "bleu_max")
    check("bleu_max", "rouge1_max")
    check("acc", "bleu_acc", "exact_match", "f1")
