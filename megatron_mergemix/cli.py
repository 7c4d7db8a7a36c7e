"""``mergemix VERB``: reads arguments and hands over.

Imports nothing heavy, so that help and mistakes answer at once; every handler imports what it
needs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mergemix import __version__
from megatron_mergemix.errors import MergeMixError

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: one of our errors, printed as one message. 2: wrong arguments. 130: interrupted.
    143: ended by SIGTERM, which the job got first.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser(arguments).parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        options.handler(options)
    except MergeMixError as error:
        if options.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if options.traceback:
            raise
        print("interrupted; start it again to continue", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mergemix",
        description="Learn the data mixture of a Megatron-LM run by merging domain experts.",
    )
    parser.add_argument("--version", action="version", version=f"mergemix {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the stack of an error")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    init = verbs.add_parser("init", parents=[common], help="write a commented mix.yaml")
    init.add_argument("path", metavar="PATH", nargs="?", help="new file; default: the terminal")
    init.set_defaults(handler=_init)

    _add_standalone(verbs, common, arguments)

    on_config = argparse.ArgumentParser(add_help=False, parents=[common])
    on_config.add_argument("config", metavar="mix.yaml", type=Path)
    on_config.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one setting, such as search.trials=64; may be repeated",
    )
    _add_plan(verbs, on_config)

    train = verbs.add_parser("train", parents=[on_config], help="train base, experts, references")
    train.add_argument(
        "what",
        metavar="WHAT",
        nargs="+",
        type=_what,
        help="base, experts, expert:NAME, references, reference:NAME",
    )
    train.set_defaults(handler=_train)

    for verb, text in (
        ("search", "merge and score candidates, recommend a mixture"),
        ("blend", "write the recommended mixture for Megatron"),
        ("validate", "really train reference mixtures and compare them"),
        ("run", "base, experts, search and blend, in order"),
    ):
        stage = verbs.add_parser(verb, parents=[on_config], help=text)
        stage.set_defaults(handler=_stage, verb=verb)
    _add_evaluate(verbs, on_config)
    text = "say whether the experts are where merging works"
    diagnose = verbs.add_parser("diagnose", parents=[on_config], help=text)
    diagnose.add_argument("--json", metavar="FILE", help="write it as JSON; - for the terminal")
    diagnose.set_defaults(handler=_diagnose)
    _add_report(verbs, common, on_config)
    _add_cluster(verbs, on_config)
    return parser


def _add_evaluate(verbs: Any, on_config: argparse.ArgumentParser) -> None:
    text = "score checkpoints and merges as candidates are"
    evaluate = verbs.add_parser("evaluate", parents=[on_config], help=text)
    add = evaluate.add_argument
    add("what", metavar="WHAT", nargs="*", type=_model, help="base, experts, expert:NAME")
    add(
        "--mixture",
        metavar="MIXTURE",
        action="append",
        default=[],
        help="the merge that stands for learned, uniform, proportional, a name of references, or "
        "math=0.3,code=0.7; may be repeated",
    )
    add(
        "--alpha",
        metavar="EXPERT=WEIGHT",
        action="append",
        nargs="+",
        default=[],
        help="the merge with these weights; an expert left out weighs 0; may be repeated",
    )
    add(
        "--checkpoint",
        metavar="DIR",
        action="append",
        default=[],
        help="checkpoint root or iteration folder; may be repeated",
    )
    add("--json", metavar="FILE", help="write everything as JSON; - for the terminal")
    evaluate.set_defaults(handler=_evaluate)


def _add_report(verbs: Any, common: argparse.ArgumentParser, on_config: Any) -> None:
    """Add the verbs that show what is there and measure nothing."""
    report = verbs.add_parser("report", parents=[on_config], help="show a run on one HTML page")
    report.add_argument(
        "--output", metavar="FILE", type=Path, help="the page; default: report.html in run_dir"
    )
    report.set_defaults(handler=_report)

    compare = verbs.add_parser("compare", parents=[common], help="lay two runs side by side")
    for name in ("first", "second"):
        compare.add_argument(name, metavar="RUN", type=Path, help="run directory, or its mix.yaml")
    compare.add_argument("--json", metavar="FILE", type=Path, help="write it as JSON, too")
    compare.add_argument("--html", metavar="FILE", type=Path, help="write it as a page, too")
    compare.set_defaults(handler=_compare)


def _add_plan(verbs: Any, on_config: argparse.ArgumentParser) -> None:
    plan = verbs.add_parser("plan", parents=[on_config], help="check everything, print the cost")
    plan.add_argument("--json", action="store_true", help="for machines")
    plan.add_argument(
        "--settings-only",
        action="store_true",
        help="open neither datasets nor checkpoints, which may not be there yet",
    )
    plan.add_argument(
        "--gpu",
        metavar="GPU",
        help="also say how long it takes on a100-80g, h100, h200 or b200, or on your own figures: "
        "h100,memory=94e9",
    )
    plan.add_argument(
        "--gpus",
        metavar="N",
        type=_count,
        help="with --gpu: how many (default: parallel.processes)",
    )
    plan.add_argument(
        "--scale",
        action="store_true",
        help="with --gpu: also models of 8B and 70B with 4 and 16 experts (default: on 64 GPUs)",
    )
    plan.set_defaults(handler=_plan)


def _add_cluster(verbs: Any, on_config: argparse.ArgumentParser) -> None:
    """Add the verbs that start nothing on this machine."""
    submit = verbs.add_parser("submit", parents=[on_config], help="queue it all on a SLURM cluster")
    submit.add_argument("--dry-run", action="store_true", help="print the jobs, submit nothing")
    submit.add_argument(
        "--validate", action="store_true", help="really train reference mixtures after the search"
    )
    submit.add_argument(
        "--then", metavar="FILE", type=Path, help="your own sbatch file, run after the blend"
    )
    submit.set_defaults(handler=_submit)

    status = verbs.add_parser("status", parents=[on_config], help="what is done, running, failed")
    status.add_argument("--json", action="store_true", help="for machines")
    status.set_defaults(handler=_status)


def _add_standalone(verbs: Any, common: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add the verbs that need no experiment."""
    for verb, text, module in (
        ("data", "turn text into Megatron datasets", "data.prepare"),
        ("merge", "merge checkpoints into a checkpoint", "offline.merge"),
        ("average", "average the last saves of one run", "offline.average"),
        ("inspect", "show what is in checkpoints, and how they differ", "offline.inspect"),
    ):
        alone = verbs.add_parser(verb, parents=[common], help=text)
        if verb in arguments:  # its arguments live beside its code, which may import more
            code = importlib.import_module(f"megatron_mergemix.{module}")
            code.add_arguments(alone)
            alone.set_defaults(handler=code.run)


