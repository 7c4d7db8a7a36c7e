"""The resident model as a language model of lm-evaluation-harness.

Text becomes tokens exactly as in lm-eval's own Hugging Face backend (``HFLM``): spaces at the end
of a context go to the continuation, the two are tokenised as one text and cut where the context
alone ends, special tokens come as the tokenizer adds them, an empty context is its BOS (or end)
token, and what is too long is cut on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_mergemix.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from megatron_mergemix.errors import ConfigError, EvaluationError
from megatron_mergemix.evaluate.continuations import Continuations, Prompt, Request, prepare
from megatron_mergemix.evaluate.proxy import Proxy

_GREEDY = {"do_sample", "temperature", "top_k", "top_p"}
"""Settings of generation that say nothing where the most likely token is taken."""

_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
"""Other settings, by the value with which they change nothing."""

_LOOKED_BACK = 16
"""Tokens beyond the length of a stop that are read to find it: a character may be cut in them."""


@dataclass(frozen=True)
class Asked:
    """What a list of instances asks of the model, ready for any number of candidates.

    Attributes:
        instances: lm-eval's.
        requests: instance -> its token requests, first and end.
        continuations: those of all instances, as micro-batches.
        prompts: of the instances that want an answer written.
        stops: what ends each of those answers.
        written: instance -> its prompt, which several may share.
    """

    instances: Sequence[Instance]
    requests: dict[int, tuple[int, int]]
    continuations: Continuations
    prompts: Sequence[Prompt]
    stops: Sequence[tuple[str, ...]]
    written: dict[int, int]


class ResidentLM(TemplateLM):
    """Answers lm-eval's requests with whatever weights the proxy has at the moment."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        micro_batch_size: int,
        proxy: Proxy | None = None,
    ):
        """Describe the model.

        Args:
            tokenizer: that of the training data.
            max_length: tokens that the model sees at once.
            micro_batch_size: rows per forward pass.
            proxy: for lm-eval's own methods, ``loglikelihood`` and so on; may be set later.
        """
        super().__init__()
        self.proxy = proxy
        self.max_length = max_length
        self.micro_batch_size = micro_batch_size
        self._own = tokenizer
        self.tokenizer: Any = None
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self.tokenizer = tokenizer.pretrained

    @property
    def eot_token_id(self) -> int:
        """Return the id that ends a document."""
        return self._own.eod

    @property
    def prefix_token_id(self) -> int:
        """Return the id that stands before a text without context."""
        begin = None if self.tokenizer is None else self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Return a text that tells tokenizers apart."""
        return self._own.digest()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, with special tokens as the tokenizer adds them by itself."""
        if self.tokenizer is None:
            return self._own.encode(string).tolist()
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        prefix = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and has_bos_prefix(string, prefix):
            special = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer.encode(string, **special)
        return ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids, special tokens left out; those of bytes have no text."""
        if self.tokenizer is None:
            return self._own.decode(np.asarray(tokens))
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def check_chat_template(self) -> None:
        """Check that the tokenizer has a chat template.

        Raises:
            ConfigError: it has none.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError(
                "lm_eval.chat_template is true, but the tokenizer has no chat template. Add one "
                "to the tokenizer's folder, or leave chat_template out."
            )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as one text; without system turns where the template has none."""
        settings = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            text: str = self.tokenizer.apply_chat_template(chat_history, **settings)
        except jinja2.exceptions.TemplateError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            text = self.tokenizer.apply_chat_template(turns, **settings)
        return text

    def ask(self, instances: Sequence[Instance]) -> Asked:
        """Return instances as tokens in micro-batches.

        Raises:
            ConfigError: a continuation is empty or longer than the model's sequence, or generation
                is to be other than greedy; names task and document.
        """
        tokens: list[Request] = []
        requests: dict[int, tuple[int, int]] = {}
        wanted: dict[tuple[Prompt, tuple[str, ...]], int] = {}
        written: dict[int, int] = {}
        for number, instance in enumerate(instances):
            if instance.request_type == "generate_until":
                written[number] = wanted.setdefault(self._prompt(instance), len(wanted))
                continue
            first = len(tokens)
            if instance.request_type == "loglikelihood_rolling":
                tokens += self._windows(instance)
            else:
                tokens.append(self._pair(instance))
            requests[number] = first, len(tokens)
        continuations = prepare(
            tokens,
            max_length=self.max_length,
            micro_batch_size=self.micro_batch_size,
            vocab_size=self._own.vocab_size,
        )
        prompts = [prompt for prompt, _ in wanted]
        stops = [until for _, until in wanted]
        return Asked(instances, requests, continuations, prompts, stops, written)

    def answers(self, asked: Asked, proxy: Proxy) -> list[Any]:
        """Return what lm-eval expects of each instance.

        Collective, as the proxy's methods: a log-probability in nats and whether the continuation
        is greedy, for ``loglikelihood_rolling`` the former alone, for ``generate_until`` a text.

        Raises:
            EvaluationError: the model's logits are not finite; names task and document.
        """
        answers: list[Any] = [None] * len(asked.instances)
        log_probs, greedy = proxy.continuation_log_probs(asked.continuations)
        values, is_greedy = log_probs.tolist(), greedy.tolist()
        for number, (first, end) in asked.requests.items():
            value = sum(values[first:end])
            if not np.isfinite(value):
                raise EvaluationError(
                    f"{_place(asked.instances[number])}: the log-probability is {value}; "
                    "this model is broken (a merge by its merge weights)."
                )
            is_rolling = asked.instances[number].request_type == "loglikelihood_rolling"
            answers[number] = value if is_rolling else (value, is_greedy[first])
        texts = self._texts(asked, proxy) if asked.prompts else []
        for number, place in asked.written.items():
            answers[number] = texts[place]
        return answers

    def _texts(self, asked: Asked, proxy: Proxy) -> list[str]:
        longest = [max((len(stop.encode()) for stop in stops), default=0) for stops in asked.stops]

        def is_done(number: int, tokens: Sequence[int]) -> bool:
            if tokens[-1] == self.eot_token_id:
                return True
            # What was read before had no stop, and a token has a byte at least. A stop may be a
            # special token, such as the end of a turn, which no answer shows.
            end = tokens[-(longest[number] + _LOOKED_BACK) :]
            text = self.tok_decode(end, skip_special_tokens=False)
            return any(stop in text for stop in asked.stops[number])

        generated = proxy.generate(
            asked.prompts,
            is_done,
            micro_batch_size=self.micro_batch_size,
            vocab_size=self._own.vocab_size,
        )
        return [
            postprocess_generated_text(self.tok_decode(tokens), list(stop), None)
            for tokens, stop in zip(generated, asked.stops, strict=True)
        ]

    def has_room_for(self, instance: Instance) -> bool:
        """Return whether a continuation can be scored: it has tokens, and the model sees all."""
        try:
            self._pair(instance)
        except ConfigError:
            return False
        return True

    def _pair(self, instance: Instance) -> Request:
        context, continuation = instance.args[:2]
        if continuation == "":
            raise ConfigError(f"{_place(instance)}: a choice or answer is empty.")
        if context == "":
            after = self.tok_encode(continuation, add_special_tokens=False)
            before = [self.prefix_token_id]
            if after and after[0] == self.prefix_token_id:
                before, after = after[:1], after[1:]
        else:
            before, after = self._encode_pair(context, continuation)
            before = before or [self.prefix_token_id]  # of a context of spaces nothing is left
        if not after:
            raise ConfigError(
                f"{_place(instance)}: the choice or answer {continuation!r} has no token of its "
                "own after its context."
            )
        if len(after) > self.max_length:
            raise ConfigError(
                f"{_place(instance)}: a choice or answer has {len(after)} tokens, but the model "
                f"sees {self.max_length} at once."
            )
        return Request(before, after)

    def _windows(self, instance: Instance) -> list[Request]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(instance.args[0]),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        found = [Request(*make_disjoint_window(window)) for window in windows]
        if not found:
            raise ConfigError(f"{_place(instance)}: the text is empty.")
        return found

    def _prompt(self, instance: Instance) -> tuple[Prompt, tuple[str, ...]]:
        context, given = instance.args[:2]
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given))
        if settings["do_sample"]:
            raise ConfigError(
                f"{_place(instance)}: generation_kwargs ask for sampling ({given}), but answers "
                "are decoded greedily, so that candidates differ by their weights alone. Set "
                "do_sample: false and temperature: 0 in the task."
            )
        end = ""
        if self.tokenizer is not None:
            end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(list(settings.pop("until")), eos=end or None)
        longest = settings.pop("max_gen_toks")
        says = {name for name, value in settings.items() if value != _NEUTRAL.get(name)}
        if unknown := says - _GREEDY:
            raise ConfigError(
                f"{_place(instance)}: generation_kwargs has {', '.join(sorted(unknown))}, which "
                "greedy decoding does not know; expected until, max_gen_toks and do_sample: false."
            )
        room = self.max_length - longest
        if room <= 0:
            raise ConfigError(
                f"{_place(instance)}: max_gen_toks is {longest}, which leaves no room for the "
                f"question in the {self.max_length} tokens that the model sees at once. Lower "
                "max_gen_toks in the generation_kwargs of the task."
            )
        tokens = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        return Prompt(tuple(tokens), longest), tuple(filter(None, until))

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Collective: score continuations; see :meth:`answers`."""
        return self._now(requests)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Collective: score whole texts; see :meth:`answers`."""
        return self._now(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Collective: write answers; see :meth:`answers`."""
        return self._now(requests)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        raise AssertionError("lm-eval asks by loglikelihood, which does not come by here")

    def _now(self, requests: Sequence[Instance]) -> list[Any]:
        assert self.proxy is not None, "a proxy is set before lm-eval asks"
        return self.answers(self.ask(requests), self.proxy)


def _place(instance: Instance) -> str:
    return f"task {instance.task_name}, document {instance.doc_id}"
