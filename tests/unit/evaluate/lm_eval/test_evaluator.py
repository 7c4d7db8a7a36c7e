"""Scores, objective, digest and division of documents, from recorded answers."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mergemix.config.evaluate import LmEvalTask
from megatron_mergemix.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from megatron_mergemix.errors import ConfigError, EvaluationError
from megatron_mergemix.evaluate.lm_eval.documents import held_out_share
from megatron_mergemix.evaluate.lm_eval.evaluator import LmEvalEvaluator
from megatron_mergemix.evaluate.lm_eval.metrics import score_of
from tests.support import lm_eval_tasks
from tests.support.replay import Replay

from .conftest import Make


class Candidate:
    """Answers that depend on a seed alone."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def continuation_log_probs(self, continuations: Any) -> Any:
        random = np.random.default_rng(self._seed)
        size = continuations.num_requests
        replay = Replay(-random.gamma(2.0, size=size), random.random(size) < 0.3)
        return replay.continuation_log_probs(continuations)

    def generate(self, prompts: Any, is_done: Any, **_: Any) -> list[list[int]]:
        random = np.random.default_rng(self._seed)
        words = ["cat", "The moon", "five", "x"]
        return [list(words[random.integers(4)].encode()) for _ in prompts]


NOBODY: Any = None
MEANS = ("own_choice", "own_letters")
EVERY = ("own_choice", "own_letters", "own_rolling", "own_last_word", "own_written")


def test_every_task_and_metric_is_scored_with_its_direction_and_unit(make: Make) -> None:
    scores = make(*EVERY).evaluate(Candidate())["own"]
    told = {name: (score.unit, score.higher_is_better) for name, score in scores.items()}
    right, size = ("accuracy", True), ("bits/byte", False)
    assert told == {
        "own_choice/acc": right,
        "own_choice/acc_norm": right,
        "own_choice/gold_bpb": size,
        "own_letters/acc": right,
        "own_letters/acc_norm": right,
        "own_letters/gold_bpb": size,
        "own_rolling/bits_per_byte": size,
        "own_rolling/word_perplexity": ("perplexity", False),
        "own_last_word/perplexity": ("perplexity", False),
        "own_last_word/acc": right,
        "own_last_word/gold_bpb": size,
        "own_written/exact_match,first": right,
        "own_written/exact_match,word": right,
        "own_written/gold_bpb": size,
    }
    assert all(score.num_samples == 12 for score in scores.values())


def test_items_are_the_documents_and_their_mean_is_the_value(make: Make) -> None:
    scores = make(*EVERY).evaluate(Candidate())["own"]
    without = {name for name, score in scores.items() if not score.items}
    assert without == {"own_rolling/word_perplexity", "own_last_word/perplexity"}
    for name, score in scores.items():
        assert score.stderr is not None
        assert score.stderr > 0 or score.value in (0.0, 1.0), name
        if score.items:
            assert np.mean(score.items) == pytest.approx(score.value, rel=1e-6)
            spread = np.std(score.items, ddof=1) / math.sqrt(12)
            assert score.stderr == pytest.approx(spread, rel=1e-5)


def test_gold_bpb_is_the_bits_of_the_right_answer_per_byte_of_its_text(
    make: Make, folder: Path
) -> None:
    documents = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for task, answer in {
        "own_choice": lambda each: each["choices"][each["gold"]],
        "own_letters": lambda each: "ABC"[each["gold"]],
        "own_last_word": lambda each: each["end"],
        "own_written": lambda each: each["choices"][each["gold"]],
    }.items():
        evaluator = make(task)
        asked = evaluator._search.asked
        values = np.arange(1.0, 1 + asked.continuations.num_requests)
        written = [[] for _ in asked.prompts]
        score = evaluator.evaluate(Replay(-values, values < 0, written))["own"][f"{task}/gold_bpb"]
        for document, each, item in zip(
            documents, evaluator._search.documents["own"][task], score.items, strict=True
        ):
            context, continuation = each.gold.instance.args
            assert continuation.strip() == answer(document).strip()
            assert context == each.instances[0].args[0]
            place = [id(instance) for instance in asked.instances].index(id(each.gold.instance))
            nats = values[asked.requests[place][0]]
            size = len(answer(document).encode())
            assert item == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_a_right_answer_that_is_too_long_matters_to_its_own_bits_alone(
    make: Make, folder: Path
) -> None:
    essay = {**lm_eval_tasks.WRITTEN, "task": "own_essay", "doc_to_target": "{{text * 50}}"}
    lm_eval_tasks.write_task(folder, essay)
    scores = make("own_essay").evaluate(Candidate())["own"]
    assert set(scores) == {"own_essay/exact_match,first", "own_essay/exact_match,word"}
    with pytest.raises(ConfigError, match=r"task own_essay.* sees 512 at once"):
        make("own_essay", metric="gold_bpb")


