"""Checks before any work: are the files there, and do the experts fit the base?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_mergemix.checkpoint.index import (
    BytesEntry,
    CheckpointIndex,
    Chunk,
    TensorEntry,
    is_model_entry,
)
from megatron_mergemix.errors import CheckpointError

VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Tensors whose dim 0 Megatron pads to a multiple that depends on the parallel layout."""

MAX_NAMED = 5
"""Problems of one kind that are named before "and N more"."""


def check_intact(index: CheckpointIndex) -> None:
    """Check that every file of the checkpoint is there and long enough; reads no data.

    Raises:
        CheckpointError: names each file that is missing, or shorter than its last entry needs,
            with both lengths.
    """
    needed: dict[str, int] = {}
    places: list[Chunk | BytesEntry] = [*index.bytes_entries.values()]
    places += [chunk for tensor in index.tensors.values() for chunk in tensor.chunks]
    for place in places:
        end = place.file_offset + place.length
        needed[place.file] = max(end, needed.get(place.file, 0))
    problems = []
    for file, expected in sorted(needed.items()):
        path = index.path / file
        if not path.is_file():
            problems.append(f"{file} is missing")
        elif (length := path.stat().st_size) < expected:
            problems.append(f"{file} has {length} bytes, expected at least {expected}")
    if problems:
        raise CheckpointError(
            f"Checkpoint {index.path} is damaged: {some(problems)}. Copy it again or name "
            "another save."
        )


def check_compatible(
    base: CheckpointIndex, experts: Mapping[str, CheckpointIndex], vocab_size: int | None = None
) -> None:
    """Check that every expert has the base's model tensors: same names, shapes and dtypes.

    The parallel layout may differ. Entries stored as bytes may differ too, but not in a single
    character of their names: nothing else tells that the metadata is damaged there.

    Args:
        base: what the experts are compared with.
        experts: name -> checkpoint.
        vocab_size: tokens of the tokenizer; if given, vocabulary tensors may differ in the
            number of padding rows beyond it.

    Raises:
        CheckpointError: lists what differs, expert by expert.
    """
    problems = [
        problem
        for name, expert in experts.items()
        for problem in _differences(base, name, expert, vocab_size)
    ]
    if problems:
        raise CheckpointError("\n".join(problems))


def padded_differently(base: CheckpointIndex, experts: Iterable[CheckpointIndex]) -> list[str]:
    """Return the vocabulary tensors whose number of padding rows is not the same everywhere."""
    ours = base.model_tensors()
    return sorted(
        {
            name
            for expert in experts
            for name, tensor in expert.model_tensors().items()
            if name in ours
            and tensor.shape != ours[name].shape
            and _is_padding(name, ours[name], tensor)
        }
    )


def _differences(
    base: CheckpointIndex, name: str, expert: CheckpointIndex, vocab_size: int | None
) -> list[str]:
    ours, theirs = base.model_tensors(), expert.model_tensors()
    common = [tensor for tensor in ours if tensor in theirs]
    shapes = [tensor for tensor in common if ours[tensor].shape != theirs[tensor].shape]
    padded = [tensor for tensor in shapes if _is_padding(tensor, ours[tensor], theirs[tensor])]
    shapes = [tensor for tensor in shapes if tensor not in padded]
    if vocab_size is not None:
        rows = {tensor: min(ours[tensor].shape[0], theirs[tensor].shape[0]) for tensor in padded}
        shapes += [tensor for tensor in padded if rows[tensor] < vocab_size]
        padded = []
    dtypes = [tensor for tensor in common if ours[tensor].dtype != theirs[tensor].dtype]

    def compare(tensors: list[str], show: Callable[[TensorEntry], object]) -> str:
        return some(
            [f"{t} is {show(theirs[t])} in it, {show(ours[t])} in the base" for t in tensors]
        )

    who = f"Expert {name!r} ({expert.path})"
    problems = []
    if missing := [tensor for tensor in ours if tensor not in theirs]:
        problems.append(f"{who} lacks tensors of the base: {some(missing)}.")
    if added := [tensor for tensor in theirs if tensor not in ours]:
        problems.append(f"{who} has tensors that the base lacks: {some(added)}.")
    if shapes:
        problems.append(f"{who} has other shapes: {compare(shapes, lambda t: t.shape)}.")
    if dtypes:
        problems.append(f"{who} has other dtypes: {compare(dtypes, lambda t: t.dtype)}.")
    if problems:
        problems[-1] += " All experts must be trained from the base."
    entries = (set(filter(is_model_entry, index.bytes_entries)) for index in (base, expert))
    if misnamed := _misnamed(*entries):
        problems.append(
            f"{who} has other names: {some(misnamed)}. The .metadata of one of them is damaged; "
            "copy it again."
        )
    if padded:
        problems.append(
            f"{who} pads its vocabulary to another number of rows: "
            f"{compare(padded, lambda t: f'{t.shape[0]} rows')}. Megatron pads to a multiple of "
            "make_vocab_size_divisible_by x tensor parallel size: train base and experts with "
            "settings that give the same number."
        )
    return problems


def _misnamed(ours: set[str], theirs: set[str]) -> list[str]:
    """Return what differs from a name of the base in one character."""
    known = {(at, n[:at], n[at + 1 :]): n for n in ours - theirs for at in range(len(n))}
    return [
        f"{name!r} in it, {known[at, name[:at], name[at + 1 :]]!r} in the base"
        for name in sorted(theirs - ours)
        for at in range(len(name))
        if (at, name[:at], name[at + 1 :]) in known
    ]


def _is_padding(name: str, ours: TensorEntry, theirs: TensorEntry) -> bool:
    is_vocabulary = any(name == v or name.endswith("." + v) for v in VOCABULARY_TENSORS)
    return is_vocabulary and ours.shape[1:] == theirs.shape[1:]


def some(items: Sequence[str]) -> str:
    """Return the first few of ``items`` for a message, and how many more there are."""
    more = f", and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more
