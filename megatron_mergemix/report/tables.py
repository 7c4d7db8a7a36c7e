"""The tables of a report, section by section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_mergemix.mixtures.components import norm
from megatron_mergemix.report.gather import Model, Run
from megatron_mergemix.report.table import Cell, Table
from megatron_mergemix.search.purposes import is_gradient
from megatron_mergemix.trials import Score, Scores, Trial

EPOCHS = "epochs of the big run"


def trials_table(run: Run) -> Table:
    """Return every trial with its mixture, merge weights, scores and utility."""
    objective = run.utility.objective
    metrics = [(name, metric) for name, of_it in objective.items() for metric in of_it]
    experts = run.config.expert_names
    rows = []
    for trial in run.trials:
        utility, stderr = _utility(run, trial)
        values = [trial.scores.get(name, {}).get(metric) for name, metric in metrics]
        rows.append(
            [
                trial.index,
                trial.purpose,
                *(trial.mixture.get(domain) for domain in run.domains),
                utility,
                stderr,
                *(None if score is None else score.value for score in values),
                *(trial.merge_weights.get(expert) for expert in experts),
                norm(trial.merge_weights.values()),
                float(sum(trial.seconds.values())),
                trial.error or "",
            ]
        )
    columns = [
        "trial",
        "purpose",
        *(f"share of {domain}" for domain in run.domains),
        "utility",
        "standard error",
        *(_metric_name(name, metric, objective[name]) for name, metric in metrics),
        *(f"alpha of {expert}" for expert in experts),
        "norm of alpha",
        "seconds",
        "failed because",
    ]
    return Table("trials", "Every trial of the search", columns, rows)


def _utility(run: Run, trial: Trial) -> tuple[float | None, float | None]:
    if run.scale is None or trial.error is not None or is_gradient(trial):
        return None, None
    return run.utility.of_trial(trial.scores, run.scale)


def _metric_name(capability: str, metric: str, metrics: Sequence[str]) -> str:
    return capability if len(metrics) == 1 else f"{capability} {metric}"


def candidates_table(run: Run) -> Table | None:
    """Return the verified candidates and what the winner was compared with."""
    if run.result is None:
        return None
    rows = []
    for name, found in run.result["alternatives"].items():
        rows.append(
            [
                f"{name} (taken)" if name == run.result["source"] else name,
                *(found["mixture"].get(domain, 0.0) for domain in run.domains),
                found["predicted"],
                found["observed"],
                found["stderr"],
                found["expected"],
                0.0 - found["gain"],
                found["gain_stderr"],
                run.result["better_than"].get(name),
                found["trial"],
            ]
        )
    columns = [
        "mixture",
        *run.domains,
        "predicted before it was measured",
        "measured utility",
        "standard error",
        "expected from all trials",
        "measured against the one taken",
        "error of that",
        "probability that the one taken is better",
        "trial",
    ]
    return Table("candidates", "Candidates, each scored by a real merge", columns, rows)


def domains_table(run: Run) -> Table:
    """Return per domain its tokens, shares, the range that is as good, and epochs."""
    tokens, total = run.tokens, run.config.blend.train_tokens
    learned = None if run.result is None else run.result["mixture"]
    good = {} if run.result is None else run.result["as_good"]
    all_tokens = None if tokens is None else sum(tokens.values())
    rows = []
    for name in run.domains:
        share = None if learned is None else learned.get(name, 0.0)
        rows.append(
            [
                name,
                None if tokens is None else tokens[name],
                None if tokens is None or all_tokens is None else tokens[name] / all_tokens,
                share,
                good.get("least", {}).get(name),
                good.get("largest", {}).get(name),
                _epochs(share, total, None if tokens is None else tokens[name]),
                run.config.domains[name].max_epochs,
            ]
        )
    columns = [
        "domain",
        "tokens",
        "proportional share",
        "learned share",
        "least share that is as good",
        "largest share that is as good",
        EPOCHS,
        "epochs at most",
    ]
    return Table("blend", "The learned blend by domain", columns, rows)


def _epochs(share: float | None, total: float | None, tokens: int | None) -> float | None:
    if share is None or total is None or tokens is None:
        return None
    return share * total / max(tokens, 1)


def surrogates_table(run: Run) -> Table | None:
    """Return which surrogate every capability has, and its leave-one-out errors."""
    if run.result is None:
        return None
    rows: list[list[Cell]] = []
    for name, found in run.result["surrogates"].items():
        for tried, errors in found["candidates"].items():
            used = "yes" if tried == found["surrogate"] else errors.get("refused", "no")
            rows.append([name, tried, used, errors.get("spearman"), errors.get("rmse")])
    columns = ["capability", "surrogate", "used", "Spearman, left out", "RMSE, left out"]
    return Table("surrogates", "Surrogates, judged on trials they did not see", columns, rows)


def models_table(run: Run, found: Sequence[Model]) -> Table:
    """Return the scores of the compared models, with errors."""
    objective = run.utility.objective
    columns = ["model", "utility", "standard error"]
    for name, metrics in objective.items():
        for metric in metrics:
            columns += [f"{name} {metric}", f"error of {name} {metric}"]
    rows = []
    for model in found:
        utility: tuple[float | None, float | None] = (None, None)
        if run.scale is not None:
            utility = run.utility.of_trial(model.scores, run.scale)
        rows.append([model.name, *utility, *_values(model.scores, objective)])
    return Table("capabilities", "Capabilities of the compared models", columns, rows)


def _values(scores: Scores, objective: Mapping[str, Sequence[str]]) -> Iterator[Cell]:
    for name, metrics in objective.items():
        for metric in metrics:
            score: Score | None = scores.get(name, {}).get(metric)
            yield from (None, None) if score is None else (score.value, score.stderr)


def stages_table(run: Run) -> Table | None:
    """Return what each stage of a hierarchical search found; None for a flat one."""
    if run.result is None or "stages" not in run.result:
        return None
    rows: list[list[Cell]] = []
    for stage in run.result["stages"]:
        found = stage.get("mixture", {})
        text = ", ".join(f"{name} {share:.3f}" for name, share in found.items())
        if "skipped" in stage:
            text = f"not searched: {stage['skipped']}"
        keys = ("share", "trials", "reused", "utility", "stderr")
        rows.append([stage["stage"], text or "every domain alone", *map(stage.get, keys)])
    columns = ["stage", "mixture", "share", "trials", "reused", "measured utility", "error"]
    return Table("stages", "Stages of the search", columns, rows)


def held_out_table(run: Run) -> Table | None:
    """Return how the learned mixture does on items that the search never saw."""
    found = {} if run.result is None else (run.result.get("held_out") or {}).get("models", {})
    if not found:
        return None
    keys = [
        f"{what}{side}{error}"
        for what in ("", "gain_")
        for side in ("searched", "held_out")
        for error in ("", "_stderr")
    ]
    columns = [
        "mixture",
        *("utility, items searched", "error", "utility, new items", "error"),
        *("learned gains, items searched", "error", "learned gains, new items", "error"),
    ]
    rows = [[name, *(row.get(key) for key in keys)] for name, row in found.items()]
    return Table("held-out", "On items that the search never saw", columns, rows)


def references_table(run: Run) -> Table | None:
    """Return the really trained mixtures beside their proxies."""
    if run.validation is None:
        return None
    rows = []
    for row in run.validation["references"]:
        predicted = row.get("predicted") or {}
        rows.append(
            [
                row["name"],
                *(row["mixture"].get(domain, 0.0) for domain in run.domains),
                row["utility"],
                row["behind"],
                row["behind_stderr"],
                (row.get("proxy") or {}).get("utility"),
                predicted.get("utility"),
                *(predicted.get("interval") or (None, None)),
                *(value for metrics in row["scores"].values() for value in metrics.values()),
            ]
        )
    first = run.validation["references"][0]["scores"] if rows else {}
    columns = [
        "reference",
        *run.domains,
        "utility, really trained",
        "behind the best",
        "error of that",
        "utility of its proxy",
        "predicted",
        "from",
        "to",
        *(f"{name} {metric}" for name, metrics in first.items() for metric in metrics),
    ]
    return Table("references", "Really trained mixtures, best first", columns, rows)


def fidelity_table(run: Run) -> Table | None:
    """Return how well proxies rank what was really trained."""
    fidelity: Mapping[str, Any] = (
        {} if run.validation is None else run.validation.get("fidelity", {})
    )
    if not fidelity:
        return None
    parts = {"utility of proxies": fidelity.get("overall")}
    parts["utility as predicted"] = fidelity.get("surrogate")
    parts |= fidelity.get("capabilities") or {}
    rows: list[list[Cell]] = []
    for name, found in parts.items():
        if found:
            spearman = found.get("spearman_interval") or (None, None)
            kendall = found.get("kendall_interval") or (None, None)
            rows.append(
                [
                    name,
                    found.get("n"),
                    found.get("spearman"),
                    *spearman,
                    found.get("kendall"),
                    *kendall,
                    found.get("mean_absolute_error"),
                ]
            )
    columns = [
        *("of", "references", "Spearman", "from", "to", "Kendall", "from", "to"),
        "mean absolute error",
    ]
    return Table("fidelity", "How well proxies rank real training", columns, rows)


GAPS = ("uniform", "proportional", "learned", "largest", "spread_ratio", "rank_correlation")
"""What ``mergemix diagnose`` predicts of the gap between trained and merged models."""


def curvature_table(run: Run) -> Table | None:
    """Return the predicted gap between really trained and merged models, by loss."""
    found: Mapping[str, Any] = (run.diagnosis or {}).get("curvature") or {}
    rows: list[list[Cell]] = []
    for name, measured in found.items():
        gap = measured.get("gap") or {}
        rows.append([name, *(gap.get(key) for key in GAPS)])
    columns = [
        "loss",
        *(f"gap, {key}" for key in GAPS[:4]),
        "its spread over the loss's",
        "rank correlation",
    ]
    return (
        Table("curvature", "Predicted gap between trained and merged models", columns, rows)
        if rows
        else None
    )


CALIBRATIONS = {
    "calibration": "really trained",
    "calibration_shifted": "really trained, without the others' mean offset",
    "calibration_of_merges": "merges",
}
"""Key in the record -> whose utility was to lie in the predicted interval."""


def choices_table(run: Run) -> Table | None:
    """Return what choosing by proxies loses, and how often predicted intervals held."""
    fidelity: Mapping[str, Any] = (run.validation or {}).get("fidelity") or {}
    rows: list[list[Cell]] = []
    for count, found in (fidelity.get("top_k") or {}).items():
        if found:
            interval = found.get("interval") or (None, None)
            rows.append([f"regret of the best of the top {count}", found["regret"], *interval])
    for key, whose in CALIBRATIONS.items():
        for level, share in (fidelity.get(key) or {}).items():
            what = f"share within the {level} interval, {whose}"
            if (num := fidelity.get("calibration_n")) is not None:  # older records count all
                what += f", of {num} that are no trials"
            rows.append([what, share, None, None])
    columns = ["what", "value", "from", "to"]
    return Table("choices", "Choosing by proxies", columns, rows) if rows else None