def test_one_candidate_leaves_nothing_for_the_next(make: Make) -> None:
    reused = make(*EVERY)
    one_by_one = [reused.evaluate(Candidate(seed)) for seed in range(12)]
    backwards = [reused.evaluate(Candidate(seed)) for seed in reversed(range(12))][::-1]
    assert one_by_one == backwards
    assert one_by_one[5] == make(*EVERY).evaluate(Candidate(5))
    assert len({str(scores) for scores in one_by_one}) == 12


def test_the_objective_is_the_first_metric_or_the_one_that_is_wished(make: Make) -> None:
    assert make("own_choice", "own_written").objective == {
        "own": ("own_choice/acc", "own_written/exact_match,first")
    }
    assert make("own_choice", metric="acc_norm").objective["own"] == ("own_choice/acc_norm",)
    assert make("own_choice", "own_written", metric="gold_bpb").objective["own"] == (
        "own_choice/gold_bpb",
        "own_written/gold_bpb",
    )
    wish = "exact_match,word"
    assert make("own_written", metric=wish).objective["own"] == (f"own_written/{wish}",)


def test_an_unknown_metric_is_an_error_that_lists_those_there_are(make: Make) -> None:
    with pytest.raises(
        ConfigError,
        match=r"capability own: .*own_choice has no metric 'f1', .*: acc, acc_norm, gold_bpb\.",
    ):
        make("own_choice", metric="f1")
    with pytest.raises(ConfigError, match="several filters of the metric 'exact_match'"):
        make("own_written", metric="exact_match")
    with pytest.raises(ConfigError, match="own_rolling has no metric 'gold_bpb'"):
        make("own_rolling", metric="gold_bpb")


def indices(evaluator: LmEvalEvaluator, task: str) -> list[int]:
    return [document.index for document in evaluator._search.documents["own"][task]]


def test_limit_draws_the_same_documents_by_its_seed(make: Make) -> None:
    first = indices(make("own_choice", limit=5), "own_choice")
    assert len(first) == 5
    assert first == sorted(first) != [0, 1, 2, 3, 4]
    assert indices(make("own_choice", limit=5), "own_choice") == first
    assert indices(make("own_choice", limit=5, seed=4), "own_choice") != first
    assert indices(make("own_choice", limit=50), "own_choice") == list(range(12))


def test_a_drawn_document_keeps_its_own_requests(make: Make, folder: Path) -> None:
    documents = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for each in make("own_letters", limit=5)._search.documents["own"]["own_letters"]:
        assert documents[each.index]["question"] in each.instances[0].args[0]
        assert each.instances[0].doc_id == each.index


def test_the_digest_changes_with_whatever_the_scores_depend_on(
    make: Make, hugging_face: HuggingFaceTokenizer
) -> None:
    def digest(**settings: Any) -> str:
        return str(make("own_choice", **settings).digest())

    plain = digest()
    assert digest() == plain
    assert "own_choice version 3.0, 2-shot, 12 of 12 documents, sha256 " in plain
    variants = [
        digest(seed=9),
        digest(num_fewshot=1),
        digest(limit=5),
        digest(metric="acc_norm"),
        digest(system_instruction="Be brief."),
        digest(held_out=held_out_share(0.5, 1)),
        digest(held_out=held_out_share(0.5, 2)),
        digest(chat_template=True, tokenizer=hugging_face),
    ]
    assert len({plain, *variants}) == 1 + len(variants)


@pytest.mark.parametrize(
    "change",
    [
        {"filter_list": [{"name": "none", "filter": [{"function": "lowercase"}]}]},
        {"metric_list": lm_eval_tasks.CHOICE["metric_list"][:1]},
    ],
)
def test_the_digest_changes_with_what_answers_are_scored_by(
    make: Make, folder: Path, change: dict[str, Any]
) -> None:
    lm_eval_tasks.write_task(folder, lm_eval_tasks.CHOICE | {"task": "same"})
    plain = str(make("same").digest())
    lm_eval_tasks.write_task(folder, lm_eval_tasks.CHOICE | {"task": "same"} | change)
    changed = str(make("same").digest())
    assert changed != plain
    assert str(make("same").digest()) == changed


