"""The flags that the plugin adds to Megatron-LM's arguments."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_mergemix.errors import ConfigError

_TAKES: dict[str, tuple[str, ...]] = {
    "train": ("blend",),
    "expert": ("expert",),
    "search": (),
    "diagnose": (),
    "reference": ("mixture",),
    "evaluate": ("mixture", "checkpoint", "model"),
}
STAGES = tuple(_TAKES)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; all but the first may come from the environment, as ``MERGEMIX_STAGE``.

    Raises:
        ConfigError: ``--yaml-cfg`` is given as well, which would drop them without a word.
    """
    if _given("--mergemix-config") and _given("--yaml-cfg"):
        raise ConfigError(
            "--mergemix-config does not work with --yaml-cfg: Megatron-LM then forgets every other "
            "argument. Write the settings as arguments."
        )
    group = parser.add_argument_group("mergemix")
    group.add_argument("--mergemix-config", metavar="mix.yaml", help="the experiment")
    for name, text in (
        ("stage", f"one of {', '.join(STAGES)}; default: train, with the learned blend"),
        ("expert", "name of the expert that is trained, for the stage expert"),
        ("mixture", "name of a reference, or shares such as math=0.3,code=0.7"),
        (
            "blend",
            "file or folder of blend files in place of the learned ones, for the stage train",
        ),
        ("checkpoint", "checkpoint that the stage evaluate scores"),
        (
            "model",
            "what the stage evaluate scores, as mergemix evaluate names it: base, expert:math, "
            "mixture:uniform, mixture:math=0.3,code=0.7, alpha:math=0.5,code=0.5",
        ),
    ):
        default = os.environ.get(f"MERGEMIX_{name.upper()}")
        group.add_argument(f"--mergemix-{name}", default=default, help=text)


def stage_of(args: argparse.Namespace) -> str:
    """Return the stage that is asked for.

    Raises:
        ConfigError: it is none, or lacks or does not take one of the flags.
    """
    stage: str = args.mergemix_stage or "train"
    if stage not in STAGES:
        raise ConfigError(f"--mergemix-stage is {stage!r}, expected {', '.join(STAGES)}.")
    takes = _TAKES[stage]
    for name in ("expert", "mixture", "blend", "checkpoint", "model"):
        if _given(f"--mergemix-{name}") and name not in takes:
            raise ConfigError(
                f"--mergemix-{name} means nothing in the stage {stage}; leave it away."
            )
    for name in ("expert", "mixture"):
        if takes == (name,) and not getattr(args, f"mergemix_{name}"):
            raise ConfigError(f"the stage {stage} needs --mergemix-{name}.")
    return stage


def _given(flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in sys.argv[1:])
