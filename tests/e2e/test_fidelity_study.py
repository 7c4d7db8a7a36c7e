"""The fidelity study's machinery: what is done is kept, and every number comes from the runs."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

STUDY = Path(__file__).parents[2] / "examples" / "fidelity"
DOMAINS = ("code", "prose", "science", "math")
NUM = 12


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    names = (
        *("steps", "leavings", "findings", "variants", "plots", "page", "regmix", "words"),
        *("testbed", "page_tables", "page_chosen", "merges", "really_trained", "study"),
    )
    monkeypatch.syspath_prepend(str(STUDY))
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


# ---- steps ----


def test_steps_are_done_in_the_order_of_their_needs_and_only_once(modules, tmp_path):
    steps, done = modules["steps"], []

    def step(name, *needs):
        return steps.Step(tmp_path / name, lambda at: done.append(at.path.name), needs, ("as now",))

    plan = [step("c", tmp_path / "b"), step("b", tmp_path / "a"), step("a")]
    steps.do_all(plan, 2)
    assert done == ["a", "b", "c"]
    steps.do_all([*plan, step("d", tmp_path / "c")], 2)
    assert done == ["a", "b", "c", "d"]


def test_a_failed_step_ends_the_study_and_is_done_again_without_the_others(modules, tmp_path):
    steps, done = modules["steps"], []

    def fails(at):
        done.append("tried")
        raise RuntimeError("no room")

    first = steps.Step(tmp_path / "first", lambda at: done.append("first"))
    bad = steps.Step(tmp_path / "bad", fails, (first.folder,))
    with pytest.raises(steps.Interrupted, match="bad: no room"):
        steps.do_all([first, bad], 1)
    good = steps.Step(tmp_path / "bad", lambda at: done.append("mended"), (first.folder,))
    steps.do_all([first, good], 1)
    assert done == ["first", "tried", "mended"]


def test_a_step_that_was_done_for_something_else_is_refused(modules, tmp_path):
    steps = modules["steps"]

    def plan(of_first, of_second):
        first = steps.Step(tmp_path / "a", lambda at: None, (), ("4 domains", of_first))
        return [first, steps.Step(tmp_path / "b", lambda at: None, (first.folder,), (of_second,))]

    steps.do_all(plan("lr 1", "merges"), 2)
    steps.do_all(plan("lr 1", "merges"), 2)
    with pytest.raises(
        steps.Interrupted, match=r"was done for \['lr 1'\], now .* \['lr 2'\]\. Use"
    ):
        steps.do_all(plan("lr 2", "merges"), 2)
    (tmp_path / "a" / "done.json").unlink()  # as that message says
    with pytest.raises(
        steps.Interrupted, match="b was done with steps before it that have changed"
    ):
        steps.do_all(plan("lr 2", "merges"), 2)


def test_a_command_that_fails_is_quoted_with_its_last_lines(modules, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)log.txt ends with:.*no/such.yaml"):
        modules["steps"].Folder(tmp_path / "a").mergemix("plan", "/no/such.yaml")


def test_every_step_has_what_it_needs_before_it_in_whatever_parts_are_asked_for(modules, tmp_path):
    study, testbed = modules["study"], modules["testbed"].Study(tmp_path)
    for part in study.PARTS:
        steps = list(study.steps_of(testbed, [1, 2, 3], [part]))
        assert len({step.folder for step in steps}) == len(steps)
        for place, step in enumerate(steps):
            assert set(step.needs) <= {before.folder for before in steps[:place]}
        seeds = {folder.name for step in steps for folder in step.folder.parents}
        alone = part in study.ONE_SEED
        assert ("seed-1" in seeds, "seed-3" in seeds) == (True, not alone)


# ---- findings ----


def width(low_and_high: tuple[float, float]) -> float:
    low, high = low_and_high
    return high - low


def test_seeds_narrow_an_interval_only_as_far_as_their_mixtures_are_their_own(modules):
    rng = np.random.default_rng(0)
    interval, spearman = modules["findings"].interval, modules["page"].spearman
    real = rng.normal(size=(4, 24))
    mine = real + 0.5 * rng.normal(size=real.shape)
    pairs = list(zip(mine, real, strict=True))
    alone = np.mean([width(interval([pair], spearman)) for pair in pairs])
    assert width(interval(pairs, spearman)) == pytest.approx(alone / 2, rel=0.25)
    # Only mixtures with names, which all seeds share: their number adds nothing.
    named = [(np.array([0.0, 1.0]), np.array([0.0, 1.0]) * sign) for sign in (1, 1, -1)]

    def differs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return (first * second).sum(axis=1)

    shared = interval([(*pair,) for pair in named[:1]], differs)
    assert interval(named[:2], differs) == shared


def test_every_seed_has_reference_mixtures_of_its_own_beside_the_two_with_names(modules, tmp_path):
    study = modules["testbed"].Study(tmp_path)
    found = []
    for seed in (1, 2, 3):
        setting = study.references(4, 22, after=study.filled_before(seed))
        wanted = json.loads(setting.removeprefix("references="))
        assert [wanted.pop(name) for name in ("uniform", "proportional")] == [
            "uniform",
            "proportional",
        ]
        found += [list(mixture.values()) for mixture in wanted.values()]
    points = np.array(found)
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2) + 9 * np.eye(len(points))
    assert len(points) == 66
    assert gaps.min() > 0.1
    assert points.min() >= 0.05 - 1e-9


def write_step(folder: Path, bpb: np.ndarray, names: list[str], file: str = "scores.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def score(value: float) -> dict[str, object]:
        return {"bpb": {"value": value, "items": [value + 0.1, value - 0.2, value, value + 0.1]}}

    rows = [
        {"scores": {d: score(float(v)) for d, v in zip(DOMAINS, row, strict=True)}} for row in bpb
    ]
    (folder / file).write_text(json.dumps(rows))
    shares = np.random.default_rng(0).dirichlet(np.ones(len(DOMAINS)), size=len(names))
    found = {n: dict(zip(DOMAINS, row, strict=True)) for n, row in zip(names, shares, strict=True)}
    (folder / "mixtures.json").write_text(json.dumps(found))
    (folder / "done.json").write_text(
        json.dumps({"about": [], "digest": "", "seconds": 450, "ended": 900})
    )


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Return a study of two seeds in which merges of ``share-0`` rank backwards."""
    names = ["uniform", "proportional", *(f"filling-{i:02d}" for i in range(NUM - 2))]
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        truth = 2 + rng.random((NUM, len(DOMAINS)))
        folder = tmp_path / "out" / "domains-4" / f"seed-{seed}"
        write_step(folder / "references", truth, names)
        write_step(folder / "references-again", truth + 1e-6, names)
        write_step(folder / "default", truth + 0.5, names)
        write_step(folder / "share-0", 5 - truth, names)
        write_step(folder / "learned", truth[:2] - 2, ["default", "regmix"])
    return tmp_path / "out"


