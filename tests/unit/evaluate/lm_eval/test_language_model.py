"""Text to token requests as in lm-eval's Hugging Face backend, and the errors on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.utils_hf import MultiTokenEOSCriteria

from megatron_mergemix.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from megatron_mergemix.errors import ConfigError, EvaluationError
from megatron_mergemix.evaluate.lm_eval.language_model import ResidentLM
from tests.support.replay import Replay

END = ByteTokenizer.eod


def by_bytes(length: int = 16) -> ResidentLM:
    return ResidentLM(ByteTokenizer(), max_length=length, micro_batch_size=2)


def instance(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("quiz", 7, 1))


def pair(model: ResidentLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    request = model._pair(instance("loglikelihood", context, continuation))
    return list(request.context), list(request.continuation)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation() -> None:
    assert pair(by_bytes(), "a b  ", "c") == (list(b"a b"), list(b"  c"))


def test_a_text_without_context_stands_after_the_end_of_a_document() -> None:
    assert pair(by_bytes(), "", "ab") == ([END], list(b"ab"))
    assert pair(by_bytes(), "  ", "ab") == ([END], list(b"  ab"))


def test_special_tokens_come_as_the_tokenizer_adds_them(hugging_face: HuggingFaceTokenizer) -> None:
    model = ResidentLM(hugging_face, max_length=16, micro_batch_size=2)
    plain = hugging_face.encode("The cat").tolist()
    assert pair(model, "The cat", " sat")[0] == [0, *plain]
    assert pair(model, "<begin>The cat", " sat")[0] == [0, *plain], "not twice"
    assert pair(model, "", "The cat") == ([0], plain)
    assert pair(model, "", "<begin>The cat") == ([0], plain)
    assert model._prompt(instance("generate_until", "The cat", {"max_gen_toks": 2}))[0].tokens == (
        0,
        *plain,
    )


def test_a_long_text_is_cut_into_windows_that_cover_it_once() -> None:
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    windows = by_bytes(16)._windows(instance("loglikelihood_rolling", text))
    assert [token for window in windows for token in window.continuation] == list(text.encode())
    assert windows[0].context == [END]
    assert all(len(w.context) + len(w.continuation) <= 17 for w in windows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loglikelihood", "a", ""), "a choice or answer is empty"),
        (("loglikelihood", "a", "b" * 17), "has 17 tokens, but the model sees 16 at once"),
        (("loglikelihood_rolling", ""), "the text is empty"),
        (("generate_until", "a", {"do_sample": True}), "ask for sampling"),
        (("generate_until", "a", {"temperature": 0.7}), "ask for sampling"),
        (("generate_until", "a", {"max_gen_toks": 16}), "leaves no room for the question"),
        (("generate_until", "a", {"max_gen_toks": 2, "num_beams": 4}), "has num_beams"),
    ],
)
def test_what_cannot_be_scored_is_an_error_that_names_task_and_document(
    arguments: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"task quiz, document 7: .*{message}"):
        by_bytes().ask([instance(*arguments)])


def test_a_long_question_is_cut_on_the_left_to_leave_room_for_the_answer() -> None:
    prompt, stops = by_bytes()._prompt(
        instance("generate_until", "0123456789abcdefgh", {"max_gen_toks": 6, "until": "\n"})
    )
    assert bytes(prompt.tokens) == b"89abcdefgh"
    assert (prompt.max_new_tokens, stops) == (6, ("\n",))


def test_settings_at_their_neutral_value_ask_for_nothing() -> None:
    given = {"max_gen_toks": 2, "until": ["."], "num_beams": 1, "repetition_penalty": 1.0}
    model = by_bytes()
    plain = model._prompt(instance("generate_until", "a", {"max_gen_toks": 2, "until": ["."]}))
    assert model._prompt(instance("generate_until", "a", given)) == plain


def test_the_same_question_is_answered_once_and_told_to_all_who_asked() -> None:
    model = by_bytes()
    given = {"max_gen_toks": 5, "until": ["."]}
    other = {"max_gen_toks": 5, "until": ["!"]}
    asked = model.ask(
        [instance("generate_until", *each) for each in (("q", given), ("q", other), ("q", given))]
    )
    assert len(asked.prompts) == 2
    replay = Replay([], [], [[*b"yes."], [*b"no!"]])
    assert model.answers(asked, replay) == ["yes", "no", "yes"]


def test_answers_are_what_lm_eval_expects_of_every_kind() -> None:
    model = by_bytes()
    asked = model.ask(
        [
            instance("generate_until", "q", {"max_gen_toks": 5, "until": ["."]}),
            instance("loglikelihood", "a", "b"),
            instance("loglikelihood_rolling", "abcdefghijklmnopqrst"),
        ]
    )
    replay = Replay([-1.5, -2.0, -3.0], [True, False, True], [[*b"yes.", END]])
    assert model.answers(asked, replay) == ["yes", (-1.5, True), -5.0]


def test_an_answer_is_done_at_a_stop_or_at_the_end_of_the_document() -> None:
    model, told = by_bytes(), []

    class Asking(Replay):
        def generate(self, prompts: Any, is_done: Any, **sizes: Any) -> list[list[int]]:
            told.extend(is_done(0, list(text)) for text in (b"ye", b"yes.", b"yes.n"))
            told.append(is_done(0, [*b"ye", END]))
            assert sizes == {"micro_batch_size": 2, "vocab_size": 257}
            return [[]]

    asked = model.ask([instance("generate_until", "q", {"max_gen_toks": 5, "until": ["s."]})])
    assert model.answers(asked, Asking([], [])) == [""]
    assert told == [False, True, True, True]


class Until(Replay):
    """Writes a text until it is said to be done."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__([], [])
        self.tokens = tokens
        self.written: list[int] = []

    def generate(self, prompts: Any, is_done: Any, **_: Any) -> list[list[int]]:
        for token in self.tokens:
            self.written.append(token)
            if is_done(0, self.written):
                break
        return [self.written]


