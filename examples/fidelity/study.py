"""The fidelity study: really train many mixtures, and see how the merges had ranked them.

    python examples/fidelity/study.py [--seeds 1 2 3] [--parts headline shares ...] [--at-once 2]
        [--out runs/fidelity] [--page docs/fidelity.md] [--quick]

Every seed has a base of its own and 24 reference models, really trained from it on mixtures that
fill the inside of the simplex. A variant is a way to make experts; for each variant the merges that
stand for the 24 mixtures are scored on the same held-out text. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from findings import write_tables
from leavings import chosen_mixture, mixtures, scores, write_mixtures
from page import write_page
from regmix import regmix_mixture
from steps import REPOSITORY, Folder, Interrupted, Step, do_all
from variants import BASE_TOKENS, DEFAULT, LR, PAPER, TOKENS, Variant, budget, by_budget, by_share
from words import (
    as_shares,
    as_weights,
    base_checkpoint,
    expert_checkpoint,
    expert_checkpoints,
    from_base,
    last_save,
    reference_checkpoint,
    score,
    words_of,
)

from megatron_mergemix.simplex import Bounds, to_mixture
from megatron_mergemix.space_filling import filling_mixtures

HERE = Path(__file__).parent

PARTS = {
    "headline": "rank fidelity of the defaults and of the paper's setting, beside its ceiling",
    "faces": "references that leave domains out, or nearly",
    "averaging": "means of the last third's saves against last saves",
    "shares": "general_share, with and without affine merges",
    "budget": "learning rate and tokens of the experts",
    "trials": "number of trials and surrogates",
    "operators": "ties and dare in place of the weighted sum",
    "transfer": "references of a model five times as large",
    "learned": "the learned mixture against others, each really trained on four orders of data",
    "seven": "seven domains; a hierarchy against a flat search",
}
ONE_SEED = ("faces", "transfer", "seven")
"""Parts with references of their own, which are made for the first seed alone."""

FILLING = 22
"""References beside uniform and proportional."""
LEAST_SHARE = 0.2
"""Of the uniform share, in the references that fill the inside of the simplex. Chosen after one
seed over the whole simplex had ranked at 0.64 to 0.74; the part ``faces`` keeps that in view."""
OPERATORS = ("ties", "dare")
DOMAINS = {
    4: ("code", "prose", "science", "math"),
    7: ("code", "headers", "prose", "readmes", "science", "math", "tables"),
}

ORDERS = (1000, 4000, 5000)
"""Added to the seed of the order of the data, to train again what was chosen."""

REGMIX_RUNS = 16
"""Runs of RegMix: each a quarter of an expert's tokens, so together as many as four experts'."""


@dataclass(frozen=True)
class Study:
    """Where the study works, and how much of it is done.

    Attributes:
        out: folder of everything.
        quick: a few steps of training each, to try the machinery; no finding comes of it.
    """

    out: Path
    quick: bool = False

    def config(self, domains: int) -> Path:
        """Return the experiment on four or seven domains."""
        return HERE / ("mix.yaml" if domains == 4 else "mix7.yaml")

    def folder(self, seed: int, name: str, domains: int = 4) -> Path:
        """Return the folder of a step."""
        return self.out / f"domains-{domains}" / f"seed-{seed}" / name

    def size(self) -> list[str]:
        """Return the settings of the base, and those that make a quick study quick."""
        if self.quick:
            return ["base.train.tokens=100e3", "search.trials=14"]
        return [f"base.train.tokens={BASE_TOKENS:g}", f"base.train.lr={LR:g}"]

    def references(
        self, domains: int, filling: int = FILLING, seed: int = 0, least: float = LEAST_SHARE
    ) -> str:
        """Return the setting of the reference mixtures: two with names, others that fill space.

        Args:
            domains: 4 or 7.
            filling: how many fill space.
            seed: of these.
            least: their least share of every domain, as a part of the uniform one.
        """
        names = DOMAINS[domains]
        num = min(filling, 6) if self.quick else filling
        region = Bounds(np.full(domains, least / domains), np.ones(domains))
        found: dict[str, Any] = {"uniform": "uniform", "proportional": "proportional"}
        for number, point in enumerate(filling_mixtures(region, num, seed), 1):
            found[f"filling-{number:02d}"] = to_mixture(point, names)
        return f"references={json.dumps(found)}"

    def tokens(self, tokens: float) -> float:
        """Return the tokens of a training run."""
        return tokens / 20 if self.quick else tokens


def main() -> None:
    """Do what is left of the study, then write tables, plots and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--at-once", type=int, default=2, help="runs at the same time, one core each"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--page", type=Path, help="default: docs/fidelity.md; quick: in the folder")
    parser.add_argument("--quick", action="store_true", help="a minute of training, no findings")
    args = parser.parse_args()
    study = Study((REPOSITORY / args.out).resolve(), args.quick)
    steps = list(steps_of(study, args.seeds, args.parts))
    try:
        do_all(steps, args.at_once)
    except Interrupted as error:
        raise SystemExit(f"error: {error}\nStart it again to go on.") from None
    # What was not trained long enough to find anything must not pass for findings.
    usual = study.out / "fidelity.md" if args.quick else Path("docs/fidelity.md")
    page = REPOSITORY / (args.page or usual)
    write_page(write_tables(study.out, args.seeds), page)
    print(f"written: {page}")


