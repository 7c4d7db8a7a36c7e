from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "make_patch.py"
ARGUMENTS = "megatron/training/arguments.py"

TREE = {
    ARGUMENTS: """\
def add_megatron_arguments(parser):
    parser = _add_first_args(parser)
    parser = _add_sft_args(parser)

    return parser


def parse_args():
    args = parser.parse_args()
    args.world_size = int(os.getenv("WORLD_SIZE", '1'))
    args.after = 1

    return args


def validate_args(args, defaults={}):

    # Temporary
    assert args
    return args
""",
    "pretrain_gpt.py": """\
from megatron.training import inprocess_restart, pretrain

if __name__ == "__main__":
    # Optionally
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)

    pretrain(store=store)
""",
    "pretrain_vlm.py": "pretrain()\n",
}
IMPORT = "    from megatron_mergemix.megatron_lm import hooks as mergemix  # megatron-mergemix"
INSERTED = {  # below which line of the patched file, what
    ARGUMENTS: [
        ("    parser = _add_sft_args(parser)", "    parser = mergemix.add_arguments(parser)"),
        (
            "    args.world_size = int(os.getenv(\"WORLD_SIZE\", '1'))",
            "    mergemix.after_parsing(args)",
        ),
        ("def validate_args(args, defaults={}):", "    mergemix.before_validation(args)"),
    ],
    "pretrain_gpt.py": [("    # Optionally", "    pretrain = mergemix.wrap_pretrain(pretrain)")],
}


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def write_tree(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "Megatron-LM"
    write_tree(folder, TREE)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "tree")
    return folder


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """The tool in a repository of its own, with an empty ``patches/``."""
    (tmp_path / "ours" / "patches").mkdir(parents=True)
    (tmp_path / "ours" / "tools").mkdir()
    return Path(shutil.copy(TOOL, tmp_path / "ours" / "tools"))


def run(tool: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refusal(tool: Path, tree: Path) -> str:
    """Return the one error of a refused tree, for which nothing may be written."""
    output = tool.parents[1] / "patches" / "new.patch"
    done = run(tool, tree, "--output", output)
    assert done.returncode == 1
    assert done.stdout == ""
    assert list(output.parent.iterdir()) == []
    (line,) = done.stderr.splitlines()
    return line


def test_the_patch_inserts_the_calls_and_nothing_else(tree: Path, tool: Path) -> None:
    patch = tool.parents[1] / "patches" / "tree.patch"
    assert run(tool, tree, "--output", patch).returncode == 0
    assert git(tree, "status", "--short") == ""
    git(tree, "apply", str(patch))
    for name, text in TREE.items():
        expected = text
        for above, call in INSERTED.get(name, []):
            call = f"{IMPORT}\n{call}  # megatron-mergemix"
            expected = expected.replace(f"{above}\n", f"{above}\n{call}\n")
        assert (tree / name).read_text() == expected
        compile(expected, name, "exec")
    git(tree, "apply", "-R", str(patch))
    assert git(tree, "status", "--short") == ""


def test_the_patch_shows_one_line_of_the_tree_on_either_side(tree: Path, tool: Path) -> None:
    patch = run(tool, tree).stdout
    context = [line for line in patch.splitlines() if line.startswith(" ")]
    assert len(context) == 2 * 4
    assert git(tree, "rev-parse", "HEAD").strip() in patch.splitlines()[0]


def test_every_script_with_the_line_is_patched(tree: Path, tool: Path) -> None:
    shutil.copy(tree / "pretrain_gpt.py", tree / "pretrain_mamba.py")
    files = [line for line in run(tool, tree).stdout.splitlines() if line.startswith("+++ ")]
    assert files == [f"+++ b/{ARGUMENTS}", "+++ b/pretrain_gpt.py", "+++ b/pretrain_mamba.py"]


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize(
    ("name", "anchor"),
    [
        (ARGUMENTS, "    parser = _add_sft_args(parser)"),
        (ARGUMENTS, "    args.world_size = int(os.getenv(\"WORLD_SIZE\", '1'))"),
        (ARGUMENTS, "def validate_args(args, defaults={}):"),
        (
            "pretrain_gpt.py",
            "    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)",
        ),
    ],
)
def test_a_tree_that_is_not_as_expected_is_refused_by_file_and_line(
    tree: Path, tool: Path, name: str, anchor: str, times: int
) -> None:
    assert anchor in TREE[name]
    (tree / name).write_text(TREE[name].replace(f"{anchor}\n", f"{anchor}\n" * times))
    error = refusal(tool, tree)
    assert str(tree / name) in error
    assert f"{times} times, expected once" in error
    assert anchor.split(" = ")[-1].strip() in error


def test_a_tree_that_is_patched_already_is_refused(tree: Path, tool: Path, tmp_path: Path) -> None:
    (tmp_path / "the.patch").write_text(run(tool, tree).stdout)
    git(tree, "apply", str(tmp_path / "the.patch"))
    assert "patched already" in refusal(tool, tree)


def test_a_folder_that_is_no_checkout_is_refused(tree: Path, tool: Path, tmp_path: Path) -> None:
    assert "is no git checkout" in refusal(tool, tmp_path / "nowhere")
    (tree / ARGUMENTS).unlink()
    assert f"{ARGUMENTS} does not exist" in refusal(tool, tree)


def test_the_check_finds_the_patch_of_the_commit(tree: Path, tool: Path) -> None:
    patches = tool.parents[1] / "patches"
    done = run(tool, tree, "--check")
    assert done.returncode == 1
    assert "has no patch for commit" in done.stderr

    (patches / "another.patch").write_text("for another commit\n")
    run(tool, tree, "--output", patches / "tree.patch")
    done = run(tool, tree, "--check")
    assert done.returncode == 0, done.stderr
    assert "tree.patch is right and applies" in done.stdout

    edited = (patches / "tree.patch").read_text().replace("# Optionally", "# Perhaps")
    (patches / "tree.patch").write_text(edited)
    done = run(tool, tree, "--check")
    assert done.returncode == 1
    assert "is not what this tool makes" in done.stderr
