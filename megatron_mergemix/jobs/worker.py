"""One rank of a job: ``python -m megatron_mergemix.jobs.worker JOB config.json ...``.

The module imports nothing heavy and guards its main part, because Megatron's checkpoint writer
spawns a helper process that imports it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from megatron_mergemix.processes.distributed import leave_process_groups
from megatron_mergemix.processes.error_file import leave_error
from megatron_mergemix.processes.process_life import (
    die_with_parent,
    die_with_spawner,
    tell_children_their_parent,
)

if __name__ == "__mp_main__":
    # In the helper of Megatron's checkpoint writer, which would outlive a rank that is killed.
    die_with_spawner()


def main() -> None:
    """Run this rank's part of the job; on an error, leave the message and end at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=["train", "search", "validate", "evaluate", "diagnose"])
    parser.add_argument("config")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--error-file", required=True)
    arguments = parser.parse_args()
    die_with_parent()
    tell_children_their_parent()
    try:
        run(arguments)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        leave_error(arguments.error_file, error)
        # Other ranks wait in a collective; leaving at once lets the launcher end them.
        os._exit(1)


def run(arguments: argparse.Namespace) -> None:
    """Start the ranks, do the job, take the ranks down."""
    from megatron_mergemix.config import Config
    from megatron_mergemix.megatron import parallel

    # What the launching side has checked and put on record, whatever the YAML says by now.
    config = Config.model_validate_json(Path(arguments.config).read_text(encoding="utf-8"))
    parallel.start(config.parallel)
    if arguments.job == "train":
        from megatron_mergemix.jobs.train import train_all

        train_all(config, arguments.names)
    elif arguments.job == "search":
        from megatron_mergemix.jobs.search import search

        search(config)
    elif arguments.job == "evaluate":
        from megatron_mergemix.jobs.evaluate import evaluate

        evaluate(config, arguments.names)
    elif arguments.job == "diagnose":
        from megatron_mergemix.jobs.diagnose import diagnose

        diagnose(config)
    else:
        from megatron_mergemix.jobs.validate import validate

        validate(config, arguments.names)
    leave_process_groups()


if __name__ == "__main__":
    main()
