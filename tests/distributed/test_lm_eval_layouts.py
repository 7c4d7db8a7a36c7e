"""Every layout against lm-eval's own Hugging Face backend: the same weights, the same answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.replay import Replay
from tests.support.run_distributed import run_distributed

P2P = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2, sequence parallel": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2, virtual stages": (2, {"pipeline": 2, "virtual": 2, "settings": P2P}),
    "dp2": (2, {}),
    "tp2 dp2": (4, {"tensor": 2}),
    "pp2 dp2": (4, {"pipeline": 2}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2 pp2, sequence parallel": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
}
"""Name -> number of ranks, layout."""

MOE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "ep2": (2, {"expert": 2}),
    "pp2 ep2": (4, {"pipeline": 2, "expert": 2}),
    "dp4, ep2 within": (4, {"expert": 2}),
}

KINDS: Mapping[str, Sequence[str]] = {
    "untied": [name for name in LAYOUTS if name != "pp2 dp2"],
    # Where the two copies of an embedding are on other stages.
    "tied": ("tp1", "dp2", "pp2", "pp2, virtual stages", "pp2 dp2", "tp2 pp2, sequence parallel"),
    "moe": list(MOE_LAYOUTS),
}
"""Of the model -> layouts under which it is asked."""

CASES = [(layout, kind) for kind, names in KINDS.items() for layout in names]
EVERY_CASE = pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param(
            layout,
            kind,
            marks=pytest.mark.nightly if (LAYOUTS | MOE_LAYOUTS)[layout][0] == 4 else (),
        )
        for layout, kind in CASES
    ],
)
MICRO_BATCH = 4


def layouts(kind: str) -> Mapping[str, tuple[int, dict[str, Any]]]:
    """Return those under which such a model is asked."""
    return MOE_LAYOUTS if kind == "moe" else LAYOUTS


def ask(home: Path, files: list[str], chat: bool = False) -> Any:
    """Return the evaluator of the tasks in these files."""
    from megatron_mergemix.config.evaluate import LmEvalTask
    from megatron_mergemix.data.tokenizers import HuggingFaceTokenizer
    from megatron_mergemix.evaluate.lm_eval.evaluator import LmEvalEvaluator
    from tests.support import llama

    return LmEvalEvaluator(
        {"own": LmEvalTask(tasks=files, chat_template=chat)},
        tokenizer=HuggingFaceTokenizer(home / "tokenizer"),
        seq_length=llama.LENGTH,
        micro_batch_size=MICRO_BATCH,
    )


def likely_end(folder: Path, model: Any) -> Callable[[str], str | None]:
    """Return a function that continues a text by the model's most likely token, where it can."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def end(start: str) -> str | None:
        if not start or start.endswith(" "):
            return None
        before = tokenizer.encode(start)
        with torch.no_grad():
            token = int(model(torch.tensor([before])).logits[0, -1].argmax())
        text: str = tokenizer.decode([token])
        return text if tokenizer.encode(start + text) == [*before, token] else None

    return end


