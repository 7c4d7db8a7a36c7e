"""The documents of a task with their requests and right answers, made once per search."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import random
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.api.utils import ends_with_whitespace

from megatron_mergemix.config.evaluate import LmEvalTask
from megatron_mergemix.errors import ConfigError, MergeMixError
from megatron_mergemix.evaluate.lm_eval.language_model import ResidentLM
from megatron_mergemix.evaluate.lm_eval.metrics import GOLD

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Where something is in memory, which Python says of what has no text of its own."""


HeldOut = Callable[[str, int], Collection[int]]
"""Told ``capability/task`` and the number of documents, which of them are held out, by place."""


def held_out_share(share: float, seed: int) -> HeldOut:
    """Return a rule that holds out a share of every task's documents, drawn by the seed.

    Where the share is above 0 at least one document is held out, of a task with several.
    """

    def draw(name: str, count: int) -> Collection[int]:
        size = min(count - 1, max(1, round(share * count))) if share > 0 else 0
        return set(random.Random(f"{seed} {name}").sample(range(count), size))

    return draw


@dataclass(frozen=True)
class Gold:
    """The right answer of a document: the request for its log-probability, and its size."""

    instance: Instance
    num_bytes: int


@dataclass(frozen=True)
class Document:
    """One document of a task.

    Attributes:
        index: its number in the task's data.
        instances: its requests, in the task's order.
        gold: its right answer, where the task has one for it.
    """

    index: int
    instances: Sequence[Instance]
    gold: Gold | None


def build_documents(
    task: Task, settings: LmEvalTask, language_model: ResidentLM
) -> tuple[list[Document], int]:
    """Return the documents that are to be scored, by index, and how many the task has.

    Requests are built by lm-eval's own code, without its caches. ``limit`` draws documents by
    ``seed`` and the task's name alone. Where the bits of right answers are the metric, documents
    without one are left out.

    Raises:
        ConfigError: the task cannot make requests of its data; names it.
    """
    available = len(task.eval_docs)
    chosen = list(range(available))
    if settings.limit is not None and settings.limit < available:
        draw = random.Random(f"{settings.seed} {task.task_name}")
        chosen = sorted(draw.sample(chosen, settings.limit))
    try:
        task.build_all_requests(
            samples=set(chosen) if len(chosen) < available else None,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
            chat_template=language_model.apply_chat_template if settings.chat_template else None,
            tokenizer_name=language_model.tokenizer_name,
        )
    except MergeMixError:
        raise
    except Exception as error:
        raise ConfigError(
            f"task {task.task_name} cannot make requests of its documents: "
            f"{type(error).__name__}: {error}"
        ) from error
    by_document: dict[int, list[Instance]] = {}
    for instance in task.instances:
        instance.doc_id = chosen[instance.doc_id]
        by_document.setdefault(instance.doc_id, []).append(instance)
    documents = []
    for index, instances in by_document.items():
        instances.sort(key=lambda instance: instance.idx)
        _check_choices(task, index, instances[0].doc)
        gold = _gold(task, instances, settings.chat_template)
        is_extra = gold is not None and all(gold.instance is not each for each in instances)
        if settings.metric == GOLD and gold is None:
            continue
        if gold is not None and is_extra and settings.metric != GOLD:
            # Nobody asked for the bits of a reference answer that is too long to be seen at once.
            gold = gold if language_model.has_room_for(gold.instance) else None
        documents.append(Document(index, instances, gold))
    return documents, available


def fingerprint(task: Task, documents: Sequence[Document]) -> str:
    """Return a sha256 in hex over all documents and prompts, and what answers are scored by.

    Of a document everything counts, because a task's own code may score by any of its fields; of
    that code the files that it is written in, and not what they import.
    """
    digest = hashlib.sha256(json.dumps(_scoring(task), default=_as_text).encode() + b"\n")
    for document in documents:
        content = document.instances[0].doc
        asked = [
            [instance.request_type, instance.args, instance.repeats]
            for instance in document.instances
        ]
        gold = None if document.gold is None else document.gold.instance.args
        parts = [document.index, content, asked, task.doc_to_target(content), gold]
        digest.update(json.dumps(parts, default=_as_text, skipkeys=True).encode() + b"\n")
    return digest.hexdigest()


