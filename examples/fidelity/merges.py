"""Steps that train experts, search with them, and score the merges that stand for references."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from leavings import mixtures, write_mixtures
from steps import Folder, Step
from testbed import DOMAINS, FILLING, Study
from variants import DEFAULT, PAPER, Variant, by_share, every_variant
from words import (
    as_shares,
    as_weights,
    base_checkpoint,
    expert_checkpoint,
    expert_checkpoints,
    from_base,
    last_save,
    score,
    words_of,
)

OPERATORS = ("ties", "dare")
"""Ways to merge, with their defaults: a density of 0.2 and of 0.5, a scale of 1."""

DIAGNOSED_WINDOWS = 16
"""Of every loss that is diagnosed."""


def experts(study: Study, seed: int, variant: Variant, domains: int = 4) -> Step:
    """Return the step that makes experts, searches, and scores the merges of the references."""
    first = study.folder(seed, "references", domains)
    settings = [*study.expert_settings(seed, variant), *from_base(first)]

    def work(at: Folder) -> None:
        words = words_of(study.config(domains), at.path, settings)
        at.mergemix("train", *words, "experts")
        if variant in (DEFAULT, PAPER):  # whose mixtures are trained
            at.mergemix("search", *words)
        wanted = mixtures(first)
        score(at, words, "--mixture", [as_shares(mixture) for mixture in wanted.values()])
        if variant in by_share() and variant.share:  # as if experts had seen one domain each
            plain = [as_weights(mixture) for mixture in wanted.values()]
            score(at, words, "--alpha", plain, "scores-plain.json")

    folder = study.folder(seed, variant.name, domains)
    return Step(folder, work, (first,), study.about(domains, settings))


def more_trials(study: Study, seed: int) -> Step:
    """Return the step that searches with more trials, whose first ones stand for fewer."""
    first, experts = study.folder(seed, "references"), study.folder(seed, "default")
    settings = [
        *study.expert_settings(seed, DEFAULT),
        *from_base(first),
        f"experts.checkpoints={{{expert_checkpoints(experts, DOMAINS[4])}}}",
        f"search.trials={20 if study.quick else 112}",
    ]

    def work(at: Folder) -> None:
        at.mergemix("search", *words_of(study.config(4), at.path, settings))

    folder = study.folder(seed, "more-trials")
    return Step(folder, work, (first, experts), study.about(4, settings))


def on_faces(study: Study, seed: int) -> Step:
    """Return the step that scores the merges of mixtures that nearly leave domains out."""
    first, faces = study.folder(seed, "references"), study.folder(seed, "references-faces")
    variants = (DEFAULT, PAPER)
    folders = [study.folder(seed, variant.name) for variant in variants]
    settings = {
        variant.name: [
            *study.expert_settings(seed, variant),
            *from_base(first),
            f"experts.checkpoints={{{expert_checkpoints(experts, DOMAINS[4])}}}",
        ]
        for variant, experts in zip(variants, folders, strict=True)
    }

    def work(at: Folder) -> None:
        asked = [as_shares(mixture) for mixture in mixtures(faces).values()]
        for name, own in settings.items():
            words = words_of(study.config(4), at.path, own)
            score(at, words, "--mixture", asked, f"{name}.json")

    about = study.about(4, _flat(settings))
    return Step(study.folder(seed, "faces"), work, (first, faces, *folders), about)


def last_saves(study: Study, seed: int) -> Step:
    """Return the step that scores the last saves of what other parts know as means of saves."""
    names = ("references", "references-again", DEFAULT.name)
    first, again, experts = (study.folder(seed, name) for name in names)
    last = [f"{name}: {last_save(experts / 'run' / 'experts' / name)}" for name in DOMAINS[4]]
    settings = [
        *study.expert_settings(seed, DEFAULT),
        study.references(4, study.filling(FILLING), after=study.filled_before(seed)),
        *from_base(first),
        f"experts.checkpoints={{{', '.join(last)}}}",
    ]

    def work(at: Folder) -> None:
        words = words_of(study.config(4), at.path, settings)
        write_mixtures(at.path, words)
        wanted = mixtures(first)
        for folder in (first, again):
            saves = [last_save(folder / "run" / "references" / name) for name in wanted]
            score(at, words, "--checkpoint", saves, f"{folder.name}.json")
        asked = [as_shares(mixture) for mixture in wanted.values()]
        score(at, words, "--mixture", asked, f"{experts.name}.json")

    folder = study.folder(seed, "last-saves")
    return Step(folder, work, (first, again, experts), study.about(4, settings))


def operators(study: Study, seed: int) -> Step:
    """Return the step that merges experts by other methods, checkpoint by checkpoint.

    Their weights are the shares of a mixture: weights that solve for it may be negative.
    """
    first = study.folder(seed, "references")
    experts = {variant: study.folder(seed, variant.name) for variant in (DEFAULT, PAPER)}
    settings = [*study.size(), *from_base(first)]

    def merge_words(
        method: str, made: Path, mixture: Mapping[str, float], output: Path
    ) -> list[str]:
        shares = ((expert_checkpoint(made, d), share) for d, share in mixture.items())
        flags = [
            word for path, share in shares if share for word in ("--expert", f"{path}={share!r}")
        ]
        return [
            *("--base", str(base_checkpoint(first)), *flags),
            *("--method", method, "--output", str(output), "--overwrite"),
        ]

    def work(at: Folder) -> None:
        words = words_of(study.config(4), at.path, settings)
        wanted = mixtures(first)
        for variant, made in experts.items():
            for method in OPERATORS:
                merged = at.path / "merged" / f"{variant.name}.{method}"
                at.merge_all(merge_words(method, made, m, merged / n) for n, m in wanted.items())
                outputs = [str(merged / name) for name in wanted]
                score(at, words, "--checkpoint", outputs, f"{merged.name}.json")
        shutil.rmtree(at.path / "merged")

    about = study.about(4, [*settings, *OPERATORS, *(variant.name for variant in experts)])
    return Step(study.folder(seed, "operators"), work, (first, *experts.values()), about)


def diagnoses(study: Study, seed: int) -> Step:
    """Return the step that measures how far experts went, and how the losses bend on the way."""
    first = study.folder(seed, "references")
    variants = every_variant()
    folders = [study.folder(seed, variant.name) for variant in variants]
    windows = [
        *(f"evaluate.capabilities.{d}.loss.sequences={DIAGNOSED_WINDOWS}" for d in DOMAINS[4]),
        f"evaluate.micro_batch_size={DIAGNOSED_WINDOWS}",
    ]
    settings = {
        variant.name: [
            *study.expert_settings(seed, variant),
            *from_base(first),
            f"experts.checkpoints={{{expert_checkpoints(experts, DOMAINS[4])}}}",
            *windows,
        ]
        for variant, experts in zip(variants, folders, strict=True)
    }

    def work(at: Folder) -> None:
        for name, own in settings.items():
            at.mergemix("diagnose", *words_of(study.config(4), at.path / name, own))

    folder = study.folder(seed, "diagnoses")
    return Step(folder, work, (first, *folders), study.about(4, _flat(settings)))


def hierarchy(study: Study, seed: int) -> Step:
    """Return the step that searches seven domains group by group."""
    first, experts = study.folder(seed, "references", 7), study.folder(seed, "default", 7)
    settings = [
        *study.expert_settings(seed, DEFAULT),
        *from_base(first),
        f"experts.checkpoints={{{expert_checkpoints(experts, DOMAINS[7])}}}",
        "search.hierarchy=top_down",
    ]
    if not study.quick:  # of the shares of three groups and inside each: 40, as the flat search
        settings += ["search.trials=10", "search.group_trials=10"]

    def work(at: Folder) -> None:
        at.mergemix("search", *words_of(study.config(7), at.path, settings))

    folder = study.folder(seed, "top-down", 7)
    return Step(folder, work, (first, experts), study.about(7, settings))


def _flat(settings: Mapping[str, Sequence[str]]) -> list[str]:
    """Return settings by name in one list."""
    return [f"{name}: {pair}" for name, own in settings.items() for pair in own]