LETTERS = st.sampled_from(list("ab.é☃\n "))


@given(st.lists(LETTERS, min_size=1, max_size=60), st.lists(LETTERS, min_size=1, max_size=9))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_stop_is_found_where_it_ends_however_long_the_answer_is(
    hugging_face: HuggingFaceTokenizer, text: list[str], stop: list[str]
) -> None:
    given_stop = "".join(stop)
    for tokenizer in (ByteTokenizer(), hugging_face):
        tokens = tokenizer.encode("".join(text)).tolist()
        model = ResidentLM(tokenizer, max_length=200, micro_batch_size=2)
        until = {"max_gen_toks": 100, "until": [given_stop]}
        writing = Until(tokens)
        model.answers(model.ask([instance("generate_until", "q", until)]), writing)
        lengths = range(1, len(tokens) + 1)
        texts = (model.tok_decode(tokens[:n], skip_special_tokens=False) for n in lengths)
        ends = [n for n, written in zip(lengths, texts, strict=True) if given_stop in written]
        assert len(writing.written) == (ends[0] if ends else len(tokens))


def test_a_special_token_may_be_a_stop_as_in_lm_evals_own_backend(
    hugging_face: HuggingFaceTokenizer,
) -> None:
    """``<begin>`` is special, but no end of a document."""
    tokenizer = hugging_face.pretrained
    says = tokenizer.encode("The cat<begin> sat", add_special_tokens=False)

    class Saying(Replay):
        def generate(self, prompts: Any, is_done: Any, **_: Any) -> list[list[int]]:
            lengths = range(1, len(says) + 1)
            return [says[: next(length for length in lengths if is_done(0, says[:length]))]]

    model = ResidentLM(hugging_face, max_length=16, micro_batch_size=2)
    asked = model.ask([instance("generate_until", "q", {"max_gen_toks": 9, "until": ["<begin>"]})])
    assert model.answers(asked, Saying([], [])) == ["The cat"]
    stops = MultiTokenEOSCriteria("<begin>", tokenizer, 0, 1)
    theirs = [n for n in range(1, len(says)) if stops(torch.tensor([says[:n]]), None)]
    assert says[theirs[0] - 1] == tokenizer.bos_token_id


def test_broken_weights_are_a_failed_candidate_that_names_the_document() -> None:
    model = by_bytes()
    asked = model.ask([instance("loglikelihood", "a", "b")])
    with pytest.raises(EvaluationError, match=r"task quiz, document 7: .*nan.*broken"):
        model.answers(asked, Replay([float("nan")], [False]))


def test_a_tokenizer_without_chat_template_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        by_bytes().check_chat_template()
