"""The fidelity study: really train many mixtures, and see how the merges had ranked them.

    python examples/fidelity/study.py [--seeds 1 2 3] [--parts headline shares ...] [--at-once 2]
        [--out runs/fidelity] [--page docs/fidelity.md] [--quick]

Every seed has a base of its own and 24 reference models, really trained from it on mixtures of its
own that fill the inside of the simplex. A variant is a way to make experts; for each variant the
merges that stand for the 24 mixtures are scored on the same held-out text. What is done is not done
again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from findings import write_tables
from merges import diagnoses, experts, hierarchy, last_saves, more_trials, on_faces, operators
from page import write_page
from really_trained import in_other_orders, learned, references, regmix, regmix_by_gp
from steps import REPOSITORY, Interrupted, Step, do_all
from testbed import LARGE, Study
from variants import DEFAULT, PAPER, by_budget, by_share, every_variant, pure_by_budget

PARTS = {
    "headline": "rank fidelity of the defaults and of the paper's setting, beside its ceiling",
    "faces": "references that leave domains out, or nearly",
    "transfer": "references of a model five times as large",
    "seven": "seven domains; a hierarchy against a flat search",
    "averaging": "means of the last third's saves against last saves",
    "shares": "general_share, with and without affine merges",
    "budget": "learning rate and tokens of the experts",
    "learned": "the learned mixture against others, each really trained on three orders of data",
    "trials": "number of trials and surrogates",
    "operators": "ties and dare in place of the weighted sum",
    "diagnoses": "what mergemix diagnose measures of the experts",
}
"""In the order in which they are done: long steps first, so that no core is idle at the end."""
ONE_SEED = ("faces", "seven")
"""Parts that are made for the first seed alone."""


def main() -> None:
    """Do what is left of the study, then write tables, plots and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--at-once", type=int, default=2, help="runs at the same time, one core each"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--page", type=Path, help="of the whole: docs/fidelity.md")
    parser.add_argument("--quick", action="store_true", help="a minute of training, no findings")
    args = parser.parse_args()
    if min(args.seeds) < 1:
        parser.error(f"--seeds {min(args.seeds)}: seeds count from 1")
    study = Study((REPOSITORY / args.out).resolve(), args.quick)
    steps = list(steps_of(study, args.seeds, args.parts))
    try:
        do_all(steps, args.at_once)
    except Interrupted as error:
        raise SystemExit(f"error: {error}\nStart it again to go on.") from None
    # What was not trained long enough, or is a part, must not pass for the findings.
    is_whole = not args.quick and set(args.parts) == set(PARTS)
    usual = Path("docs/fidelity.md") if is_whole else study.out / "fidelity.md"
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
    yield references(study, seed, "references")
    if part == "headline":
        yield references(study, seed, "references-again", order=1000)
        yield from (experts(study, seed, variant) for variant in (DEFAULT, PAPER))
    elif part == "faces":
        yield from (experts(study, seed, variant) for variant in (DEFAULT, PAPER))
        yield references(study, seed, "references-faces", least=0.0)
        yield on_faces(study, seed)
    elif part == "transfer":
        yield experts(study, seed, DEFAULT)
        yield references(study, seed, "references-large", more=LARGE)
        yield learned(study, seed, "learned-large", ["default"], "references-large", LARGE)
    elif part == "seven":
        yield references(study, seed, "references", domains=7)
        yield experts(study, seed, DEFAULT, domains=7)
        yield hierarchy(study, seed)
        taken = ["default", "top-down"]
        yield learned(study, seed, "learned", taken, "references", domains=7)
    elif part == "averaging":
        yield references(study, seed, "references-again", order=1000)
        yield experts(study, seed, DEFAULT)
        yield last_saves(study, seed)
    elif part == "shares":
        yield from (experts(study, seed, variant) for variant in by_share())
    elif part == "budget":
        yield from (experts(study, seed, variant) for variant in [*by_budget(), *pure_by_budget()])
    elif part == "learned":
        yield from (experts(study, seed, variant) for variant in (DEFAULT, PAPER))
        yield regmix(study, seed)
        yield regmix_by_gp(study, seed)
        chosen_by = ["default", "share-0", "regmix", "regmix-gp"]
        yield learned(study, seed, "learned", chosen_by, "references")
        yield in_other_orders(study, seed)
    elif part == "trials":
        yield experts(study, seed, DEFAULT)
        yield more_trials(study, seed)
    elif part == "operators":
        yield from (experts(study, seed, variant) for variant in (DEFAULT, PAPER))
        yield operators(study, seed)
    elif part == "diagnoses":
        yield from (experts(study, seed, variant) for variant in every_variant())
        yield diagnoses(study, seed)


if __name__ == "__main__":
    main()
