"""Score a Hugging Face checkpoint on given windows: what a new process has to do per candidate.

    python tools/bench_search_transformers.py MODEL WINDOWS.npy MICRO_BATCH

Needs torch, numpy and transformers alone. Prints JSON: the mean loss in nats per token, and when
the imports, the loading and the forward passes ended, in seconds since the start.
"""

from __future__ import annotations

import json
import os
import sys
import time

CLOCK = time.process_time if os.environ.get("BENCH_CLOCK") == "cpu" else time.perf_counter
START = CLOCK()


def main() -> None:
    """Load, score, print."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    ends = {"import": CLOCK() - START}
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    ends["load"] = CLOCK() - START
    windows = torch.from_numpy(np.load(sys.argv[2]))
    sums = []
    with torch.no_grad():
        for batch in windows.split(int(sys.argv[3])):
            logits = model(batch[:, :-1]).logits.float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
            )
            sums.append(losses.view(len(batch), -1).double().sum(dim=1))
    loss = (torch.cat(sums) / (windows.shape[1] - 1)).mean().item()
    ends["evaluate"] = CLOCK() - START
    print(json.dumps({"loss": loss, "ends": ends}))


if __name__ == "__main__":
    main()
