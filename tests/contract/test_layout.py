"""The house rules that a tool can check: sizes, depth, names, who prints, who starts processes."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from deploypipe.algorithms import ALGORITHMS
from deploypipe.backends import BACKENDS
from deploypipe.runners import RUNNERS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deploypipe"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef
WORDS_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "core", "lib"}


LONGER = {"types.py": 400}  # one file for all values that flow: splitting it would only hide where they are


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def n_lines(function: Function) -> int:
    """Lines of a function without its docstring: explaining is not punished."""
    body = function.body
    docstring = ast.get_docstring(function, clean=False) is not None
    explained = body[0].end_lineno - body[0].lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - explained


def test_a_file_fits_in_the_head() -> None:
    lines = {name(path): len(path.read_text().splitlines()) for path in FILES}
    assert {file: n for file, n in lines.items() if n > LONGER.get(Path(file).name, 300)} == {}


def test_a_function_fits_on_a_screen() -> None:
    assert {f"{name(path)}: {f.name}": n_lines(f) for path in FILES for f in functions(path) if n_lines(f) > 40} == {}


def test_a_file_is_called_after_what_it_does() -> None:
    assert [name(path) for path in FILES if path.stem in WORDS_THAT_SAY_NOTHING] == []
    assert [name(path) for path in FILES if len(path.relative_to(PACKAGE).parts) > 2] == []
    unsaid = [name(path) for path in FILES if not ast.get_docstring(tree(path))]
    assert unsaid == [], "a module says its purpose in its first line"


def test_nothing_is_left_to_do() -> None:
    assert [name(path) for path in FILES if re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text())] == []


def test_only_the_command_line_prints_asks_and_exits() -> None:
    library = [path for path in FILES if path.parent.name != "cli"]
    calls = {name(path): {ast.unparse(n.func) for n in ast.walk(tree(path)) if isinstance(n, ast.Call)} for path in library}
    speaking = {"sys.exit", "exit", "quit", "print", "input"}
    assert {file: called & speaking for file, called in calls.items() if called & speaking} == {}


def test_the_environment_decides_nothing_in_the_library() -> None:
    """But for the cache folder, noise that the user accepts, and what a runner hands on to the process that it starts."""
    library = [path for path in FILES if path.parent.name not in {"cli", "runners"} and path.name != "targets.py"]
    assert [name(path) for path in library if re.search(r"os\.environ\b|os\.getenv\b", path.read_text())] == []


@pytest.mark.parametrize("folder", ["profiler", "allocation", "latency", "pipeline"])
def test_no_stage_knows_a_runtime(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        assert not [backend for backend in BACKENDS if backend in path.read_text().lower()], path.name


@pytest.mark.parametrize("folder", ["profiler", "allocation", "latency", "pipeline"])
def test_no_stage_knows_a_way_to_a_device(folder: str) -> None:
    words = re.compile(rf"\b({'|'.join(set(RUNNERS) - {'local'})})\b", re.IGNORECASE)  # "local" is also an ordinary word
    for path in (PACKAGE / folder).glob("*.py"):
        assert not words.findall(path.read_text()), path.name


def test_every_algorithm_and_runner_is_kept_apart_from_its_likes() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    apart = [set(contract["modules"]) for contract in contracts if contract["type"] == "independence"]
    assert apart == [{place.partition(":")[0] for place in table.values()} for table in (ALGORITHMS, RUNNERS)]


def test_the_top_level_stays_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 30, "what belongs to one question lies in the folder named after it"


def test_the_top_level_is_as_described() -> None:
    described = (ROOT / "docs" / "architecture.md").read_text()
    for path in FILES:
        if path.stem != "__init__" and path.parent.name not in {"algorithms", "backends", "runners", "cli"}:
            assert f"`{path.relative_to(PACKAGE).as_posix()}`" in described, (
                f"docs/architecture.md does not say where {path.name} belongs"
            )


def test_architecture_is_short() -> None:
    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) <= 180
