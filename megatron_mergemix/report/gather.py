"""Everything a run directory holds of an experiment, read and never changed.

A report shows what was measured, so the settings are those on record in ``config.json``, not
those the YAML has now. Checkpoints are not opened: a run directory without them, on a laptop, gives
the same report. What else may be missing is said in :attr:`Run.missing`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.diagnosis.record import diagnosed_settings
from megatron_mergemix.errors import ConfigError, MergeMixError, SearchError
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.experiment.digests import of_checkpoints, settings_digests
from megatron_mergemix.model_facts import with_recorded_launch
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.first_share import on_all_items
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.search.purposes import is_gradient, kind_of
from megatron_mergemix.training_runs.mixtures import train_tokens
from megatron_mergemix.trials import Scores, Trial, scores_of

SCORED_ON = ("evaluate.", "model.")
"""How the digests begin that scores of one and the same model depend on."""


@dataclass(frozen=True)
class Model:
    """One model with its scores.

    Attributes:
        name: ``base``, ``math alone``, ``expert math``, ``uniform``, ``learned``.
        scores: on all items of the search.
        mixture: it stands for, or was trained on; empty where that means nothing.
    """

    name: str
    scores: Scores
    mixture: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """One experiment, as far as it got.

    Attributes:
        run_dir: where it lies.
        config: the settings on record.
        digests: what the trials depend on, by name.
        trials: of the search, in the order of their indices.
        utility: what is maximised.
        scale: what its 0 and 1 mean; None while too few trials of the design are measured.
        result: what the search recommends, see ``search/result.json``; None while it is not over.
        validation: what the reference models say of this search, see ``validate/result.json``;
            None where they do not.
        diagnosis: what ``mergemix diagnose`` found; None where it was not asked. What it says of
            the learned mixture is None where that is another one.
        evaluations: the experts, where ``mergemix evaluate`` scored them on the search's items.
        tokens: of every domain, for training; None where the datasets are not here.
        missing: what the report cannot show, and why or how to get it, one sentence each.
    """

    run_dir: RunDir
    config: Config
    digests: Mapping[str, str]
    trials: Sequence[Trial]
    utility: Utility
    scale: Scale | None
    result: Mapping[str, Any] | None
    validation: Mapping[str, Any] | None
    diagnosis: Mapping[str, Any] | None
    evaluations: Sequence[Model]
    tokens: Mapping[str, int] | None
    missing: Sequence[str] = field(default=())

    @property
    def domains(self) -> list[str]:
        """Return the names of the domains in the order of all vectors."""
        return list(self.config.domains)

    @property
    def scored(self) -> list[Trial]:
        """Return the trials that scored a mixture on all items."""
        return [trial for trial in self._of_mixtures() if trial.first is None]

    def teaching(self) -> list[Trial]:
        """Return what surrogates learn from: one trial per mixture, as on all items."""
        return on_all_items(self._of_mixtures())

    def _of_mixtures(self) -> list[Trial]:
        return [t for t in self.trials if t.mixture and t.error is None and not is_gradient(t)]


def read_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Return the experiment of a run directory, or of the one that a YAML file names.

    Raises:
        ConfigError: neither is there, or the settings on record cannot be read.
        SearchError: no search was started there, or its files are damaged.
    """
    run_dir = RunDir(path if path.is_dir() else load_config(path, overrides).run_dir)
    if not run_dir.trials.exists():
        raise SearchError(
            f"there is no search in {run_dir.root} yet ({run_dir.trials} is missing), so there is "
            "nothing to report. Run `mergemix run mix.yaml` first; `mergemix plan` shows what it "
            "will do."
        )
    config = _recorded_config(run_dir)
    digests, trials = read_journal(run_dir.trials)
    trials.sort(key=lambda trial: trial.index)
    utility = Utility(config.evaluate.utility, objective(config))
    _check_settings(run_dir, config, trials)
    missing: list[str] = []
    scale = _scale(utility, trials, missing)
    tokens = _tokens(config, missing)
    known = {**digests, **settings_digests(config, tokens)}
    result = _result(run_dir, known, missing)
    return Run(
        run_dir,
        config,
        digests,
        trials,
        utility,
        scale,
        result,
        _validation(run_dir, known if result is None else result["digests"], missing),
        _diagnosis(run_dir, config, digests, result, missing),
        _evaluations(run_dir, digests),
        tokens,
        missing,
    )


