"""Scores of lm-eval's tasks on the resident model."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task

from megatron_mergemix.config.evaluate import LmEvalTask
from megatron_mergemix.data.tokenizers import Tokenizer
from megatron_mergemix.errors import ConfigError, EvaluationError
from megatron_mergemix.evaluate.first_items import first_count, first_to_last, joined
from megatron_mergemix.evaluate.lm_eval.documents import (
    Document,
    HeldOut,
    build_documents,
    fingerprint,
    seeded,
    without_progress,
)
from megatron_mergemix.evaluate.lm_eval.language_model import Asked, ResidentLM
from megatron_mergemix.evaluate.lm_eval.loading import load_tasks
from megatron_mergemix.evaluate.lm_eval.metrics import (
    GOLD,
    gold_score,
    kind_of,
    metric_name,
    metrics_of,
    score_of,
    wanted_metric,
)
from megatron_mergemix.evaluate.proxy import Proxy
from megatron_mergemix.trials import Score, Scores

_Documents = dict[str, dict[str, list[Document]]]
"""Capability -> task -> documents."""


@dataclass(frozen=True)
class _Work:
    """A task with all its documents, those of the search and those held out.

    Attributes:
        task: lm-eval's.
        documents: of it.
        metrics: what it measures.
        wanted: the one that the utility sees.
        record: what the digest says of it.
    """

    task: Task
    documents: Sequence[Document]
    metrics: Sequence[str]
    wanted: str
    record: Mapping[str, Any]

    @property
    def is_gold_alone(self) -> bool:
        """Whether no answer need be written: nobody asked for more than bits of right ones."""
        return self.wanted == GOLD and self.task.OUTPUT_TYPE == "generate_until"


@dataclass(frozen=True)
class _Part:
    """Documents that are scored together, and what they ask of the model."""

    documents: Mapping[str, Mapping[str, Sequence[Document]]]
    asked: Asked


class LmEvalEvaluator:
    """Scores a proxy on the tasks of every capability of the kind ``lm_eval``.

    All text becomes tokens and micro-batches in the constructor; a candidate costs forward passes.
    Filters, metrics and aggregation are lm-eval's own code, so the numbers are lm-eval's.

    Attributes:
        kinds: capability -> ``task/metric`` that the utility sees -> whether higher is better, and
            its unit.
    """

    def __init__(
        self,
        tasks: Mapping[str, LmEvalTask],
        *,
        tokenizer: Tokenizer,
        seq_length: int,
        micro_batch_size: int,
        held_out: HeldOut | None = None,
        first_share: float = 1.0,
        seed: int = 0,
    ):
        """Load tasks, build their requests and turn them into tokens.

        Every rank does so by itself and gets the same.

        Args:
            tasks: capability -> its tasks.
            tokenizer: that of the training data.
            seq_length: tokens that the model sees at once.
            micro_batch_size: rows per forward pass.
            held_out: which documents only :meth:`evaluate_held_out` scores; None for none.
            first_share: share of the other documents that :meth:`evaluate_first` scores.
            seed: which those are.

        Raises:
            ConfigError: a task is unknown, cannot be run, has no such metric, or a document of it
                cannot be scored; names the capability, the task and the document.
        """
        self._model = ResidentLM(
            tokenizer, max_length=seq_length, micro_batch_size=micro_batch_size
        )
        self._work: dict[str, dict[str, _Work]] = {}
        self.kinds: dict[str, dict[str, tuple[bool, str]]] = {}
        self._seeds = {name: settings.seed for name, settings in tasks.items()}
        search: _Documents = {}
        apart: _Documents = {}
        for name, settings in tasks.items():
            try:
                self._load(name, settings)
            except ConfigError as error:
                raise ConfigError(f"capability {name}: {error}") from error
            search[name], apart[name] = {}, {}
            for task, work in self._work[name].items():
                places = held_out(f"{name}/{task}", len(work.documents)) if held_out else ()
                search[name][task], apart[name][task] = _divided(work.documents, places)
                if not search[name][task]:
                    raise ConfigError(
                        f"capability {name}: all {len(work.documents)} documents of task {task} "
                        "would be held out, and none is left for the search."
                    )
                order = first_to_last(len(search[name][task]), first_share, seed)
                search[name][task] = [search[name][task][place] for place in order]
        self._search = self._part(search)
        self._held_out = self._part(apart) if _has_some(apart) else None
        self._first, self._others = self._search, None
        if first_share < 1:
            first, others = self._begin(search, first_share)
            self._first = self._part(first)
            self._others = self._part(others) if _has_some(others) else None

    def _load(self, name: str, settings: LmEvalTask) -> None:
        if settings.chat_template:
            self._model.check_chat_template()
        self._work[name] = {}
        with without_progress():
            for task_name, task in load_tasks(settings).items():
                with seeded(settings.seed, task_name):
                    documents, available = build_documents(task, settings, self._model)
                    sha256 = fingerprint(task, documents)
                metrics = metrics_of(task, any(each.gold for each in documents))
                record = {
                    "version": None if task.VERSION == "Yaml" else task.VERSION,
                    "num_fewshot": task.get_config("num_fewshot"),
                    "documents": len(documents),
                    "of_documents": available,
                    "sha256": sha256,
                }
                wanted = wanted_metric(task_name, metrics, settings.metric)
                self._work[name][task_name] = _Work(task, documents, metrics, wanted, record)
        self.kinds[name] = {
            f"{task_name}/{work.wanted}": kind_of(work.task, work.wanted)
            for task_name, work in self._work[name].items()
        }

    def _part(self, documents: Mapping[str, Mapping[str, Sequence[Document]]]) -> _Part:
        instances: dict[int, Instance] = {}
        for name, tasks in documents.items():
            for task, found in tasks.items():
                for each in found:
                    gold = [] if each.gold is None else [each.gold.instance]
                    asked = [] if self._work[name][task].is_gold_alone else each.instances
                    instances.update({id(instance): instance for instance in (*asked, *gold)})
        return _Part(documents, self._model.ask(list(instances.values())))

    def _begin(self, search: _Documents, share: float) -> tuple[_Documents, _Documents]:
        """Return the first documents, and what completes their scores to those on all.

        That is the others, or all once more where a number of the task is no mean over documents.
        """
        first: _Documents = {name: {} for name in search}
        others: _Documents = {name: {} for name in search}
        for name, tasks in search.items():
            for task, documents in tasks.items():
                count = first_count(len(documents), share)
                first[name][task] = documents[:count]
                work = self._work[name][task]
                aggregations = work.task.aggregation().values()
                are_means = work.is_gold_alone or all(each is mean for each in aggregations)
                others[name][task] = documents[count:] if are_means else documents
        return first, others

    @property
    def objective(self) -> Mapping[str, tuple[str, ...]]:
        """Return what the utility sees of every capability: ``task/metric`` of all its tasks."""
        return {name: tuple(kinds) for name, kinds in self.kinds.items()}

    @property
    def kept_tokens(self) -> int:
        """Return how many tokens of a text are kept, as keys and values, at most."""
        parts = (self._search, self._held_out, self._first, self._others)
        asked = [part.asked for part in parts if part is not None]
        layouts = [each.continuations.shared for each in asked]
        longest = [each.continuations.longest_kept for each in layouts if each is not None]
        written = self._model.max_length if any(each.prompts for each in asked) else 0
        return max([written, *longest])

    def digest(self) -> Mapping[str, str]:
        """Return, per capability, what its scores depend on: lm-eval, tokenizer, tasks, metrics."""
        package = importlib.metadata.version("lm-eval")
        held_out = self._held_out.documents if self._held_out is not None else {}
        digests = {}
        for name, works in self._work.items():
            texts = []
            for task, work in works.items():
                told = work.record
                version = "" if told["version"] is None else f" version {told['version']}"
                text = (
                    f"{task}{version}, {told['num_fewshot']}-shot, "
                    f"{told['documents']} of {told['of_documents']} documents"
                )
                if apart := held_out.get(name, {}).get(task):
                    places = " ".join(str(document.index) for document in apart)
                    text += f" without {places}"
                texts.append(f"{text}, sha256 {told['sha256']}")
            wanted = ", ".join(self.kinds[name])
            digests[f"evaluate.{name}"] = (
                f"lm-eval {package}, tokenizer {self._model.tokenizer_name}, metrics {wanted}, "
                f"at most {self._model.max_length} tokens: " + "; ".join(texts)
            )
        return digests

    def evaluate(self, proxy: Proxy) -> Scores:
        """Collective: return ``{capability: {"task/metric": score}}`` over the search's documents.

        Raises:
            EvaluationError: the model's logits are not finite.
        """
        return self._measure(proxy, self._search)

    def evaluate_first(self, proxy: Proxy) -> Scores:
        """Collective: as :meth:`evaluate`, over the first share of the documents.

        Raises:
            EvaluationError: the model's logits are not finite.
        """
        return self._measure(proxy, self._first)

    def evaluate_others(self, proxy: Proxy, first: Scores) -> Scores:
        """Collective: as :meth:`evaluate`, where the first share was scored before.

        A task with a number that is no mean over documents is scored as a whole.

        Raises:
            EvaluationError: the model's logits are not finite.
        """
        if self._others is None:
            return {name: first[name] for name in self._work}
        found = self._measure(proxy, self._others)
        return {name: self._joined(name, first[name], found[name]) for name in self._work}

    def _joined(
        self, name: str, first: Mapping[str, Score], others: Mapping[str, Score]
    ) -> dict[str, Score]:
        """Return a capability's scores on all documents; those that a part lacks are left out.

        A part in which no document has a right answer lacks no bits of right answers.
        """
        assert self._others is not None
        scores: dict[str, Score] = {}
        for task, documents in self._search.documents[name].items():
            left = self._others.documents[name][task]
            of_task = [m for m in {**first, **others} if m.rsplit("/", 1)[0] == task]
            for metric in of_task:
                parts = [part[metric] for part in (first, others) if metric in part]
                if len(left) == len(documents):  # the others are all documents once more
                    parts = [others[metric]] if metric in others else []
                if len(parts) == 2:
                    scores[metric] = joined(*parts)
                elif parts and (len(left) in (0, len(documents)) or metric == f"{task}/{GOLD}"):
                    scores[metric] = parts[0]
        return scores

    def evaluate_held_out(self, proxy: Proxy) -> Scores:
        """Collective: as :meth:`evaluate`, over the documents that the search never sees.

        Empty where nothing is held out.
        """
        return {} if self._held_out is None else self._measure(proxy, self._held_out)

    def _measure(self, proxy: Proxy, part: _Part) -> Scores:
        answers = self._model.answers(part.asked, proxy)
        of_instance = {
            id(instance): answer
            for instance, answer in zip(part.asked.instances, answers, strict=True)
        }
        scores: dict[str, dict[str, Score]] = {}
        for name, tasks in part.documents.items():
            scores[name] = {}
            for task, documents in tasks.items():
                if not documents:
                    continue
                with seeded(self._seeds[name], task):
                    found = self._scores(name, task, documents, of_instance)
                scores[name].update({f"{task}/{metric}": each for metric, each in found.items()})
            missing = [wanted for wanted in self.kinds[name] if wanted not in scores[name]]
            missing = [wanted for wanted in missing if tasks[wanted.rsplit("/", 1)[0]]]
            if missing:
                raise EvaluationError(
                    f"capability {name}: lm-eval gave no finite number for {', '.join(missing)}."
                )
        return scores

    def _scores(
        self,
        name: str,
        task: str,
        documents: Sequence[Document],
        answers: Mapping[int, Any],
    ) -> dict[str, Score]:
        try:
            return _task_scores(self._work[name][task], documents, answers)
        except Exception as error:  # of a task's own code, which may not expect what a merge says
            raise EvaluationError(
                f"capability {name}: task {task} cannot score what the model answered: "
                f"{type(error).__name__}: {error}"
            ) from error


def _has_some(documents: _Documents) -> bool:
    return any(found for tasks in documents.values() for found in tasks.values())


def _divided(
    documents: Sequence[Document], places: Collection[int]
) -> tuple[list[Document], list[Document]]:
    """Return the documents that are not at these places, and those that are."""
    search = [each for place, each in enumerate(documents) if place not in places]
    return search, [each for place, each in enumerate(documents) if place in places]


def _task_scores(
    work: _Work, documents: Sequence[Document], answers: Mapping[int, Any]
) -> dict[str, Score]:
    """Return a task's scores, :data:`GOLD` among them where documents have right answers."""
    scores = {} if work.is_gold_alone else _own_scores(work, documents, answers)
    bits = [
        -answers[id(document.gold.instance)][0] / (math.log(2.0) * document.gold.num_bytes)
        for document in documents
        if document.gold is not None
    ]
    if bits:
        scores[GOLD] = gold_score(bits)
    return scores


def _own_scores(
    work: _Work, documents: Sequence[Document], answers: Mapping[int, Any]
) -> dict[str, Score]:
    """Return scores by lm-eval's own filters, ``process_results`` and aggregation."""
    task = work.task
    task._instances = [instance for document in documents for instance in document.instances]
    for instance in task._instances:
        instance.resps = [answers[id(instance)]] * (instance.repeats or 1)
        instance.filtered_resps = {}
    task.apply_filters()
    scores: dict[str, Score] = {}
    for filter_name in task._instances[0].filtered_resps:
        values: dict[str, list[Any]] = {}
        for document in documents:
            results = [each.filtered_resps[filter_name] for each in document.instances]
            measured = task.process_results(document.instances[0].doc, results)
            for metric, value in measured.items():
                values.setdefault(metric, []).append(value)
        for metric, found in values.items():
            name = metric_name(metric, filter_name)
            aggregate = task.aggregation().get(metric, mean)
            score = score_of(
                metric, found, aggregate, kind_of(task, metric)[0], name == work.wanted
            )
            if score is not None:
                scores[name] = score
    return scores