def _what(text: str) -> str:
    kind, colon, name = text.partition(":")
    if text in ("base", "experts", "references"):
        return text
    if kind in ("expert", "reference") and colon and name:
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r}, expected base, experts, expert:NAME, references or reference:NAME"
    )


def _model(text: str) -> str:
    kind, colon, name = text.partition(":")
    if text in ("base", "experts") or (kind == "expert" and colon and name):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}, expected base, experts or expert:NAME")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number above 0")
    return int(text)


def _init(options: argparse.Namespace) -> None:
    from megatron_mergemix.template import TEMPLATE

    if options.path is None:
        print(TEMPLATE, end="")
        return
    try:
        with open(options.path, "x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise MergeMixError(f"{options.path} exists already; name another file") from None
    except OSError as error:
        raise MergeMixError(f"cannot write {options.path}: {error.strerror}") from error
    print(f"wrote {options.path}; edit it, then: mergemix plan {os.fspath(options.path)}")


def _plan(options: argparse.Namespace) -> None:
    from megatron_mergemix.errors import ConfigError
    from megatron_mergemix.plan.hardware import gpu_of
    from megatron_mergemix.plan.make import make_plan
    from megatron_mergemix.plan.outlook import Hardware
    from megatron_mergemix.plan.tables import print_json, print_tables

    hardware = None
    if options.gpu is not None:
        hardware = Hardware(gpu_of(options.gpu), options.gpus, options.scale)
    elif options.gpus is not None or options.scale:
        raise ConfigError("--gpus and --scale need --gpu, the hardware that is reckoned with.")
    plan = make_plan(
        options.config,
        options.overrides,
        settings_only=options.settings_only,
        hardware=hardware,
    )
    (print_json if options.json else print_tables)(plan)


def _train(options: argparse.Namespace) -> None:
    from megatron_mergemix.launch import verbs

    verbs.train(options.config, options.overrides, options.what)


def _submit(options: argparse.Namespace) -> None:
    from megatron_mergemix.launch.submit import submit

    submit(
        options.config,
        options.overrides,
        dry_run=options.dry_run,
        validate=options.validate,
        then=options.then,
    )


def _status(options: argparse.Namespace) -> None:
    from megatron_mergemix.launch.status import status

    status(options.config, options.overrides, as_json=options.json)


def _report(options: argparse.Namespace) -> None:
    from megatron_mergemix.report.write import report

    report(options.config, options.overrides, options.output)


def _compare(options: argparse.Namespace) -> None:
    from megatron_mergemix.report.compare import compare

    compare(options.first, options.second, json_file=options.json, html_file=options.html)


def _evaluate(options: argparse.Namespace) -> None:
    from megatron_mergemix.launch.evaluation import evaluate

    evaluate(options)


def _diagnose(options: argparse.Namespace) -> None:
    from megatron_mergemix.launch.diagnosis import diagnose

    diagnose(options)


def _stage(options: argparse.Namespace) -> None:
    from megatron_mergemix.launch import verbs

    getattr(verbs, options.verb)(options.config, options.overrides)
