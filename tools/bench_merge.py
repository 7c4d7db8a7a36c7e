"""Measure ``mergemix merge`` against what the machine can do, in one run.

    python tools/bench_merge.py --folder /tmp/bench --size 0.5e9 --mergekit ~/mk/bin/mergekit-yaml

Makes GPT checkpoints in bf16, merges a base and three experts by task arithmetic in a process of
its own, and prints whole-process time, time without start-up, bytes per second and peak anonymous
memory next to the bounds: ``cat`` of three inputs and ``cp`` of one, and memcpy. The page cache is
warm. With ``--mergekit`` it merges Hugging Face models of the same size with mergekit too.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_mergemix.checkpoint.archive_writer import TensorArchive
from megatron_mergemix.checkpoint.index import CheckpointIndex, Chunk, TensorEntry
from megatron_mergemix.checkpoint.metadata_writer import metadata_bytes

EXPERTS = ("a", "b", "c")
VOCABULARY = 32768


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a llama-like GPT of about that many parameters."""
    hidden = 2048 if parameters > 2e8 else 256
    layers = max(1, round((parameters - VOCABULARY * hidden) / (12 * hidden**2)))
    layer = "decoder.layers."
    return {
        "embedding.word_embeddings.weight": (VOCABULARY, hidden),
        layer + "self_attention.linear_qkv.weight": (layers, 3 * hidden, hidden),
        layer + "self_attention.linear_proj.weight": (layers, hidden, hidden),
        layer + "self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        layer + "mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        layer + "mlp.linear_fc1.weight": (layers, 5 * hidden, hidden),
        layer + "mlp.linear_fc2.weight": (layers, hidden, 3 * hidden),
        "decoder.final_layernorm.weight": (hidden,),
    }