def steps_of(study: Study, seeds: Sequence[int], parts: Sequence[str]) -> Iterator[Step]:
    """Yield the steps of the chosen parts, each once, in an order that can be worked through."""
    seen: set[Path] = set()
    for part in (part for part in PARTS if part in parts):
        for seed in seeds[:1] if part in ONE_SEED else seeds:
            for step in _steps_of_part(study, seed, part):
                if step.folder not in seen:
                    seen.add(step.folder)
                    yield step


def _steps_of_part(study: Study, seed: int, part: str) -> Iterator[Step]:
    yield _references(study, seed, "references")
    if part == "headline":
        yield _references(study, seed, "references-again", order=1000)
        yield from (_variant(study, seed, variant) for variant in (DEFAULT, PAPER))
    elif part == "faces":
        yield from (_variant(study, seed, variant) for variant in (DEFAULT, PAPER))
        yield _references(study, seed, "references-faces", least=0.0)
        yield _on_faces(study, seed)
    elif part == "averaging":
        yield _references(study, seed, "references-again", order=1000)
        yield _variant(study, seed, DEFAULT)
        yield _last_saves(study, seed)
    elif part == "shares":
        yield from (_variant(study, seed, variant) for variant in by_share())
    elif part == "budget":
        yield from (_variant(study, seed, variant) for variant in by_budget())
    elif part == "trials":
        yield _variant(study, seed, DEFAULT)
        yield _more_trials(study, seed)
    elif part == "operators":
        yield _variant(study, seed, PAPER)
        yield _operators(study, seed)
    elif part == "transfer":
        yield _variant(study, seed, DEFAULT)
        yield _references(study, seed, "references-large", more=LARGE)
        yield _learned(study, seed, "learned-large", ["default"], "references-large", LARGE)
    elif part == "learned":
        yield from (_variant(study, seed, variant) for variant in (DEFAULT, PAPER))
        yield _regmix(study, seed)
        yield _learned(study, seed, "learned", ["default", "share-0", "regmix"], "references")
        yield _in_other_orders(study, seed)
    elif part == "seven":
        yield _references(study, seed, "references", domains=7)
        yield _variant(study, seed, DEFAULT, domains=7)
        yield _hierarchy(study, seed)
        taken = ["default", "top-down"]
        yield _learned(study, seed, "learned", taken, "references", domains=7)


LARGE = ("model.num_layers=4", "model.hidden_size=128")
"""A model of 0.83 million parameters, 4.8 times the other one."""


# ---- what a step does ----


