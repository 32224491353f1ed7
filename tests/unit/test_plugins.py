"""Plug-ins of other packages: one that cannot be loaded is named, and is not our bug."""

import importlib.metadata

import pytest

from deploypipe import doctor, plugins
from deploypipe.algorithms import algorithms
from deploypipe.backends import BACKENDS, ENTRY_POINTS
from deploypipe.errors import TargetError, UsageError


@pytest.fixture(params=["no_such_module_anywhere:Thing", "json:NoSuchThing"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def installed(group: str) -> list[importlib.metadata.EntryPoint]:
        return [importlib.metadata.EntryPoint("broken", request.param, group)]

    monkeypatch.setattr(plugins, "entry_points", installed)
    monkeypatch.setattr(doctor, "_PACKAGES", {})
    return str(request.param)


def test_it_is_named_with_the_reason_and_the_way_out(broken: str) -> None:
    with pytest.raises(TargetError, match="backend 'broken' of another package cannot be loaded") as caught:
        plugins.resolve("broken", BACKENDS, ENTRY_POINTS, what="backend", error=TargetError)
    assert caught.value.at == broken
    assert "uninstall" in caught.value.fix


def test_doctor_goes_on_without_it(broken: str) -> None:
    states = {state.name: state for state in doctor.diagnose().backends}
    assert not states["broken"].ready
    assert "cannot be loaded" in states["broken"].reason
    assert len(states) == len(BACKENDS) + 1


def test_our_own_failures_stay_what_they_are() -> None:
    with pytest.raises(AttributeError):
        plugins.resolve("own", {"own": "json:NoSuchThing"}, ENTRY_POINTS, what="backend")
    with pytest.raises(UsageError, match="unknown"):
        plugins.resolve("none", {}, ENTRY_POINTS, what="algorithm")
    assert algorithms()
