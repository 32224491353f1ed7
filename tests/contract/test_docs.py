"""`docs/algorithms.md` says of every method what its own file says; `pytest --update-golden` writes it."""

from pathlib import Path
from typing import Any

import pytest

from deploypipe.algorithms import ALGORITHMS, explain

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms.md"
BEGIN, END = "<!-- methods: written by `pytest --update-golden` from their own files -->", "<!-- end of methods -->"


def allowed(option: dict[str, Any]) -> str:
    ends = [f"from {option['low']:g}" if option["low"] is not None else "", f"to {option['high']:g}" if option["high"] else ""]
    return ", ".join(option["choices"]) or " ".join(end for end in ends if end)


def section(name: str) -> str:
    record = explain(name)
    facts = f"*{record['taxonomy']}. Needs: {', '.join(record['needs']) or 'only the weights'}.*"
    rows = [
        f"| `{option['name'].rstrip('_')}` | {option['default']} | {allowed(option)} | {option['meaning']} |"
        for option in record["options"]
    ]
    table = ["| option | default | allowed | meaning |", "| --- | --- | --- | --- |", *rows] if rows else []
    return "\n\n".join(part for part in (f"### {name}", facts, record["about"], "\n".join(table)) if part)


def test_every_method_is_described_as_it_is(request: pytest.FixtureRequest) -> None:
    expected = "\n\n".join(section(name) for name in sorted(ALGORITHMS))
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    found, _, after = rest.partition(END)
    if request.config.getoption("--update-golden"):
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{expected}\n\n{END}{after}")
        return
    assert found.strip() == expected, "run `pytest --update-golden tests/contract/test_docs.py`, then read the difference"


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_method_names_its_deviations(name: str) -> None:
    about = explain(name)["about"]
    assert "arXiv:" in about
    assert "Deviation" in about
