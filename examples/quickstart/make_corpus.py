"""Write four domains of text that every machine with this project has, as JSON lines.

    python examples/quickstart/make_corpus.py OUT [--seven]

code.jsonl     sources of Python's standard library
prose.jsonl    the language reference that ``help()`` shows
science.jsonl  docstrings of numpy and scipy
math.jsonl     arithmetic with worked steps, generated here

and three more with --seven:

headers.jsonl  C++ headers of torch
readmes.jsonl  descriptions of installed packages, mostly Markdown
tables.jsonl   numbers, from the data sets of scikit-learn

The domains are as unequal in size as they come. The same interpreter, numpy and scipy give the
same bytes; of the three more, torch, scikit-learn and all that is installed decide.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

CODE_BYTES = 4_000_000
SCIENCE_BYTES = 3_000_000
MATH_BYTES = 1_000_000
HEADER_BYTES = 2_000_000

# A document ends before a paragraph that starts at the margin once it has SOON characters, and
# before any paragraph or, at worst, line once it would have MOST.
SOON = 2_000
MOST = 8_000
# The smallest domain is cut finer: the more documents, the closer a held-out share is to its size.
PROSE_SOON = 1_000

# pydoc_data is the prose domain; tests, tables and other people's packages say little of Python.
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for code, prose, science, math .jsonl")
    parser.add_argument("--seven", action="store_true", help="also headers, readmes, tables .jsonl")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    domains = {"code": code, "prose": prose, "science": science, "math": math}
    if args.seven:
        domains |= {"headers": headers, "readmes": readmes, "tables": tables}
    for name, documents in domains.items():
        write(out / f"{name}.jsonl", documents())


def write(path: Path, documents: Iterable[str]) -> None:
    texts = list(dict.fromkeys(documents))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    os.replace(temporary, path)
    size = sum(len(text.encode()) for text in texts)
    print(f"{path}: {len(texts)} documents, {size / 1e6:.2f} MB")


# ---- text that is there already ----


def code() -> Iterator[str]:
    for path in shuffled(python_files(Path(sysconfig.get_path("stdlib"))), CODE_BYTES):
        yield from cut(read(path))


def prose() -> Iterator[str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        # Topics repeat parts of each other; a repeated paragraph would be in both the training
        # and the held-out part.
        fresh = {text.strip("\n"): None for text in topics[name].split("\n\n")}
        yield from cut("\n\n".join(text for text in fresh if text not in seen), PROSE_SOON)
        seen.update(fresh)


def science() -> Iterator[str]:
    roots = [package(name) for name in ("numpy", "scipy")]
    files = [path for root in roots for path in python_files(root)]
    seen: set[str] = set()
    size = 0
    for path in shuffled(files):
        docstrings = [text for text in docstrings_of(read(path)) if text not in seen]
        seen.update(docstrings)
        for document in cut("\n\n".join(docstrings)):
            size += len(document)
            if size > SCIENCE_BYTES:
                return
            yield document


def headers() -> Iterator[str]:
    for path in shuffled(sorted(package("torch").rglob("include/**/*.h")), HEADER_BYTES):
        yield from cut(read(path))


def readmes() -> Iterator[str]:
    seen: set[str] = set()
    found = {found.metadata["Name"]: found for found in importlib.metadata.distributions()}
    for name in sorted(found):
        text = found[name].metadata.get_payload()  # without the fields before it
        fresh = [part for part in str(text).split("\n\n") if part not in seen]
        yield from cut("\n\n".join(fresh))
        seen.update(fresh)


def tables() -> Iterator[str]:
    for path in sorted(package("sklearn").rglob("datasets/**/*.csv")):
        yield from cut(read(path))


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is installed with this project"
    assert spec.origin is not None, f"{name} is no namespace package"
    return Path(spec.origin).parent


def python_files(root: Path) -> list[Path]:
    return sorted(
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )


def shuffled(files: list[Path], most_bytes: float = float("inf")) -> Iterator[Path]:
    """Yield the files in an order that a limit does not turn into an alphabet."""
    size = 0
    for path in random.Random(0).sample(files, len(files)):
        size += path.stat().st_size
        if size <= most_bytes:
            yield path


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # a few old sources declare another encoding


def docstrings_of(source: str) -> Iterator[str]:
    """Yield the docstrings of a module, longer ones only: short ones are rarely sentences."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 200:
                # Escapes in a docstring may make half a surrogate pair, which no file can hold.
                whole = text.encode(errors="replace").decode()
                yield f"{getattr(node, 'name', '')}\n{whole}".lstrip()