def models(run: Run) -> list[Model]:
    """Return the models whose capabilities are compared: base, domains alone, priors, learned.

    Domains alone are trials at the corners of the simplex, as far as the bounds allow those. With a
    general share they are merges, not experts; the experts themselves are scored when a search
    ends, or by ``mergemix evaluate``.
    """
    found = [Model("base", t.scores, {}) for t in run.trials if not t.mixture and t.error is None]
    found += run.evaluations
    taken = {model.name for model in found}
    for trial in run.scored:
        if kind_of(trial.purpose) != "vertex":
            continue
        whole = [expert for expert, weight in trial.merge_weights.items() if weight == 1.0]
        top = max(trial.mixture, key=trial.mixture.__getitem__)
        name = f"expert {whole[0]}" if whole else f"{top} alone"
        if name not in taken and (whole or trial.mixture[top] > 1 - 1e-9):
            found.append(Model(name, trial.scores, trial.mixture))
            taken.add(name)
    by_index = {trial.index: trial for trial in run.scored}
    if run.result is None:
        priors = [t for t in run.scored if kind_of(t.purpose).startswith("prior:")]
        return [*found, *(Model(t.purpose.split(":")[1], t.scores, t.mixture) for t in priors)]
    alternatives = run.result["alternatives"]
    places = {name: alternatives.get(name) for name in ("uniform", "proportional")}
    places["learned"] = alternatives.get(run.result["source"])
    for name, place in places.items():
        if place is not None and place["trial"] in by_index:
            trial = by_index[place["trial"]]
            found.append(Model(name, trial.scores, trial.mixture))
    return found


def scored_on(digests: Mapping[str, str]) -> dict[str, str]:
    """Return what the scores of one and the same model depend on, by name."""
    return {name: text for name, text in digests.items() if name.startswith(SCORED_ON)}


# ---- the files ----


def _recorded_config(run_dir: RunDir) -> Config:
    record = read_json(run_dir.config)
    if record is None:
        raise ConfigError(
            f"{run_dir.config} is missing: the settings of the search in {run_dir.root}. Any verb "
            "that runs a stage, such as `mergemix search mix.yaml`, writes it."
        )
    try:
        config = Config.model_validate(record)
        # It may have been moved since, and the launch is on record there as well.
        return with_recorded_launch(config.model_copy(update={"run_dir": run_dir.root}))
    except ValidationError as error:
        raise ConfigError(
            f"{run_dir.config} was written by another version of megatron-mergemix: {error}"
        ) from error


def _check_settings(run_dir: RunDir, config: Config, trials: Sequence[Trial]) -> None:
    """Check that the settings on record are those of the trials, as far as names tell.

    Raises:
        SearchError: a trial mixed other domains, or measured other capabilities.
    """
    for trial in trials:
        for what, found, known in (
            ("domains", set(trial.mixture), set(config.domains)),
            ("capabilities", set(trial.scores), set(config.evaluate.capabilities)),
        ):
            if found and found != known:
                raise SearchError(
                    f"{run_dir.config} has the {what} {', '.join(sorted(known))}, but trial "
                    f"{trial.index} of {run_dir.trials} has {', '.join(sorted(found))}: the "
                    "settings were changed after the search. `mergemix search mix.yaml` says what "
                    "differs; undo the change, or use another run_dir."
                )


