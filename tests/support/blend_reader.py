"""Print how a Megatron-LM reads its own data arguments: the split, one blend, blends per split."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser

from megatron.training.arguments import add_megatron_arguments

try:
    from megatron.training.utils.common_utils import get_blend_and_blend_per_split
except ImportError:  # 0.16 to 0.18
    from megatron.training.utils import get_blend_and_blend_per_split

args = add_megatron_arguments(ArgumentParser()).parse_args(sys.argv[1:])
print(json.dumps([args.split, *get_blend_and_blend_per_split(args)]))
