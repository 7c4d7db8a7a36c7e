"""What CPU mode does to torch and to the processes around it, tried in processes of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.megatron import cpu_mode
from tests.support.processes import is_dead
from tests.support.run_distributed import run_command, run_distributed

SCRIPT = """
import multiprocessing, sys

print("script as", __name__, flush=True)

class Sum:
    def __call__(self, *numbers):
        import torch
        return sum(numbers), torch.ones(1, device="cuda").type()

def main():
    context = multiprocessing.get_context("spawn")
    queue = context.Manager().Queue()
    queue.put("through the manager")
    print(queue.get())
    with context.Pool(1) as pool:
        print(pool.apply(Sum(), (20, 22)))
    print("arguments", sys.argv[1:])

if __name__ == "__main__":
    import sibling
    main()
"""


@pytest.mark.parametrize(("value", "expected"), [("cpu", True), ("cuda", False), ("", False)])
def test_cpu_mode_is_wanted_only_where_the_variable_says_cpu(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv("MERGEMIX_DEVICE", value)
    assert cpu_mode.wanted() is expected


def test_another_device_is_an_error_that_names_the_choices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MERGEMIX_DEVICE", "tpu")
    with pytest.raises(ConfigError, match="'tpu'; expected 'cpu' or 'cuda'"):
        cpu_mode.wanted()


def activate_before_and_after(device: str) -> str:
    code = f"""
import os, sys, types
os.environ["MERGEMIX_DEVICE"] = {device!r}
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 8
from megatron_mergemix.megatron import cpu_mode
cpu_mode.activate()
cpu_mode.activate()
print("active", torch.ones(1, device="cuda").device)
"""
    return run_command([sys.executable, "-c", code]).stdout


def test_cpu_mode_leaves_cuda_unused_only_when_told_to() -> None:
    assert "machine with 8 CUDA devices. Set MERGEMIX_DEVICE=cpu" in activate_before_and_after("")
    assert "MERGEMIX_DEVICE=cuda forbids CPU mode" in activate_before_and_after("cuda")
    assert "active cpu" in activate_before_and_after("cpu")


def test_cpu_mode_after_megatron_is_an_error() -> None:
    code = """
import sys, types
sys.modules["megatron.core"] = types.ModuleType("megatron.core")
from megatron_mergemix.megatron import cpu_mode
cpu_mode.activate()
"""
    done = run_command([sys.executable, "-c", code])
    assert done.returncode != 0
    assert "must be activated before megatron.core is imported" in done.stdout


def ask_for_cuda_in_every_way(folder: Path) -> None:
    import torch

    zeros = torch.zeros(2, device="cuda:0", pin_memory=True)
    device = torch.device("cuda", 1)
    moved = [
        zeros.cuda(),
        zeros.cuda(torch.cuda.current_device()),
        zeros.to("cuda"),
        zeros.to(device=device, dtype=torch.float32),
        zeros.to(0),
        zeros.pin_memory(),
        zeros.new_empty(2, device=device),
        torch.empty_like(zeros, device="cuda"),
        torch.tensor([1.0], device=torch.cuda.current_device()),
        torch.fft.fftfreq(4, device="cuda"),
        getattr(torch.cuda, "FloatTensor")([1.0]),  # noqa: B009 - torch declares no such name
        torch.nn.Linear(2, 2, device="cuda").to("cuda:1").weight,
        torch.nn.Linear(2, 2).to(device=0).cuda(device).weight,
    ]
    torch.save(zeros, folder / "zeros")
    moved.append(torch.load(folder / "zeros", map_location="cuda"))
    for tensor in moved:
        assert tensor.device.type == "cpu"
        assert tensor.is_cuda
        assert tensor.type() == "torch.cuda.FloatTensor"
    assert zeros.type("torch.cuda.HalfTensor").dtype is torch.float16
    assert zeros.to(torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    with torch.device("cpu"):  # a TorchFunctionMode, under which the wrappers meet themselves
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"


def use_streams_generators_and_memory() -> None:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.device(0):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.current_stream().record_event(end)
    assert 0 < start.elapsed_time(end) < 60_000
    assert torch.cuda.memory_stats()["allocated_bytes.all.current"] == 0
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total

    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    torch.cuda.manual_seed(7)
    assert torch.equal(torch.rand(3), first)


def test_every_request_for_cuda_gets_the_cpu(tmp_path: Path) -> None:
    run_distributed(ask_for_cuda_in_every_way, 1, tmp_path)


def test_the_stand_ins_keep_time_seeds_and_books() -> None:
    run_distributed(use_streams_generators_and_memory, 1)


def test_a_script_runs_as_main_and_its_spawned_children_are_in_cpu_mode(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "sibling.py").write_text("")
    launcher = [sys.executable, "-m", "megatron_mergemix.megatron.cpu_mode"]
    done = run_command([*launcher, os.path.relpath(tmp_path / "script.py"), "--flag", "1"])
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == [
        "script as __main__",
        "through the manager",
        "script as __mp_main__",  # once: the pool asks for the script's class, the manager does not
        "(42, 'torch.cuda.FloatTensor')",
        "arguments ['--flag', '1']",
    ]


SAVES_AND_DIES = """
import os, signal
from megatron.core.dist_checkpointing.strategies import filesystem_async as saves

get = getattr(saves, "_get_write_results_queue", None) or saves.get_write_results_queue
queue = get()
queue.put("through the queue")
assert get() is queue
print(queue.get_nowait())
server = queue._manager._process.pid
same = open(f"/proc/{server}/cmdline").read() == open("/proc/self/cmdline").read()
print(server, "is a fork" if same else "is a fresh interpreter", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_queue_of_saves_is_served_by_a_fork_that_dies_with_its_rank(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SAVES_AND_DIES)
    launcher = [sys.executable, "-m", "megatron_mergemix.megatron.cpu_mode"]
    done = run_command([*launcher, str(tmp_path / "script.py")])
    said, last = done.stdout.splitlines()[-2:]
    server, kind = last.split(" ", 1)
    assert (said, kind) == ("through the queue", "is a fork")
    assert is_dead(int(server))


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "sys.exit(3)"])
def test_groups_that_a_script_leaves_are_taken_down_where_it_succeeded(
    tmp_path: Path, end: str
) -> None:
    (tmp_path / "script.py").write_text(f"""
import atexit, sys
import torch.distributed as dist
dist.init_process_group("gloo")
atexit.register(lambda: print("groups left:", dist.is_initialized()))
{end}
""")
    launcher = [sys.executable, "-m", "megatron_mergemix.megatron.cpu_mode"]
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = run_command([*launcher, str(tmp_path / "script.py")], env=one_rank)
    failed = end == "sys.exit(3)"  # others may wait for this rank: it goes without a word
    assert (done.returncode, done.stdout) == (3 * failed, f"groups left: {failed}\n")


def test_a_missing_script_is_a_clear_error() -> None:
    launcher = [sys.executable, "-m", "megatron_mergemix.megatron.cpu_mode"]
    assert "usage:" in run_command(launcher).stdout
    assert "nowhere.py does not exist" in run_command([*launcher, "nowhere.py"]).stdout