def _scoring(task: Task) -> dict[str, Any]:
    """Return what turns a task's answers into numbers."""
    settings = ("output_type", "metric_list", "process_results", "filter_list")
    return {"class": type(task), **{name: task.get_config(name) for name in settings}}


def _as_text(value: Any) -> Any:
    """Return what JSON cannot say as what it can, the same in every process."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if not callable(value):
        return _ADDRESS.sub("", str(value))
    code = getattr(value, "__code__", None)
    line = "" if code is None else code.co_firstlineno  # tells two lambdas apart
    name = getattr(value, "__qualname__", type(value).__qualname__)
    try:
        content = Path(inspect.getsourcefile(value) or "").read_bytes()
    except (TypeError, OSError):  # it is not written in Python
        return name
    return [name, line, hashlib.sha256(content).hexdigest()]


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Give a task that draws from the global generators of Python and numpy the same on every rank.

    Every task begins anew: of one whose documents the cache of ``datasets`` has, nothing is drawn,
    and another one must not notice. Whatever was drawn inside leaves no trace outside.
    """
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(f"{seed} {name}")
    np.random.seed(zlib.crc32(f"{seed} {name}".encode()))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def _check_choices(task: Task, index: int, document: Any) -> None:
    if type(task) is not ConfigurableTask or task.OUTPUT_TYPE != "multiple_choice":
        return
    if any(not str(choice) for choice in task.doc_to_choice(document)):
        raise ConfigError(f"task {task.task_name}, document {index}: a choice is empty.")


def _gold(task: Task, instances: Sequence[Instance], chat_template: bool) -> Gold | None:
    """Return the right answer of a document, or None where it has none as a text."""
    if type(task) is not ConfigurableTask:  # a class of its own may ask in any other way
        return None
    kind, document = task.OUTPUT_TYPE, instances[0].doc
    if kind == "multiple_choice":
        return _right_choice(task, instances)
    if kind == "loglikelihood":
        return Gold(instances[0], len(str(instances[0].args[1]).encode()))
    if kind != "generate_until":
        return None
    target: Any = task.doc_to_target(document)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(document)[target]
    elif isinstance(task.config.doc_to_target, int):  # a stand-in: ifeval scores by rules, not this
        return None
    if isinstance(target, (list, tuple)):  # any of them is right; the first one is written out
        target = target[0] if target else ""
    if target is None or isinstance(target, dict):  # of such the task's own code makes an answer
        return None
    text = str(target)
    if not text.strip():
        return None
    context = instances[0].args[0]
    delimiter = task.config.target_delimiter
    begins_turn = chat_template and not task.doc_to_prefix(document)
    if begins_turn or ends_with_whitespace(context) or text[0].isspace():
        delimiter = ""
    instance = Instance(
        "loglikelihood",
        document,
        (context, f"{delimiter}{text}"),
        len(instances),
        metadata=(instances[0].task_name, instances[0].doc_id, 1),
    )
    return Gold(instance, len(text.encode()))


def _right_choice(task: Task, instances: Sequence[Instance]) -> Gold | None:
    """Return the first of the choices that are right, by its place among the requests."""
    document = instances[0].doc
    several_inputs = bool(getattr(task, "multiple_input", 0))
    choices = task.doc_to_choice(document)
    gold: Any = task.doc_to_text(document) if several_inputs else task.doc_to_target(document)
    if isinstance(gold, (list, tuple)):
        gold = gold[0] if gold else -1
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    if not 0 <= int(gold) < len(choices):
        return None
    text = task.doc_to_target(document) if several_inputs else choices[int(gold)]
    size = len(str(text).encode())
    return Gold(instances[int(gold)], size) if size else None


@contextmanager
def without_progress() -> Iterator[None]:
    """Keep progress bars, one per task and rank, out of the log for the block."""
    module: Any = lm_eval.api.task
    shown, were_off = module.tqdm, datasets.are_progress_bars_disabled()
    module.tqdm = functools.partial(shown, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        module.tqdm = shown
        if not were_off:
            datasets.enable_progress_bars()