def test_the_digest_changes_with_the_tokenizer(
    make: Make, hugging_face: HuggingFaceTokenizer
) -> None:
    bytes_ = make("own_choice").digest()["evaluate.own"]
    words = make("own_choice", tokenizer=hugging_face).digest()["evaluate.own"]
    assert bytes_.replace("tokenizer byte", f"tokenizer {hugging_face.digest()}") == words


def far_off(evaluator: LmEvalEvaluator) -> LmEvalEvaluator:
    """Let it have a candidate that finds every text all but impossible."""
    evaluator._model.answers = lambda asked, proxy: [  # type: ignore[method-assign]
        -1e6 if each.request_type == "loglikelihood_rolling" else (-1e6, False)
        for each in asked.instances
    ]
    return evaluator


def test_a_perplexity_beyond_all_numbers_fails_the_candidate(make: Make) -> None:
    evaluator = far_off(make("own_last_word"))
    with pytest.raises(EvaluationError, match="no finite number for own_last_word/perplexity"):
        evaluator.evaluate(NOBODY)


def test_a_number_that_does_not_count_may_be_missing(make: Make) -> None:
    scores = far_off(make("own_last_word", metric="acc")).evaluate(NOBODY)["own"]
    assert set(scores) == {"own_last_word/acc", "own_last_word/gold_bpb"}


def test_what_a_task_cannot_score_fails_the_candidate(make: Make) -> None:
    evaluator = make("own_choice")

    def fails(document: Any, results: Any) -> None:
        raise KeyError("answer")

    evaluator._work["own"]["own_choice"].task.process_results = fails
    with pytest.raises(EvaluationError, match="capability own: task own_choice .*KeyError: 'answ"):
        evaluator.evaluate(Candidate())


def test_worked_examples_become_turns_of_the_chat_template(
    make: Make, hugging_face: HuggingFaceTokenizer
) -> None:
    chat = make(
        "own_choice", chat_template=True, system_instruction="Be brief.", tokenizer=hugging_face
    )
    prompt = chat._search.documents["own"]["own_choice"][0].instances[0].args[0]
    assert prompt.startswith("<system>Be brief.\n<user>")
    assert prompt.count("<user>") == 3
    assert prompt.count("<assistant>") == 3
    assert prompt.endswith("<assistant>")
    with pytest.raises(ConfigError, match="capability own: .*no chat template"):
        make("own_choice", chat_template=True)


def test_held_out_documents_are_scored_apart(make: Make) -> None:
    plain = make(*EVERY)
    assert plain.evaluate_held_out(Candidate()) == {}
    divided = make(*EVERY, held_out=held_out_share(0.25, 3))
    for task in EVERY:
        search = set(indices(divided, task))
        held_out = {each.index for each in divided._held_out.documents["own"][task]}
        assert (len(search), len(held_out)) == (9, 3)
        assert search | held_out == set(range(12))
    counts = {score.num_samples for score in divided.evaluate(Candidate())["own"].values()}
    apart = {score.num_samples for score in divided.evaluate_held_out(Candidate())["own"].values()}
    assert (counts, apart) == ({9}, {3})


@pytest.mark.parametrize(("count", "apart"), [(1, 0), (2, 1), (3, 1), (100, 25)])
def test_a_share_leaves_the_search_a_document(count: int, apart: int) -> None:
    assert len(held_out_share(0.25, 3)("own/task", count)) == apart


def test_holding_out_everything_is_an_error(make: Make) -> None:
    with pytest.raises(ConfigError, match="all 12 documents of task own_choice would be held out"):
        make("own_choice", held_out=lambda name, count: range(count))


def answering(evaluator: LmEvalEvaluator) -> list[int]:
    """Let every request have the same answer whenever it is asked; return how many were, a call."""
    asked_for: list[int] = []

    def answers(asked: Any, proxy: Any) -> list[tuple[float, bool]]:
        asked_for.append(len(asked.instances))
        values = [zlib.crc32(repr(each.args).encode()) / 2**32 for each in asked.instances]
        return [(-5 * value, value < 0.3) for value in values]

    evaluator._model.answers = answers  # type: ignore[method-assign]
    return asked_for


def test_first_documents_and_the_others_together_are_all_documents(make: Make) -> None:
    evaluator = make(*MEANS, first_share=0.25)
    asked = answering(evaluator)
    first = evaluator.evaluate_first(NOBODY)
    assert {score.num_samples for score in first["own"].values()} == {3}
    whole = evaluator.evaluate_others(NOBODY, first)
    expected = evaluator.evaluate(NOBODY)
    assert asked[0] + asked[1] == asked[2]
    assert set(whole["own"]) == set(expected["own"])
    for name, score in expected["own"].items():
        found = whole["own"][name]
        assert found.items == score.items, name
        assert found.value == pytest.approx(score.value, rel=1e-6)
        assert found.num_samples == 12


