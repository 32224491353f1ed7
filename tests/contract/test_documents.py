"""What the documents tell people to type, to open and to write is there, and works."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from deploypipe.algorithms import ALGORITHMS, AUTO
from deploypipe.algorithms.base import Problem, Statistics
from deploypipe.backends import BACKENDS
from deploypipe.cli.main import app
from deploypipe.count import MacTable
from deploypipe.graph import trace
from deploypipe.models.load import load_model
from deploypipe.runners import RUNNERS
from deploypipe.targets import list_targets
from tests.toys import TOYS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "profiles").glob("*.md")]
EACH = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
COMMANDS = typer.main.get_command(app).commands
PLACEHOLDER = re.compile(r"[A-Z.]+$|.*[/.]")  # NAME, FILE, board.toml, ./x


def code(text: str) -> list[str]:
    """Return every line of the fenced blocks, and every piece of code between backticks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    return [line for block in fenced for line in block.splitlines()] + [
        " ".join(part.split()) for part in re.findall(r"`([^`]+)`", rest)
    ]


def block(name: str, first: str) -> str:
    """Return the fenced block of a document that contains `first`."""
    return next(text for text in re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S) if first in text)


def wrong(line: str) -> list[str]:
    """Return what a command line names that does not exist."""
    _, command, *words = [*shlex.split(line, comments=True), "--help"]
    if command not in COMMANDS:
        return [] if command.startswith("-") else [command]
    known = {name for parameter in COMMANDS[command].params for name in parameter.opts + parameter.secondary_opts} | {"--help"}
    values = {"--algo": ALGORITHMS, "--target": list_targets(), "--metric": ("latency", "macs", "params")}
    found = [word for word in words if word.startswith("--") and word not in known]
    for option, value in pairwise(words):
        names = [] if PLACEHOLDER.match(value) else value.split(",")
        found += [f"{option} {name}" for name in names if option in values and name not in values[option]]
    return found


@EACH
def test_every_command_can_be_typed(path: Path) -> None:
    lines = [line.removeprefix("$ ") for line in code(path.read_text())]
    assert {line: wrong(line) for line in lines if line.startswith("deploypipe ") and wrong(line)} == {}


@EACH
def test_every_make_target_is_there(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    targets |= {f"bench-{script.stem}" for script in (ROOT / "benchmarks").glob("*.py")}
    asked = [line.split()[1] for line in code(path.read_text()) if re.match(r"make [a-z]", line)]
    assert set(asked) <= targets


@EACH
def test_every_link_leads_somewhere(path: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()) if "://" not in link]
    assert [link for link in links if link and not (path.parent / link).exists()] == []


def test_the_readme_names_every_algorithm_and_every_target() -> None:
    text = (ROOT / "README.md").read_text()
    rows = [
        cell for line in text.splitlines() if line.startswith("| `") for cell in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    assert sorted({AUTO, *ALGORITHMS} | set(list_targets())) == sorted(row for row in rows if not row.startswith("--"))


def test_the_model_in_the_readme_can_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(block("README.md", "def make"))
    loaded = load_model(f"{tmp_path / 'net.py'}:make")
    assert loaded.input_shape == (3, 64, 64)


def test_the_recipe_of_an_algorithm_makes_one() -> None:
    module = ModuleType("myscore")
    exec(block("CONTRIBUTING.md", "class MyScore"), module.__dict__)
    model, example = TOYS["plain"]()
    graph, table = trace(model, example), MacTable(multiple=1)
    problem = Problem(model, graph, table, 0.6 * table.predict(graph))
    plan = module.MyScore().plan(problem)
    assert 0 < table.predict(graph, plan) <= problem.budget
    name, kept = next((name, kept) for name, kept in plan.keep.items() if len(kept) < graph.group(name).size)
    scores = module.MyScore().score(graph.group(name), Statistics(problem))
    assert set(kept) == set(scores.topk(len(kept)).indices.tolist())


def test_the_recipes_rows_are_of_the_tables() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name, place in re.findall(r'^    "([a-z0-9]+)": "(deploypipe\.[^"]+)",$', text, re.M):
        assert name == "mine" or {**BACKENDS, **RUNNERS, **ALGORITHMS}[name] == place
