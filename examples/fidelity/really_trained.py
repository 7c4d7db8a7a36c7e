"""Steps that really train models on mixtures: references, what was chosen, RegMix's short runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from leavings import chosen_mixture, mixtures, scores, write_mixtures
from regmix import regmix_mixture
from steps import Folder, Step
from testbed import FILLING, FILLING_FEWER, LEAST_SHARE, Study
from variants import TOKENS, budget
from words import from_base, reference_checkpoint, score, words_of

ORDERS = (1000, 4000)
"""Added to the seed of the order of the data, to train again what was chosen."""

SHARED = ("references", "references-again")
"""Steps whose references every seed has."""

REGMIX_RUNS = 16
"""Runs of RegMix: each a quarter of an expert's tokens, so together as many as four experts'."""


def references(
    study: Study,
    seed: int,
    name: str,
    *,
    order: int = 0,
    least: float = LEAST_SHARE,
    more: Sequence[str] = (),
    domains: int = 4,
) -> Step:
    """Return the step that trains and scores the reference models.

    Args:
        study: where.
        seed: of the base, and of the order of the data.
        name: of the step.
        order: added to the seed of the order of the data.
        least: share of every domain, as a part of the uniform one.
        more: settings of another model, which has a base of its own.
        domains: 4 or 7.
    """
    folder = study.folder(seed, name, domains)
    first = study.folder(seed, "references", domains)
    has_base = name == first.name or bool(more)  # the others start from that of the first
    filling = FILLING if domains == 4 and name in SHARED else FILLING_FEWER
    settings = [
        *study.size(),
        study.references(
            domains, study.filling(filling), after=study.filled_before(seed), least=least
        ),
        f"base.train.seed={seed}",
        f"experts.seed={seed + order}",
        *budget(study.tokens(TOKENS)),
        *more,
    ]
    if not has_base:
        settings += from_base(first)

    def work(at: Folder) -> None:
        words = words_of(study.config(domains), at.path, settings)
        if has_base:  # long, and only its last save counts
            at.mergemix("train", *words, "--set", "training.save_interval=1000", "base")
        at.mergemix("train", *words, "references")
        write_mixtures(at.path, words)
        score(
            at, words, "--checkpoint", [reference_checkpoint(at.path, n) for n in mixtures(at.path)]
        )

    return Step(folder, work, () if has_base else (first,), study.about(domains, settings))


def learned(
    study: Study,
    seed: int,
    name: str,
    chosen_by: Sequence[str],
    references: str,
    more: Sequence[str] = (),
    domains: int = 4,
) -> Step:
    """Return the step that really trains what others have chosen.

    Args:
        study: where.
        seed: of the base and of the order of the data, as of the references.
        name: of the step.
        chosen_by: steps whose mixtures are trained.
        references: the step whose base they start from.
        more: settings of another model.
        domains: 4 or 7.
    """
    first = study.folder(seed, references, domains)
    sources = [study.folder(seed, source, domains) for source in chosen_by]
    settings = [
        f"experts.seed={seed}",
        *budget(study.tokens(TOKENS)),
        *from_base(first),
        *more,
    ]

    def work(at: Folder) -> None:
        trained = {source.name: chosen_mixture(source) for source in sources}
        words = words_of(
            study.config(domains), at.path, [*settings, f"references={json.dumps(trained)}"]
        )
        at.mergemix("train", *words, "references")
        write_mixtures(at.path, words)
        score(
            at, words, "--checkpoint", [reference_checkpoint(at.path, n) for n in mixtures(at.path)]
        )

    about = study.about(domains, [*settings, *chosen_by])
    return Step(study.folder(seed, name, domains), work, (first, *sources), about)


def in_other_orders(study: Study, seed: int) -> Step:
    """Return the step that trains what was chosen, and what needs no choice, a few times more."""
    first, chosen = study.folder(seed, "references"), study.folder(seed, "learned")
    settings = [*budget(study.tokens(TOKENS)), *from_base(first)]

    def work(at: Folder) -> None:
        trained = {**mixtures(chosen), "uniform": "uniform", "proportional": "proportional"}
        for order in ORDERS[:1] if study.quick else ORDERS:
            own = [f"experts.seed={seed + order}", f"references={json.dumps(trained)}"]
            folder = at.path / f"order-{order}"
            words = words_of(study.config(4), folder, [*settings, *own])
            at.mergemix("train", *words, "references")
            write_mixtures(folder, words)
            score(
                at,
                words,
                "--checkpoint",
                [reference_checkpoint(folder, name) for name in mixtures(folder)],
                f"{folder.name}/scores.json",
            )

    about = study.about(4, [*settings, *map(str, ORDERS)])
    return Step(study.folder(seed, "learned-again"), work, (first, chosen), about)


def regmix(study: Study, seed: int) -> Step:
    """Return the step that spends the experts' tokens as RegMix would, on short runs."""
    first = study.folder(seed, "references")
    settings = [
        study.references(4, REGMIX_RUNS - 2, candidates=1, least=0.0),
        f"experts.seed={seed + 3000}",
        *budget(study.tokens(TOKENS) * 4 / REGMIX_RUNS),
        *from_base(first),
    ]

    def work(at: Folder) -> None:
        words = words_of(study.config(4), at.path, settings)
        at.mergemix("train", *words, "references")
        write_mixtures(at.path, words)
        checkpoints = [reference_checkpoint(at.path, name) for name in mixtures(at.path)]
        score(at, words, "--checkpoint", checkpoints)
        _choose(at.path, at.path, "lightgbm", seed)

    return Step(study.folder(seed, "regmix"), work, (first,), study.about(4, settings))


def regmix_by_gp(study: Study, seed: int) -> Step:
    """Return the step that chooses from the same short runs by a Gaussian process.

    RegMix's trees are made for 512 runs; few runs tell a smoother surrogate more.
    """
    runs = study.folder(seed, "regmix")

    def work(at: Folder) -> None:
        _choose(runs, at.path, "gp", seed)

    return Step(study.folder(seed, "regmix-gp"), work, (runs,))


def _choose(runs: Path, into: Path, surrogate: str, seed: int) -> None:
    chosen = regmix_mixture(mixtures(runs), scores(runs), surrogate, seed)
    (into / "mixture.json").write_text(json.dumps(chosen))