def cut(text: str, soon: int = SOON) -> Iterator[str]:
    """Yield a text as documents of ``soon`` to MOST characters; a short rest joins the last."""
    documents = [""]
    for piece in pieces(text):
        at_margin = not piece[:1].isspace()
        size = len(documents[-1])
        if size >= soon and (at_margin or size + len(piece) > MOST):
            documents.append("")
        documents[-1] += piece
    if len(documents) > 1 and len(documents[-1]) < soon // 2:
        rest = documents.pop()
        documents[-1] += rest
    yield from (document for document in documents if document.strip())


def pieces(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text, long ones line by line; together they are the text."""
    for paragraph in text.split("\n\n"):
        whole = paragraph + "\n\n"
        yield from [whole] if len(whole) < MOST - SOON else whole.splitlines(keepends=True)


# ---- arithmetic ----


def math() -> Iterator[str]:
    rng = random.Random(1)
    kinds: tuple[Callable[[random.Random], str], ...] = (
        addition,
        subtraction,
        multiplication,
        division,
        equation,
        divisor,
    )
    size = 0
    while size < MATH_BYTES:
        problems = ""
        while len(problems) < SOON:
            problems += rng.choice(kinds)(rng) + "\n"
        size += len(problems)
        yield problems


def addition(rng: random.Random) -> str:
    a, b = rng.randint(100, 9999), rng.randint(100, 9999)
    tens, ones = b // 10 * 10, b % 10
    return (
        f"Problem: What is {a} plus {b}?\n"
        f"Split {b}: {b} = {tens} + {ones}\n"
        f"Add the tens: {a} + {tens} = {a + tens}\n"
        f"Add the ones: {a + tens} + {ones} = {a + b}\n"
        f"Answer: {a + b}\n"
    )


def subtraction(rng: random.Random) -> str:
    b, a = sorted((rng.randint(100, 9999), rng.randint(100, 9999)))
    hundreds, rest = b // 100 * 100, b % 100
    return (
        f"Problem: Take {b} away from {a}.\n"
        f"Split {b}: {b} = {hundreds} + {rest}\n"
        f"Take the hundreds: {a} - {hundreds} = {a - hundreds}\n"
        f"Take the rest: {a - hundreds} - {rest} = {a - b}\n"
        f"Answer: {a - b}\n"
    )


def multiplication(rng: random.Random) -> str:
    a, b = rng.randint(12, 999), rng.randint(11, 99)
    tens, ones = b // 10 * 10, b % 10
    return (
        f"Problem: Multiply {a} by {b}.\n"
        f"Split {b}: {a} * {b} = {a} * {tens} + {a} * {ones}\n"
        f"Multiply by the tens: {a} * {tens} = {a * tens}\n"
        f"Multiply by the ones: {a} * {ones} = {a * ones}\n"
        f"Add both: {a * tens} + {a * ones} = {a * b}\n"
        f"Answer: {a * b}\n"
    )


def division(rng: random.Random) -> str:
    a, b = rng.randint(100, 9999), rng.randint(3, 60)
    quotient, rest = divmod(a, b)
    return (
        f"Problem: Divide {a} by {b} with remainder.\n"
        f"The largest multiple: {b} * {quotient} = {b * quotient}\n"
        f"What is left: {a} - {b * quotient} = {rest}\n"
        f"Check: {a} = {b} * {quotient} + {rest}\n"
        f"Answer: {quotient} remainder {rest}\n"
    )


def equation(rng: random.Random) -> str:
    a, x, b = rng.randint(2, 30), rng.randint(2, 99), rng.randint(1, 500)
    c = a * x + b
    return (
        f"Problem: Solve the equation for x: {a} * x + {b} = {c}\n"
        f"Subtract {b} on both sides: {a} * x = {c} - {b} = {c - b}\n"
        f"Divide both sides by {a}: x = {c - b} / {a} = {x}\n"
        f"Check: {a} * {x} + {b} = {a * x} + {b} = {c}\n"
        f"Answer: {x}\n"
    )


def divisor(rng: random.Random) -> str:
    common = rng.randint(2, 40)
    a, b = (common * rng.randint(3, 60) for _ in range(2))
    lines = [f"Problem: Find the greatest common divisor of {a} and {b}.\n"]
    while b:
        lines.append(f"Divide {a} by {b}: {a} = {b} * {a // b} + {a % b}\n")
        a, b = b, a % b
    return "".join(lines) + f"The remainder is zero, so {a} is the last divisor.\nAnswer: {a}\n"


if __name__ == "__main__":
    main()
