"""``python -m megatron_mergemix`` is ``mergemix``."""

import sys

from megatron_mergemix.cli import main

if __name__ == "__main__":
    sys.exit(main())
