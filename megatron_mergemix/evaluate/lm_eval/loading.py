"""Tasks of lm-eval by name or from files, with the settings that a capability gives them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as _FORMATS
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_mergemix.config.evaluate import LmEvalTask
from megatron_mergemix.errors import ConfigError, MergeMixError
from megatron_mergemix.evaluate.lm_eval.documents import seeded

_log = logging.getLogger(__name__)


def load_tasks(settings: LmEvalTask) -> dict[str, Task]:
    """Return the leaf tasks by name, in the order of the settings, with their data read.

    Groups and tags give the tasks that are in them. Works without a network where the data are
    local files or in the cache of ``datasets``.

    Raises:
        ConfigError: a task is unknown, its file is no task, its data are not there, or it cannot
            be run here; names the task or file.
    """
    registry = _Registry(settings.include_path)
    factory = _Factory(settings.seed)
    tasks: dict[str, Task] = {}
    for name in settings.tasks:
        entry = _entry_of_file(Path(name)) if _is_file_name(name) else registry.entry(name)
        for task in _built(factory, entry, registry):
            if task.task_name in tasks:
                raise ConfigError(f"lm_eval.tasks has the task {task.task_name} twice.")
            tasks[task.task_name] = task
    for name, task in tasks.items():
        _check_runnable(name, task)
        _set_fewshot(name, task, settings)
    return tasks


class _Registry(dict[str, Entry]):
    """Tasks by name: those of the folders given, then those that come with lm-eval.

    Reading the 14,000 task files of lm-eval takes 15 seconds, so it waits until one is missed.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        folders = [Path(folder) for folder in folders]
        for folder in folders:
            if not folder.is_dir():
                raise ConfigError(
                    f"lm_eval.include_path: {folder} is no folder, expected one with task files."
                )
        super().__init__(TaskIndex.build(folders))
        self._folders = folders

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in _shipped()

    def __missing__(self, name: str) -> Entry:
        return _shipped()[name]

    def entry(self, name: str) -> Entry:
        """Return the task, group or tag of this name.

        Raises:
            ConfigError: there is none.
        """
        if name in self:
            return self[name]
        self._check_files()
        near = difflib.get_close_matches(name, [*self, *_shipped()], 3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(
            f"lm_eval.tasks: there is no task, group or tag {name!r}.{hint} Expected a name that "
            "`lm_eval ls tasks` shows, one of a task in lm_eval.include_path, or a file (.yaml)."
        )

    def _check_files(self) -> None:
        """Refuse a file that lm-eval has passed over, because a task that is missed may be in it.

        Raises:
            ConfigError: a file in the folders given is no YAML, or lm-eval does not look at it.
        """
        for path in (path for folder in self._folders for path in sorted(folder.rglob("*.y*ml"))):
            if path.suffix == ".yml":
                raise ConfigError(f"lm_eval.include_path: {path} is not read; name it .yaml.")
            try:
                load_yaml(path, resolve_func=False)
            except Exception as error:  # of YAML, or of what it includes
                raise ConfigError(
                    f"lm_eval.include_path: {path} cannot be read: {error}. Expected a task file "
                    "in YAML."
                ) from error


@cache
def _shipped() -> dict[str, Entry]:
    return TaskIndex.build([Path(lm_eval.tasks.__file__).parent])


class _Factory(TaskFactory):
    """Builds tasks whose relative data files are beside the task file, not where one stands.

    What a task draws at random while it is built depends on the seed and itself alone.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def _load_full_config(
        self, entry: Entry, overrides: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        if entry.yaml_path is not None:
            _anchor(config, Path(entry.yaml_path).parent)
        return config

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Task:
        try:
            with seeded(self._seed, entry.name):
                return super()._build_task(entry, overrides)
        except MergeMixError:
            raise
        except OSError as error:  # what datasets raises where it finds nothing, and requests too
            raise ConfigError(
                f"task {entry.name}: its data cannot be loaded: {error}. Without a network they "
                "must be in the cache of `datasets` (HF_HOME), or dataset_kwargs.data_files of the "
                "task must name local files."
            ) from error
        except Exception as error:
            if isinstance(error, IndexError) and "string index" in str(error):
                # lm-eval looks at the first letter of every choice of the first document.
                raise ConfigError(f"task {entry.name}, document 0: a choice is empty.") from error
            raise ConfigError(
                f"task {entry.name} ({entry.yaml_path}) cannot be built: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _build_group_members(
        self,
        member_list: list[str | dict[str, Any]],
        group_name: str,
        overrides: dict[str, Any] | None,
        registry: dict[str, Entry],
    ) -> list[Task | Group]:
        """Build one after the other: what a group writes out itself is not built as a task."""
        members: list[Task | Group] = []
        for place, member in enumerate(member_list):
            with seeded(self._seed, f"{group_name} {place}"):
                members += super()._build_group_members([member], group_name, overrides, registry)
        return members


def _anchor(config: dict[str, Any], folder: Path) -> None:
    """Make the data files of a task, or of the tasks within a group, relative to a folder.

    Those of a dataset on the hub or in a folder of its own are relative to that.
    """
    keywords = config.get("dataset_kwargs")
    if isinstance(keywords, dict) and config.get("dataset_path", "json") in _FORMATS:
        for key in ("data_files", "data_dir"):
            if key in keywords:
                keywords[key] = _anchored(keywords[key], folder)
    members = config.get("task")
    for member in members if isinstance(members, list) else ():
        if isinstance(member, dict):
            _anchor(member, folder)


def _anchored(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return {key: _anchored(each, folder) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_anchored(each, folder) for each in value]
    return value if "://" in str(value) else str(folder / value)


def _is_file_name(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name


def _entry_of_file(path: Path) -> Entry:
    if not path.is_file():
        raise ConfigError(f"lm_eval.tasks: there is no task file {path}.")
    try:
        entry = TaskIndex.entry_from_path(path)
        if entry is not None and entry.kind is Kind.GROUP:  # lm-eval takes its members for a name
            entry.name = load_yaml(path, resolve_func=False)["group"]
    except Exception as error:  # of YAML, or of what it says
        raise ConfigError(
            f"{path} is no task of lm-eval: {error}. Expected a YAML file with the key task or "
            "group."
        ) from error
    if entry is None or not isinstance(entry.name, str):
        raise ConfigError(f"{path} is no task of lm-eval: it has no name under task or group.")
    return entry


def _built(factory: _Factory, entry: Entry, registry: _Registry) -> list[Task]:
    try:
        with _uncounted():
            found = factory.build(entry, overrides=None, registry=registry)
    except MergeMixError:
        raise
    except Exception as error:
        place = f" ({entry.yaml_path})" if entry.yaml_path else ""
        raise ConfigError(
            f"{entry.name}{place} cannot be built: {type(error).__name__}: {error}"
        ) from error
    if isinstance(found, Group):
        tasks: list[Task] = found.get_all_tasks()
        return tasks
    return found if isinstance(found, list) else [found]


@contextmanager
def _uncounted() -> Iterator[None]:
    """Keep ``datasets`` from telling its makers, for every local file that it reads.

    A node without a network waits for that, seconds for every task.
    """
    told = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = told


def _check_runnable(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"task {name} runs code that the model writes, which is not done on the ranks of a "
            "search. Score a checkpoint in a sandbox of your own, with a capability of the kind "
            "command."
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name} has images or sound; the model sees text alone.")


def _set_fewshot(name: str, task: Task, settings: LmEvalTask) -> None:
    """Set the worked examples as lm-eval does; a task that says 0 itself keeps it."""
    own = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    elif settings.num_fewshot:
        _log.warning("task %s is made for no worked examples; num_fewshot is left at 0", name)
    task.set_fewshot_seed(seed=settings.seed)