def read_json(path: Path) -> Any:
    """Return what a file of the run directory holds; None where it is not there.

    Raises:
        SearchError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SearchError(f"cannot read {path}: {error}. Restore it, or move it away.") from error


def _scale(utility: Utility, trials: Sequence[Trial], missing: list[str]) -> Scale | None:
    try:
        return utility_scale(utility, trials)
    except SearchError as error:
        missing.append(f"There are no utilities: {error}")
        return None


def _result(
    run_dir: RunDir, known: Mapping[str, str], missing: list[str]
) -> Mapping[str, Any] | None:
    result = read_json(run_dir.result)
    if result is None:
        missing.append(
            "The search is not over: there is no recommendation yet. Continue it with `mergemix "
            "search mix.yaml`."
        )
        return None
    if differing := _differing(result["digests"], known):
        missing.append(
            f"{run_dir.result} belongs to another search than the trials and settings beside it, "
            f"so it is not shown; what differs: {', '.join(differing)}. Continue the search with "
            "`mergemix search mix.yaml`, or undo the change."
        )
        return None
    return dict(result)


def _differing(recorded: Mapping[str, str], known: Mapping[str, str]) -> list[str]:
    return [name for name, text in known.items() if recorded.get(name) != text]


def _validation(
    run_dir: RunDir, known: Mapping[str, str], missing: list[str]
) -> Mapping[str, Any] | None:
    record = read_json(run_dir.validation)
    if record is None:
        return None
    # Older versions wrote no digests, so nobody knows which search theirs belong to.
    recorded = record.get("digests", {}) if isinstance(record, dict) else {}
    if _differing(recorded, known):
        missing.append(
            f"{run_dir.validation} is not known to belong to this search, so it is not shown. "
            "`mergemix validate mix.yaml` writes it anew, from the scores that still count."
        )
        return None
    return dict(record)


def _diagnosis(
    run_dir: RunDir,
    config: Config,
    digests: Mapping[str, str],
    result: Mapping[str, Any] | None,
    missing: list[str],
) -> Mapping[str, Any] | None:
    record = read_json(run_dir.diagnosis)
    if record is None:
        return None
    known = of_checkpoints(digests)
    with contextlib.suppress(MergeMixError):  # where datasets are not here, the experts alone tell
        known |= diagnosed_settings(config)
    if _differing(record["digests"], known):
        missing.append(
            "The diagnosis is of other experts, data or settings: `mergemix diagnose mix.yaml` "
            "anew."
        )
        return None
    if result is not None and record.get("learned") == result["mixture"]:
        return dict(record)
    if result is not None:
        missing.append(
            "The diagnosis was made before this mixture was learned, so it does not say how the "
            "learned one does: `mergemix diagnose mix.yaml` again, which measures nothing anew."
        )
    return _without_learned(record)


def _without_learned(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a diagnosis that says nothing of a learned mixture."""
    curvature = {
        name: {**loss, "gap": loss["gap"] and {**loss["gap"], "learned": None}}
        for name, loss in record["curvature"].items()
    }
    applied_norm = {**record["applied_norm"], "learned": None}
    return {**record, "learned": None, "applied_norm": applied_norm, "curvature": curvature}


def blend_line(run: Run) -> str:
    """Return the line that hands the learned mixture to Megatron; empty where none is written.

    Raises:
        SearchError: the blend files are damaged.
    """
    folder = run.run_dir.blend
    try:
        written = yaml.safe_load((folder / "blend.yaml").read_text(encoding="utf-8"))
        line = (folder / "data_path.txt").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SearchError(
            f"cannot read the blend in {folder}: {error}. `mergemix blend mix.yaml` writes it anew."
        ) from error
    is_of_result = run.result and written["provenance"].get("digests") == run.result["digests"]
    return line if is_of_result else ""


def _evaluations(run_dir: RunDir, digests: Mapping[str, str]) -> list[Model]:
    """Return the experts as ``mergemix evaluate`` scored them, on the items of the search."""
    experts = {
        text: name.partition(".")[2] for name, text in digests.items() if name.startswith("expert.")
    }
    found = {}
    for path in sorted(run_dir.evaluate.glob("*.json")):
        record = read_json(path)
        expert = experts.get(record["digests"].get("checkpoint", ""))
        if expert is not None and scored_on(record["digests"]) == scored_on(digests):
            found[expert] = Model(f"expert {expert}", scores_of(record["scores"]), {})
    return [found[name] for name in experts.values() if name in found]


def _tokens(config: Config, missing: list[str]) -> Mapping[str, int] | None:
    try:
        return train_tokens(config)
    except MergeMixError as error:
        missing.append(f"Tokens and epochs of the domains are not known: {error}")
        return None