def test_a_number_that_the_others_do_not_give_is_not_that_of_all(make: Make) -> None:
    """A metric that does not count may be no finite number there."""
    evaluator = make("own_choice", first_share=0.25)
    answering(evaluator)
    first = evaluator.evaluate_first(NOBODY)
    measured = evaluator._measure

    def without(*args: Any) -> Any:
        found = measured(*args)["own"]
        return {"own": {n: s for n, s in found.items() if n != "own_choice/acc_norm"}}

    assert "own_choice/acc_norm" in first["own"]
    measured_all, whole = {"own_choice/acc", "own_choice/gold_bpb"}, {"own": {}}
    whole["own"] = {n: s for n, s in first["own"].items() if n in measured_all}
    assert set(evaluator.evaluate_others(NOBODY, whole)["own"]) == measured_all
    evaluator._measure = without  # type: ignore[method-assign]
    assert set(evaluator.evaluate_others(NOBODY, first)["own"]) == measured_all


def test_a_task_whose_number_is_no_mean_is_scored_as_a_whole_later(make: Make) -> None:
    evaluator = make("own_last_word", "own_choice", first_share=0.25)
    answering(evaluator)
    first = evaluator.evaluate_first(NOBODY)
    whole = evaluator.evaluate_others(NOBODY, first)["own"]
    expected = evaluator.evaluate(NOBODY)["own"]
    assert whole["own_last_word/perplexity"] == expected["own_last_word/perplexity"]
    assert whole["own_last_word/acc"] == expected["own_last_word/acc"]
    assert whole["own_choice/acc"].items == expected["own_choice/acc"].items


def test_the_seed_draws_the_first_documents_and_held_out_ones_are_never_among_them(
    make: Make,
) -> None:
    divided = make(*EVERY, held_out=held_out_share(0.25, 3), first_share=0.4)
    for task in EVERY:
        first = [each.index for each in divided._first.documents["own"][task]]
        assert first == indices(divided, task)[: len(first)] == sorted(first)
        assert len(first) == 4
        assert first != sorted(indices(divided, task))[:4]
        held_out = {each.index for each in divided._held_out.documents["own"][task]}
        assert not held_out & set(first)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("delimiter", ["", " "])
def test_an_empty_choice_is_an_error_that_names_task_and_document(
    tmp_path: Path, number: int, delimiter: str
) -> None:
    lm_eval_tasks.write(tmp_path, count=3)
    lines = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    lines[number]["choices"][1] = ""
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    task = {**lm_eval_tasks.CHOICE, "target_delimiter": delimiter}
    with pytest.raises(
        ConfigError, match=f"capability own: task own_choice, document {number}: .* empty"
    ):
        LmEvalEvaluator(
            {"own": LmEvalTask(tasks=[lm_eval_tasks.write_task(tmp_path, task)])},
            tokenizer=ByteTokenizer(),
            seq_length=512,
            micro_batch_size=4,
        )


def test_the_bootstrapped_error_is_that_of_the_mean_where_both_are_known() -> None:
    values = np.random.default_rng(0).normal(size=300).tolist()

    def own_mean(found: list[float]) -> float:
        return sum(found) / len(found)

    score = score_of("own", values, own_mean, higher_is_better=True)
    assert score is not None
    assert score.items == ()
    assert score.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(300), rel=0.15)
    assert score_of("own", values, own_mean, higher_is_better=True) == score
    assert score_of("own", [1.0], own_mean, higher_is_better=True).stderr is None


def test_the_error_of_bits_per_byte_is_that_of_a_ratio() -> None:
    from lm_eval.api.metrics import bits_per_byte

    random = np.random.default_rng(1)
    sizes = random.integers(10, 300, size=400)
    pairs = [(-float(size * random.uniform(0.5, 1.5)), int(size)) for size in sizes]
    score = score_of("bits_per_byte", pairs, bits_per_byte, higher_is_better=False)
    drawn = score_of("other", pairs, lambda found: bits_per_byte(found), higher_is_better=False)
    assert score is not None
    assert drawn is not None
    assert score.value == drawn.value == bits_per_byte(pairs)
    assert score.stderr == pytest.approx(drawn.stderr, rel=0.15)


def test_what_is_no_number_is_no_score() -> None:
    assert score_of("table", [1, 2], lambda found: {"a": 1}, higher_is_better=True) is None