def test_tables_hold_what_the_scores_say(modules, finished):
    tables = modules["findings"].write_tables(finished, [1, 2])
    same = [row for row in tables["agreement"] if row["references"] == "same"]
    found = {(r["seed"], r["variant"]): r for r in same}
    for seed in (1, 2):
        assert found[seed, "default"]["spearman"] == pytest.approx(1.0)
        assert found[seed, "default"]["absolute error"] == pytest.approx(0.5)
        assert found[seed, "default"]["centred error"] == pytest.approx(0.0)
        assert found[seed, "default"]["regret top 1"] == 0.0
        assert found[seed, "share-0"]["spearman"] == pytest.approx(-1.0)
        assert found[seed, "share-0"]["regret top 1"] > 0
        assert found[seed, "trained again"]["spearman math"] == pytest.approx(1.0)
    with (finished / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 * NUM
    first = rows[0]
    shares = [float(first[f"trained {domain}"]) for domain in DOMAINS]
    assert float(first["trained"]) == pytest.approx(np.mean(shares))


def test_last_saves_are_compared_with_last_saves(modules, finished):
    names = ["uniform", "proportional", *(f"filling-{i:02d}" for i in range(NUM - 2))]
    noisy = 2 + np.random.default_rng(5).random((NUM, len(DOMAINS)))
    folder = finished / "domains-4" / "seed-1" / "last-saves"
    write_step(folder, noisy, names, "references.json")
    write_step(folder, 5 - noisy, names, "references-again.json")
    write_step(folder, noisy + 0.1, names, "default.json")
    tables = modules["findings"].write_tables(finished, [1, 2])
    of_seed = [row for row in tables["agreement"] if row["seed"] == 1]
    ranked = {(row["variant"], row["references"]): row["spearman"] for row in of_seed}
    assert ranked["trained again, last saves", "last saves"] == pytest.approx(-1.0)
    assert ranked["default, last saves", "last saves"] == pytest.approx(1.0)
    assert ranked["default", "same"] == pytest.approx(1.0)
    crossed = ranked["default", "last saves"]
    assert crossed == ranked["default, last saves", "same"]
    truth = modules["leavings"].scores(folder.parent / "references").mean(axis=1)
    assert crossed == pytest.approx(float(modules["page"].spearman(truth, noisy.mean(axis=1))))
    page = finished / "fidelity.md"
    modules["page"].write_page(tables, page)
    text = page.read_text()
    assert "| averaged experts, averaged references (the defaults) | **1.00** | 1.00 1.00" in text
    assert f"| averaged experts, last saves of references | **{crossed:.2f}** |" in text
    assert "| references trained again, last saves of both | **-1.00** | -1.00 |" in text


def test_merges_are_held_against_the_mean_of_two_trainings_and_against_other_text(
    modules, finished
):
    folder = finished / "domains-4" / "seed-1"
    names = list(json.loads((folder / "references" / "mixtures.json").read_text()))
    first = modules["leavings"].scores(folder / "references")
    again = 2 + np.random.default_rng(7).random((NUM, len(DOMAINS)))
    write_step(folder / "references-again", again, names)
    rows = json.loads((folder / "default" / "scores.json").read_text())
    for rank, row in enumerate(rows):  # only the windows of the second half of the text differ
        for metrics in row["scores"].values():
            metrics["bpb"]["items"][1::2] = [rank, rank]
    (folder / "default" / "scores.json").write_text(json.dumps(rows))
    tables = modules["findings"].write_tables(finished, [1])
    ranked = {(row["variant"], row["references"]): row["spearman"] for row in tables["agreement"]}
    spearman = modules["page"].spearman
    both = (first + again).mean(axis=1)
    assert ranked["default", "mean of two trainings"] == pytest.approx(
        float(spearman(first.mean(axis=1), both))
    )
    assert ranked["default", "other windows"] == pytest.approx(1.0)
    assert ranked["trained again", "other windows"] == pytest.approx(
        float(spearman(first.mean(axis=1), again.mean(axis=1)))
    )


def test_what_merges_promise_of_mixtures_without_a_domain_is_told_apart(modules, finished):
    folder = finished / "domains-4" / "seed-1"
    shares = [[0.25] * 4, [0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.25, 0.25], [0.01, 0.33, 0.33, 0.33]]
    names = [f"filling-{i:02d}" for i in range(len(shares))]
    trained = 2 + np.random.default_rng(3).random((4, len(DOMAINS)))
    write_step(folder / "references-faces", trained, names)
    found = {n: dict(zip(DOMAINS, row, strict=True)) for n, row in zip(names, shares, strict=True)}
    (folder / "references-faces" / "mixtures.json").write_text(json.dumps(found))
    promised = trained - np.array([0.02, 0.04, 0.2, 0.1])[:, None]
    write_step(folder / "faces", promised, names, "default.json")
    page = finished / "fidelity.md"
    modules["page"].write_page(modules["findings"].write_tables(finished, [1, 2]), page)
    assert "-0.150 bits per byte against trained models, and -0.030 where" in page.read_text()


def test_a_mixture_that_was_trained_again_counts_as_the_mean_of_its_runs(modules, finished):
    names = ["default", "regmix", "uniform"]
    folder = finished / "domains-4" / "seed-1"
    first = [row.mean() for row in modules["leavings"].scores(folder / "learned")]
    for order, added in ((1000, 0.3), (4000, 0.6)):
        bpb = np.tile([[first[0] + added], [first[1]], [2.0]], (1, len(DOMAINS)))
        write_step(folder / "learned-again" / f"order-{order}", bpb, names)
    write_step(folder / "learned-again", bpb, names)
    tables = modules["findings"].write_tables(finished, [1, 2])
    page = finished / "fidelity.md"
    modules["page"].write_page(tables, page)
    lines = {line.split(" | ")[0]: line for line in page.read_text().splitlines()}
    learned = lines["| learned by MergeMix, defaults"].split(" | ")
    assert learned[2] == f"{first[0] + 0.3:.4f}"
    assert learned[4] == "3"
    assert lines["| best of the references"].split(" | ")[4] == "1"
    # Of seed 1, three runs, and seed 2, one: the mean of each seed counts once.
    other = modules["leavings"].scores(finished / "domains-4" / "seed-2" / "learned").mean(axis=1)
    start = first[1] - first[0]
    gaps = [start - 0.3, other[1] - other[0]]
    behind = lines["| RegMix on short runs of as many tokens"].split(" | ")[5]
    error = np.std(gaps, ddof=1) / np.sqrt(2)
    ahead = sum(gap > 0 for gap in (start, start - 0.3, start - 0.6, gaps[1]))
    assert behind == f"{np.mean(gaps):+.4f} +- {error:.4f}, in {ahead} of 4 |"


def test_a_lead_is_no_surer_than_its_runs_where_seeds_come_out_close_by_chance(modules):
    gaps = {(1, "a"): 0.5, (1, "b"): -0.3, (2, "a"): -0.3, (2, "b"): 0.5}
    rows = [
        {"mixture": name, "seed": seed, "order": order, "trained": 2 + gap * (name == "regmix")}
        for (seed, order), gap in gaps.items()
        for name in ("default", "regmix")
    ]
    within = np.sqrt(4 * 0.4**2 / 2 / 4)
    assert modules["page_chosen"].behind(rows, "regmix") == f"+0.1000 +- {within:.4f}, in 2 of 4"


def test_what_was_diagnosed_is_shown_beside_how_well_it_ranked(modules, finished):
    variants = modules["variants"].every_variant()
    rng = np.random.default_rng(0)
    for seed in (1, 2):
        folder = finished / "domains-4" / f"seed-{seed}"
        names = json.loads((folder / "references" / "mixtures.json").read_text())
        (folder / "diagnoses").mkdir()
        (folder / "diagnoses" / "done.json").write_text(json.dumps({"seconds": 9}))
        for number, variant in enumerate(variants):
            if variant.name not in ("default", "share-0"):
                write_step(folder / variant.name, 2 + rng.random((NUM, len(DOMAINS))), list(names))
            loss = {"gap": {"spread_ratio": 0.2}, "expansion_error": 0.5}
            worse = {"gap": {"spread_ratio": 0.1 * seed}, "expansion_error": 0.7}
            found = {
                "delta": [0.01, 0.02 + number / 100],
                "curvature": {"code": loss, "math": worse},
            }
            path = folder / "diagnoses" / variant.name / "run" / "diagnose"
            path.mkdir(parents=True)
            (path / "result.json").write_text(json.dumps(found))
    tables = modules["findings"].write_tables(finished, [1, 2])
    assert len(tables["diagnoses"]) == 2 * len(variants)
    page = finished / "fidelity.md"
    modules["page"].write_page(tables, page)
    text = page.read_text()
    (default,) = [
        line for line in text.splitlines() if "| share 0.25, learning rate 0.001, 0.4" in line
    ]
    assert "| **1.00** | 2.0% to 2.0% | 20.0% to 20.0% | 70.0% to 70.0% |" in default
    (pure,) = [line for line in text.splitlines() if "| share 0, learning rate 0.001, 0.4" in line]
    assert "| **-1.00** | 3.0% to 3.0% |" in pure
    with (finished / "fidelity" / "diagnoses.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * len(variants)


def test_learning_rates_and_tokens_are_crossed(modules, finished):
    variants = modules["variants"]
    found = {(v.lr, v.tokens): v.name for v in variants.by_budget()}
    for lr in variants.LEARNING_RATES:
        for factor in variants.TOKEN_FACTORS:
            assert (lr, factor * variants.TOKENS) in found
    assert found[variants.LR, variants.TOKENS] == "default"
    assert len({variant.name for variant in variants.every_variant()}) == len(
        variants.every_variant()
    )

    names = ["uniform", "proportional", *(f"filling-{i:02d}" for i in range(NUM - 2))]
    for seed in (1, 2):
        truth = modules["leavings"].scores(finished / "domains-4" / f"seed-{seed}" / "references")
        folder = finished / "domains-4" / f"seed-{seed}" / found[5e-4, 0.25 * variants.TOKENS]
        write_step(folder, 5 - truth, names)
    page = finished / "fidelity.md"
    modules["page"].write_page(modules["findings"].write_tables(finished, [1, 2]), page)
    lines = page.read_text().splitlines()
    head = lines.index("|  | 0.1 | 0.2 | 0.4 | 0.8 |")
    assert lines[head + 2 : head + 6] == [
        "| 0.00025 |  |  |  |  |",
        "| 0.0005 | -1.00 |  |  |  |",
        "| 0.001 |  |  | 1.00 |  |",
        "| 0.002 |  |  |  |  |",
    ]


def test_a_seed_that_was_not_asked_for_does_not_count(modules, finished):
    tables = modules["findings"].write_tables(finished, [2])
    assert {row["seed"] for row in tables["points"]} == {2}


def test_the_page_shows_the_tables_and_nothing_of_parts_that_were_not_run(
    modules, finished, tmp_path
):
    tables = modules["findings"].write_tables(finished, [1, 2])
    modules["page"].write_page(tables, tmp_path / "fidelity.md")
    page = (tmp_path / "fidelity.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| the defaults"))
    assert "**1.00** | 1.00 1.00 | 1.00 to 1.00" in line
    backwards = next(line for line in page.splitlines() if line.startswith("| as in the paper"))
    assert "**-1.00**" in backwards
    learned = next(line for line in page.splitlines() if "learned by MergeMix, defaults" in line)
    rows = {row["seed"]: row["trained"] for row in tables["learned"] if row["mixture"] == "default"}
    assert all(f"{value:.4f}" in learned for value in rows.values())
    assert "10 steps took 1.2 hours together, one core each." in page
    assert "Learning rate" not in page
    assert "Seven domains" not in page
    assert "![" in page
    assert (tmp_path / "fidelity" / "scatter.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("surrogate", ["lightgbm", "gp"])
def test_regmix_goes_where_short_runs_were_good(modules, surrogate):
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.ones(len(DOMAINS)), size=40)
    trained = {str(i): dict(zip(DOMAINS, row, strict=True)) for i, row in enumerate(shares)}
    bpb = np.tile(1 + 2 * (1 - shares[:, :1]), (1, len(DOMAINS)))  # all of it code is best
    chosen = modules["regmix"].regmix_mixture(trained, bpb, surrogate, 0)
    assert sum(chosen.values()) == pytest.approx(1.0)
    assert max(chosen, key=lambda domain: chosen[domain]) == "code"


# ---- the whole, in small ----


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_command_trains_scores_and_writes_a_page(tmp_path: Path) -> None:
    """On the corpora of this machine; where they are made lies in runs/, which git ignores."""
    parts = ("headline", "averaging", "learned")
    words = ["--quick", "--seeds", "1", "--parts", *parts, "--out", str(tmp_path / "study")]
    environment = os.environ | {"PYTHON": sys.executable, "MERGEMIX_DEVICE": "cpu"}
    command = [str(STUDY / "run.sh"), *words]
    for steps in ("0 of 9 steps", "9 of 9 steps"):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1500, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert steps in done.stdout
    page = (tmp_path / "study" / "fidelity.md").read_text()
    assert "## Headline" in page
    assert "## What is chosen, really trained: 4 domains" in page
    with (tmp_path / "study" / "learned.csv").open() as file:
        mixtures = {row["mixture"] for row in csv.DictReader(file)}
    assert {"default", "share-0", "regmix", "regmix-gp", "uniform", "proportional"} <= mixtures