def by_hugging_face(home: Path, files: list[str], model: Any, chat: bool = False) -> dict[str, Any]:
    """Return what lm-eval's own backend makes of the same weights."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    from megatron_mergemix.config.evaluate import LmEvalTask
    from megatron_mergemix.evaluate.lm_eval.loading import load_tasks

    lm_eval.evaluator.add_env_info = lambda *_: None  # asks pip and compilers for their versions
    found = lm_eval.evaluator.simple_evaluate(
        model=HFLM(
            pretrained=model,
            tokenizer=AutoTokenizer.from_pretrained(home / "tokenizer"),
            batch_size=3,
        ),
        tasks=list(load_tasks(LmEvalTask(tasks=files)).values()),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    assert found is not None
    return found


def answer(home: Path, asked: Any, chat: Any, world_size: int) -> dict[str, Any]:
    """Answer under every layout of so many ranks, from the weights that one rank has saved."""
    import tokenizers  # transformers takes as long to import as all layouts take to answer
    from megatron.core import parallel_state

    from megatron_mergemix.evaluate.continuations import Request, prepare
    from megatron_mergemix.megatron.continuations import (
        _may_share,
        continuation_log_probs,
        most_likely_tokens,
    )
    from megatron_mergemix.megatron.dist_checkpoint import load_model
    from megatron_mergemix.megatron.generation import generate
    from megatron_mergemix.megatron.replicas import all_data_ranks
    from megatron_mergemix.megatron.scoring import sequence_losses
    from tests.support import bare_gpt, llama

    continuations, prompts, stops = asked
    tokenizer = tokenizers.Tokenizer.from_file(str(home / "tokenizer" / "tokenizer.json"))

    sequences = continuations.groups[0].passes[0].flatten(0, 1)[:5, :33]
    sizes = {"max_length": 32, "micro_batch_size": 2}
    whole = prepare(
        [Request(row[:1], row[1:]) for row in sequences.tolist()], **sizes, vocab_size=300
    )
    next_ones = [Request(row, (0,)) for row in sequences[:, :20].tolist()]
    few = [prepare(next_ones, **sizes, vocab_size=size) for size in (50, 200)]

    def write(chunks: Any, prompts: Any, stops: Any) -> Any:
        def is_done(number: int, tokens: Any) -> bool:
            text = tokenizer.decode(tokens)
            return tokens[-1] == 1 or any(stop in text for stop in stops[number])

        return generate(chunks, prompts, is_done, MICRO_BATCH, 300)

    found: dict[str, Any] = {}
    for name, kind in CASES:
        ranks, layout = layouts(kind)[name]
        if ranks != world_size:
            continue
        bare_gpt.start(layout)
        chunks = bare_gpt.build(llama.settings(kind), layout, kind == "tied", llama.model())
        load_model(home / kind / "iter_0000001", chunks)
        log_probs, greedy = continuation_log_probs(chunks, continuations)
        written = write(chunks, prompts, stops)
        losses = sequence_losses(chunks, sequences, 2)
        of_whole = continuation_log_probs(chunks, whole)[0]
        assert all(chunk.training for chunk in chunks)
        ids = [most_likely_tokens(chunks, each).tolist() for each in few]
        asked_again = [
            Request(prompt.tokens, answer)
            for prompt, tokens in zip(prompts, written, strict=True)
            for answer in (tokens, [*tokens[:-1], (tokens[-1] + 1) % 300])
        ]
        again = prepare(asked_again, max_length=64, micro_batch_size=3, vocab_size=300)
        is_again = continuation_log_probs(chunks, again)[1].tolist()
        assert is_again == [True, False] * len(prompts)
        shares = _may_share(chunks, continuations, all_data_ranks())
        found[f"{name}, {kind}"] = log_probs, greedy, written, losses, of_whole, ids, shares
        if f"{name}, {kind}" == "tp1, untied":
            found["chat"] = *continuation_log_probs(chunks, chat[0]), write(chunks, *chat[1:])
        parallel_state.destroy_model_parallel()
    return found


def save_weights(home: Path, states: dict[str, Any]) -> None:
    """Save Hugging Face weights as Megatron's, on one rank."""
    from megatron_mergemix.megatron.dist_checkpoint import save
    from tests.support import bare_gpt, llama

    bare_gpt.start({})
    for kind in KINDS:
        (chunk,) = bare_gpt.build(llama.settings(kind), {}, kind == "tied", llama.model())
        llama.load(chunk, states[kind])
        save(home / kind, 1, [chunk], training={}, keep=1)


class Answered(NamedTuple):
    """Whom all layouts answered, what every rank said, and what lm-eval's own backend said.

    Attributes:
        evaluator: asks; ``chat`` asks the same as conversations.
        answers: layout and kind, or ``chat`` -> rank -> answers; all layouts of so many ranks
            are asked when the first one is wanted.
        theirs: kind, or ``chat`` -> lm-eval's results.
    """

    evaluator: Any
    chat: Any
    answers: Mapping[str, Any]
    theirs: dict[str, Any]


class Answers(dict[str, Any]):
    """What every rank says, by layout and kind."""

    def __init__(self, *asked: Any) -> None:
        super().__init__()
        self._asked = asked
        self._begun: set[int] = set()

    def __missing__(self, name: str) -> Any:
        layout, _, kind = name.rpartition(", ")
        ranks = layouts(kind)[layout][0] if layout else 1
        assert ranks not in self._begun, f"{ranks} ranks gave no answers"
        self._begun.add(ranks)
        every = run_distributed(answer, ranks, *self._asked, ranks, timeout=400)
        self.update({name: [each[name] for each in every] for name in every[0]})
        return self[name]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """Ask every layout, and lm-eval's own backend, the same of the same weights."""
    from tests.support import llama, lm_eval_tasks

    home = tmp_path_factory.mktemp("lm_eval")
    llama.write_tokenizer(home / "tokenizer", chat_begins=True)
    models = {kind: llama.hugging_face(kind) for kind in KINDS}
    end = likely_end(home / "tokenizer", models["untied"])
    files = lm_eval_tasks.write(home / "tasks", end=end)
    evaluator, chat = ask(home, files), ask(home, files, chat=True)
    states = {kind: dict(model.state_dict()) for kind, model in models.items()}
    run_distributed(save_weights, 1, home, states)
    plain, of_chat = (
        (asked.continuations, asked.prompts, asked.stops)
        for asked in (evaluator._search.asked, chat._search.asked)
    )
    answers = Answers(home, plain, of_chat)
    theirs = {kind: by_hugging_face(home, files, model) for kind, model in models.items()}
    theirs["chat"] = by_hugging_face(home, files, models["untied"], chat=True)
    return Answered(evaluator, chat, answers, theirs)


