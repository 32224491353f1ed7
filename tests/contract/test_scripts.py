"""What runs on a device: scripts that need no more than an old Python, and a shell script."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import deploypipe

PACKAGE = Path(deploypipe.__file__).parent
PUSHED = ("*_measure.py", "stopwatch.py", "trt_flags.py", "trt_answers.py", "trt_python.py")
SCRIPTS = [path for name in PUSHED for path in sorted((PACKAGE / "backends").glob(name))]
NEWER = r"strict=True|\.removeprefix\(|\.removesuffix\(|^\s*match |itertools\.pairwise|math\.lcm"  # than Python 3.8


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_measuring_script_runs_on_python_3_8(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text, feature_version=(3, 8))
    assert not re.findall(NEWER, text, re.MULTILINE)
    assert "from __future__ import annotations" in text, "types are written as newer Pythons have them"
    evaluated = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)]
    assert not [
        ast.unparse(node)
        for node in evaluated
        if re.match(r"(dict|list|tuple|set|Sequence|Mapping|Callable)\[", ast.unparse(node.value))
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_measuring_script_imports_nothing_of_ours_but_the_stopwatch(path: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    assert "deploypipe" not in names
    assert "psutil" not in names


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_the_description_of_a_device_is_read_by_every_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    argv = [shell, *(["sh"] if shell == "busybox" else []), str(PACKAGE / "runners" / "describe.sh"), "/no/python", "numpy"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30, cwd=tmp_path)
    assert done.stderr == ""
    assert {"arch", "kernel"} <= {line.partition("\t")[0] for line in done.stdout.splitlines()}