def _references(
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
    settings = [
        *study.size(),
        study.references(domains, least=least),
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

    return Step(folder, work, () if has_base else (first,), json.dumps(settings))


def _variant(study: Study, seed: int, variant: Variant, domains: int = 4) -> Step:
    """Return the step that makes experts, searches, and scores the merges of the references."""
    first = study.folder(seed, "references", domains)
    settings = [*_expert_settings(study, seed, variant), *from_base(first)]

    def work(at: Folder) -> None:
        words = words_of(study.config(domains), at.path, settings)
        at.mergemix("train", *words, "experts")
        if variant in (DEFAULT, PAPER):  # whose mixtures are trained
            at.mergemix("search", *words)
        wanted = mixtures(first)
        score(at, words, "--mixture", [as_shares(mixture) for mixture in wanted.values()])
        if variant in by_share():  # as merge weights, as if experts had seen one domain each
            plain = [as_weights(mixture) for mixture in wanted.values()]
            score(at, words, "--alpha", plain, "scores-plain.json")

    return Step(study.folder(seed, variant.name, domains), work, (first,), json.dumps(settings))


def _more_trials(study: Study, seed: int) -> Step:
    """Return the step that searches with more trials, whose first ones stand for fewer."""
    first, experts = study.folder(seed, "references"), study.folder(seed, "default")
    settings = [
        *_expert_settings(study, seed, DEFAULT),
        *from_base(first),
        f"experts.checkpoints={{{expert_checkpoints(experts, DOMAINS[4])}}}",
        f"search.trials={20 if study.quick else 112}",
    ]

    def work(at: Folder) -> None:
        at.mergemix("search", *words_of(study.config(4), at.path, settings))

    return Step(study.folder(seed, "more-trials"), work, (first, experts), json.dumps(settings))


def _on_faces(study: Study, seed: int) -> Step:
    """Return the step that scores the merges of mixtures that nearly leave domains out."""
    first, faces = study.folder(seed, "references"), study.folder(seed, "references-faces")
    variants = (DEFAULT, PAPER)
    folders = [study.folder(seed, variant.name) for variant in variants]
    settings = [
        [
            *_expert_settings(study, seed, variant),
            *from_base(first),
            f"experts.checkpoints={{{expert_checkpoints(experts, DOMAINS[4])}}}",
        ]
        for variant, experts in zip(variants, folders, strict=True)
    ]

    def work(at: Folder) -> None:
        asked = [as_shares(mixture) for mixture in mixtures(faces).values()]
        for variant, own in zip(variants, settings, strict=True):
            words = words_of(study.config(4), at.path, own)
            score(at, words, "--mixture", asked, f"{variant.name}.json")

    return Step(study.folder(seed, "faces"), work, (first, faces, *folders), json.dumps(settings))


def _last_saves(study: Study, seed: int) -> Step:
    """Return the step that scores the last saves of what other parts know as means of saves."""
    names = ("references", "references-again", DEFAULT.name)
    first, again, experts = (study.folder(seed, name) for name in names)
    last = [f"{name}: {last_save(experts / 'run' / 'experts' / name)}" for name in DOMAINS[4]]
    settings = [
        *_expert_settings(study, seed, DEFAULT),
        study.references(4),
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
    return Step(folder, work, (first, again, experts), json.dumps(settings))


def _operators(study: Study, seed: int) -> Step:
    """Return the step that merges pure experts by other methods, checkpoint by checkpoint."""
    first, experts = study.folder(seed, "references"), study.folder(seed, PAPER.name)
    settings = [*_expert_settings(study, seed, PAPER), *from_base(first)]

    def work(at: Folder) -> None:
        words = words_of(study.config(4), at.path, settings)
        for method in OPERATORS:
            merged = []
            for name, mixture in mixtures(first).items():
                merged.append(at.path / "merged" / method / name)
                alpha = [
                    f"{expert_checkpoint(experts, domain)}={share!r}"
                    for domain, share in mixture.items()
                    if share > 0
                ]
                flags = [word for text in alpha for word in ("--expert", text)]
                base = str(base_checkpoint(first))
                output = ["--output", str(merged[-1]), "--overwrite"]
                at.mergemix("merge", "--base", base, *flags, "--method", method, *output)
            score(at, words, "--checkpoint", [str(path) for path in merged], f"{method}.json")
        shutil.rmtree(at.path / "merged")

    about = json.dumps([*settings, *OPERATORS])
    return Step(study.folder(seed, "operators"), work, (first, experts), about)


def _regmix(study: Study, seed: int) -> Step:
    """Return the step that spends the experts' tokens as RegMix would, on short runs."""
    first = study.folder(seed, "references")
    settings = [
        study.references(4, REGMIX_RUNS - 2, seed=1, least=0.0),
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
        chosen = regmix_mixture(mixtures(at.path), scores(at.path), seed)
        (at.path / "mixture.json").write_text(json.dumps(chosen))

    return Step(study.folder(seed, "regmix"), work, (first,), json.dumps(settings))


def _hierarchy(study: Study, seed: int) -> Step:
    """Return the step that searches seven domains group by group."""
    first, experts = study.folder(seed, "references", 7), study.folder(seed, "default", 7)
    settings = [
        *_expert_settings(study, seed, DEFAULT),
        *from_base(first),
        f"experts.checkpoints={{{expert_checkpoints(experts, DOMAINS[7])}}}",
        "search.hierarchy=top_down",
    ]
    if not study.quick:  # of the shares of three groups and inside each: 40, as the flat search
        settings += ["search.trials=10", "search.group_trials=10"]

    def work(at: Folder) -> None:
        at.mergemix("search", *words_of(study.config(7), at.path, settings))

    folder = study.folder(seed, "top-down", 7)
    return Step(folder, work, (first, experts), json.dumps(settings))


def _learned(
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

    return Step(
        study.folder(seed, name, domains),
        work,
        (first, *sources),
        json.dumps([*settings, *chosen_by]),
    )


def _in_other_orders(study: Study, seed: int) -> Step:
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

    about = json.dumps([*settings, *ORDERS])
    return Step(study.folder(seed, "learned-again"), work, (first, chosen), about)


def _expert_settings(study: Study, seed: int, variant: Variant) -> list[str]:
    """Return the settings of a variant; its experts see the data in an order of their own."""
    asked = replace(variant, tokens=study.tokens(variant.tokens))
    return [*study.size(), *asked.settings(), f"experts.seed={seed + 2000}"]


if __name__ == "__main__":
    main()
