"""Where the hooks go in an unpatched Megatron-LM. All that differs between versions is here."""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType
from typing import Any

from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.megatron_lm import hooks


def install() -> None:
    """Wrap Megatron-LM's own functions, so that every script that uses them meets the hooks.

    ``megatron.training`` must be importable. A Megatron-LM whose script is patched already is
    left alone.

    Raises:
        MergeMixError: this Megatron-LM lacks one of the functions.
    """
    import megatron.training as package
    from megatron.training import arguments

    if "megatron_mergemix" in inspect.getsource(arguments.add_megatron_arguments):
        return
    _wrap(arguments, "add_megatron_arguments", _adding_flags)
    _wrap(arguments, "parse_args", _then_rewriting)
    _wrap(arguments, "validate_args", _rewriting_first)
    _wrap(package, "pretrain", hooks.wrap_pretrain)


def _adding_flags(add_megatron_arguments: Any) -> Any:
    @functools.wraps(add_megatron_arguments)
    def add(parser: Any, *args: Any, **kwargs: Any) -> Any:
        return hooks.add_arguments(add_megatron_arguments(parser, *args, **kwargs))

    return add


def _then_rewriting(parse_args: Any) -> Any:
    @functools.wraps(parse_args)
    def parse(*args: Any, **kwargs: Any) -> Any:
        return hooks.after_parsing(parse_args(*args, **kwargs))

    return parse


def _rewriting_first(validate_args: Any) -> Any:
    @functools.wraps(validate_args)
    def validate(args: Any, *others: Any, **kwargs: Any) -> Any:
        hooks.before_validation(args)
        return validate_args(args, *others, **kwargs)

    return validate


def _wrap(home: ModuleType, name: str, wrapper: Any) -> None:
    """Replace a function wherever Megatron-LM's modules hold it: they import it by name."""
    original = getattr(home, name, None)
    if original is None:
        raise MergeMixError(
            f"{home.__name__} has no {name}: this Megatron-LM ({home.__file__}) is none that "
            "megatron-mergemix knows. docs/versions.md lists those it works with."
        )
    wrapped = wrapper(original)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megatron.") and (
            vars(module).get(name) is original
        ):
            setattr(module, name, wrapped)
