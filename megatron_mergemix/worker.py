"""One rank of a job: ``torchrun ... -m megatron_mergemix.worker JOB mix.yaml ...``.

The module imports nothing heavy and guards its main part, because Megatron's checkpoint writer
spawns a helper process that imports it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback


def main() -> None:
    """Run this rank's part of the job; on an error, leave the message and end at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=["train", "search", "validate"])
    parser.add_argument("config")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--error-file", required=True)
    arguments = parser.parse_args()

    from megatron_mergemix.distributed import die_with_parent

    die_with_parent()
    try:
        run(arguments)
    except BaseException as error:
        leave_error(arguments.error_file, error)
        # Other ranks wait in a collective; leaving at once lets the launcher end them.
        os._exit(1)


def run(arguments: argparse.Namespace) -> None:
    """Start the ranks, do the job, take the ranks down."""
    from megatron_mergemix.config import load_config
    from megatron_mergemix.megatron import parallel

    config = load_config(arguments.config, arguments.overrides)
    parallel.start(config.parallel)
    if arguments.job == "train":
        from megatron_mergemix.jobs.train import train_all

        train_all(config, arguments.names)
    elif arguments.job == "search":
        from megatron_mergemix.jobs.search import search

        search(config)
    else:
        from megatron_mergemix.jobs.validate import validate

        validate(config, arguments.names)
    parallel.stop()


def leave_error(path: str, error: BaseException) -> None:
    """Write the error for the launching side; the first rank to fail wins."""
    from megatron_mergemix.errors import MergeMixError

    traceback.print_exc()
    sys.stderr.flush()
    if isinstance(error, MergeMixError):
        text = str(error)
    else:
        text = f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}"
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        pass


if __name__ == "__main__":
    main()