@EVERY_CASE
def test_every_answer_is_that_of_lm_evals_hugging_face_backend(answered, layout, kind) -> None:
    replay = Replay(*answered.answers[f"{layout}, {kind}"][0][:3])
    assert_same_answers(answered.evaluator, replay, answered.theirs[kind])


def test_every_answer_in_a_conversation_is_that_of_lm_evals_hugging_face_backend(answered) -> None:
    """A template that writes the first token itself, and few-shot examples as turns."""
    replay = Replay(*answered.answers["chat"][0])
    assert_same_answers(answered.chat, replay, answered.theirs["chat"])
    assert replay.log_probs.tolist() != answered.answers["tp1, untied"][0][0].tolist()


def assert_same_answers(evaluator: Any, replay: Replay, theirs: Any) -> None:
    asked = evaluator._search.asked
    ours = dict(zip(map(id, asked.instances), evaluator._model.answers(asked, replay), strict=True))
    compared = 0
    for task, documents in evaluator._search.documents["own"].items():
        expected = {sample["doc_id"]: sample["resps"] for sample in theirs["samples"][task]}
        for document in documents:
            responses = expected[document.index]
            for instance, response in zip(document.instances, responses, strict=True):
                assert agree(ours[id(instance)], response[0]), (task, document.index)
                compared += 1
    assert compared == 12 * (3 + 3 + 1 + 1 + 1 + 4)


def agree(mine: Any, their: Any) -> bool:
    if isinstance(mine, str):
        return mine == their
    if isinstance(mine, float):
        return abs(mine - their) < 1e-4
    return abs(mine[0] - their[0]) < 1e-4 and mine[1] == their[1]


@EVERY_CASE
def test_the_choices_of_a_question_share_its_context(answered, layout, kind) -> None:
    assert answered.answers[f"{layout}, {kind}"][0][6] == ("virtual" not in layout)


@EVERY_CASE
def test_every_metric_is_lm_evals(answered, layout, kind) -> None:
    replay = Replay(*answered.answers[f"{layout}, {kind}"][0][:3])
    scores = answered.evaluator.evaluate(replay)["own"]
    compared = 0
    for task, metrics in answered.theirs[kind]["results"].items():
        for key, value in metrics.items():
            metric, _, which = key.partition(",")
            if not which or metric.endswith("_stderr"):
                continue
            name = metric if which == "none" else key
            assert scores[f"{task}/{name}"].value == pytest.approx(value, rel=1e-5), key
            compared += 1
    assert compared == 12


@EVERY_CASE
def test_every_rank_has_the_same_answers(answered, layout, kind) -> None:
    first, *others = answered.answers[f"{layout}, {kind}"]
    for log_probs, greedy, written, *_ in others:
        assert log_probs.equal(first[0])
        assert greedy.equal(first[1])
        assert written == first[2]


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_data_parallel_ranks_change_no_bit(answered, kind) -> None:
    one, two = (answered.answers[f"{layout}, {kind}"][0] for layout in ("tp1", "dp2"))
    assert one[0].equal(two[0])
    assert one[2] == two[2]


def test_the_texts_can_tell_a_mistake(answered) -> None:
    """Right and wrong, greedy and not, stopped early and not: all are there."""
    _, greedy, written, _, _, ids, _ = answered.answers["tp1, untied"][0]
    assert ids[0] != ids[1]
    assert 0 < greedy.sum() < len(greedy)
    assert len({len(tokens) for tokens in written}) > 1
    asked = answered.evaluator._search.asked
    assert max(len(prompt.tokens) for prompt in asked.prompts) == 64 - 9
    assert len(asked.continuations.groups) > 1


@EVERY_CASE
def test_log_probabilities_are_the_held_out_loss_padding_of_the_vocabulary_included(
    answered, layout, kind
) -> None:
    _, _, _, losses, of_whole, *_ = answered.answers[f"{layout}, {kind}"][0]
    assert of_whole.numpy() == pytest.approx(-losses.numpy(), rel=2e-6)


@EVERY_CASE
def test_the_most_likely_token_is_one_that_the_tokenizer_has(answered, layout, kind) -> None:
    ids = answered.answers[f"{layout}, {kind}"][0][5]
    assert ids == answered.answers[f"tp1, {kind}"][0][5]
    assert max(ids[0]) < 50
    assert max(ids[1]) < 200