def random_bf16(count: int, seed: int) -> Iterator[bytes]:
    """Yield blocks of normally distributed bf16 numbers."""
    rng = np.random.default_rng(seed)
    block = (rng.standard_normal(1 << 20, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    data = block.astype(np.uint16).tobytes()
    for start in range(0, 2 * count, len(data)):
        yield data[: min(len(data), 2 * count - start)]


def write_megatron(folder: Path, parameters: float, seed: int, moments: bool) -> None:
    """Write a torch_dist checkpoint, one chunk per layer, in two files."""
    folder.mkdir(parents=True)
    tensors: dict[str, TensorEntry] = {}
    wanted = {name: (shape, "bfloat16") for name, shape in shapes(parameters).items()}
    if moments:
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            for name, shape in shapes(parameters).items():
                wanted[f"optimizer.state.{kind}.{name}"] = (shape, "float32")
    with (folder / "__0_0.distcp").open("wb") as one, (folder / "__0_1.distcp").open("wb") as two:
        for number, (name, (shape, dtype)) in enumerate(wanted.items()):
            chunks = []
            for layer in range(shape[0] if "layers" in name else 1):
                offsets = (
                    (layer, *(0 for _ in shape[1:])) if "layers" in name else (0,) * len(shape)
                )
                sizes = (1, *shape[1:]) if "layers" in name else shape
                file = one if number % 2 else two
                archive, start = TensorArchive(dtype, sizes), file.tell()
                before, length = archive.lengths()
                crc = 0
                file.seek(start + before)
                for block in random_bf16(archive.num_bytes // 2, seed + layer):
                    file.write(block)
                    crc = zlib.crc32(block, crc)
                head, tail = archive.frame(crc)
                file.write(tail)
                file.seek(start)
                file.write(head)
                file.seek(start + length)
                chunks.append(Chunk(offsets, sizes, Path(file.name).name, start, length))
            tensors[name] = TensorEntry(shape, dtype, tuple(chunks))
    (folder / ".metadata").write_bytes(metadata_bytes(CheckpointIndex(folder, None, tensors, {})))
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(config))


def write_hugging_face(folder: Path, parameters: float, seed: int) -> None:
    """Write a llama model with as many parameters as :func:`write_megatron`."""
    folder.mkdir(parents=True)
    megatron = shapes(parameters)
    layers, hidden = megatron["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
    tensors = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors |= {at + f"self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        tensors |= {at + f"mlp.{n}_proj.weight": (8 * hidden // 3, hidden) for n in ("gate", "up")}
        tensors[at + "mlp.down_proj.weight"] = (hidden, 8 * hidden // 3)
        tensors |= {at + f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in random_bf16(end // 2, seed):
            file.write(block)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


class Watched:
    """A process and the most anonymous memory that it and its children had at once."""

    def __init__(self, command: list[str]) -> None:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.peak = 0
        watcher = threading.Thread(target=self._watch, args=(process,))
        watcher.start()
        output, _ = process.communicate()
        self.seconds = time.perf_counter() - started
        self.output = output.decode()
        watcher.join()
        if process.returncode:
            raise SystemExit(f"{command} failed:\n{self.output}")

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            self.peak = max(self.peak, _anonymous(process.pid))
            time.sleep(0.01)


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = re.search(r"RssAnon:\s+(\d+) kB", status)
    return (int(own[1]) * 1024 if own else 0) + sum(_anonymous(int(child)) for child in children)


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each of several calls, shortest first."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)


def report(what: str, seconds: list[float], moved: float, note: str = "") -> None:
    """Print minimum, median and bytes per second."""
    low, middle = min(seconds), statistics.median(seconds)
    print(f"{what:44} {low:8.3f} {middle:8.3f} {moved / low / 1e9:8.2f}  {note}", flush=True)


def merge(folder: Path, options: list[str], repeats: int) -> tuple[list[float], list[float], int]:
    """Return whole-process seconds, seconds without start-up, and peak anonymous bytes."""
    whole, net, peak = [], [], 0
    for _ in range(repeats):
        command = [sys.executable, "-m", "megatron_mergemix", "merge", "--overwrite"]
        command += ["--method", "task_arithmetic", "--scale", "0.9"]
        command += ["--base", str(folder / "base"), "--output", str(folder / "out")]
        for name in EXPERTS:
            command += ["--expert", f"{folder / name}=0.3"]
        shutil.rmtree(folder / "out", ignore_errors=True)
        done = Watched([*command, *options])
        found = re.search(r"in ([0-9.]+) s", done.output)
        assert found is not None
        whole.append(done.seconds)
        net.append(float(found[1]))
        peak = max(peak, done.peak)
    return whole, net, peak


def bounds(folder: Path, repeats: int, moved: float) -> list[float]:
    """Print what ``cat`` and ``cp`` take for the same bytes; return it, plain and with fsync."""
    cat = " ".join(f"{folder / name}/*.distcp" for name in EXPERTS)
    copy = f"cat {cat} > /dev/null; rm -rf {folder}/copy; mkdir {folder}/copy; "
    copy += f"cp {folder}/base/*.distcp {folder}/copy"

    def run(text: str) -> Callable[[], object]:
        return lambda: subprocess.run(["sh", "-c", text], check=True)

    plain = timed(run(copy), repeats)
    report("bound: cat 3, cp 1", plain, moved)
    synced = timed(run(copy + f"; sync {folder}/copy/*"), repeats)
    report("bound: the same with fsync", synced, moved)
    shutil.rmtree(folder / "copy")
    source = np.ones(1 << 28, dtype=np.uint8)
    target = np.empty_like(source)
    report("memcpy of 0.27 GB", timed(lambda: np.copyto(target, source), repeats), len(source))
    return [min(plain), min(synced)]


def mergekit(program: str, folder: Path, parameters: float, repeats: int, moved: float) -> None:
    """Print what mergekit takes for Hugging Face models of the same size."""
    models = folder / "hf"
    for number, name in enumerate(("base", *EXPERTS)):
        if not (models / name).exists():
            write_hugging_face(models / name, parameters, number)
    experts = [{"model": str(models / n), "parameters": {"weight": 0.3}} for n in EXPERTS]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "base"),
        "models": experts,
        "parameters": {"lambda": 0.9, "normalize": False},
        "dtype": "bfloat16",
    }
    (folder / "mergekit.yml").write_text(json.dumps(recipe))  # JSON is YAML
    seconds, peak = [], 0
    for _ in range(repeats):
        shutil.rmtree(folder / "hf_out", ignore_errors=True)
        done = Watched([program, str(folder / "mergekit.yml"), str(folder / "hf_out")])
        seconds.append(done.seconds)
        peak = max(peak, done.peak)
    report("mergekit task_arithmetic bf16, whole", seconds, moved, f"{peak / 1e9:.2f} GB anonymous")


def main() -> None:
    """Make the checkpoints that are missing, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="made if missing, and kept")
    parser.add_argument("--size", type=float, default=0.5e9, help="parameters (default: 0.5e9)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--moments", action="store_true", help="with optimizer state beside")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="mergekit-yaml, to compare")
    options = parser.parse_args()
    kind = f"{options.size:.3g}{'_moments' if options.moments else ''}"
    folder: Path = options.folder / kind
    for number, name in enumerate(("base", *EXPERTS)):
        if not (folder / name).exists():
            write_megatron(folder / name, options.size, number, options.moments)
    parameters = sum(int(np.prod(shape)) for shape in shapes(options.size).values())
    moved = 5 * 2 * parameters
    print(f"{parameters:,} parameters; base + 3 experts -> 1: {moved / 1e9:.2f} GB moved")
    print(f"{'':44} {'min s':>8} {'median s':>8} {'GB/s':>8}")
    # Files that hold optimizer state too are no bound for a merge that skips it.
    limits = [] if options.moments else bounds(folder, options.repeats, moved)
    torch = [sys.executable, "-c", "import torch"]
    imports = timed(lambda: subprocess.run(torch, check=True), options.repeats)
    report("import torch", imports, 0)
    for arguments in ([], ["--no-verify"], ["--no-verify", "--workers", "2"]):
        whole, net, peak = merge(folder, arguments, options.repeats)
        what = " ".join(["mergemix merge", *arguments])
        report(f"{what}, whole", whole, moved, f"{peak / 1e9:.2f} GB anonymous")
        start = min(w - n for w, n in zip(whole, net, strict=True))
        shares = " / ".join(f"{limit / min(net):.0%}" for limit in limits)
        note = f"start-up {start:.2f} s" + (f", {shares} of the bounds" if shares else "")
        report("  without start-up, fsync included", net, moved, note)
    if options.mergekit:
        mergekit(options.mergekit, options.folder, options.size, options.repeats, moved)


if __name__ == "__main__":
    main()
