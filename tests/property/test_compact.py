"""Whatever channels go: the compacted model computes what the masked model computes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import EXACT, TOYS

from deploypipe.compact import compact, difference, mask, run
from deploypipe.graph import trace
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph

MADE = {name: make() for name, make in TOYS.items()}
TRACED = {name: (model, example, trace(model, example)) for name, (model, example) in MADE.items()}


@st.composite
def plans(draw: st.DrawFn, graph: Graph) -> KeepPlan:
    keep = {}
    for group in graph.prunable:
        if draw(st.booleans()) or draw(st.booleans()):
            channels = draw(st.sets(st.integers(0, group.size - 1), min_size=1, max_size=group.size))
            keep[group.name] = tuple(sorted(channels))
    return KeepPlan(keep, graph.fingerprint)


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_compacted_equals_masked(name: str, data: st.DataObject) -> None:
    model, example, graph = TRACED[name]
    plan = data.draw(plans(graph))
    small = compact(model, graph, plan, check=False)
    assert difference(run(mask(model, graph, plan), example), run(small, example)) <= 1e-5


@pytest.mark.parametrize("name", sorted(set(TOYS) - set(EXACT)))
@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_models_with_norms_across_channels_compact_and_run(name: str, data: st.DataObject) -> None:
    model, example, graph = TRACED[name]
    plan = data.draw(plans(graph))
    small = compact(model, graph, plan)
    assert [t.shape for t in run(small, example)] == [t.shape for t in run(model, example)]


@pytest.mark.parametrize("name", TOYS)
def test_cutting_twice_equals_cutting_once(name: str) -> None:
    """Dropping set A and then set B gives the same weights as dropping A and B at once."""
    model, example, graph = TRACED[name]
    first = {g.name: tuple(range(1, g.size)) for g in graph.prunable if g.size > 2}
    both = {g.name: tuple(range(1, g.size - 1)) for g in graph.prunable if g.size > 2}
    half = compact(model, graph, KeepPlan(first))
    again = trace(half, example)
    then = {g.name: tuple(range(g.size - 1)) for g in again.groups if g.name in first and not g.fixed}
    assert set(then) == set(first)
    twice, once = compact(half, again, KeepPlan(then)), compact(model, graph, KeepPlan(both))
    for key, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[key]), key


@pytest.mark.parametrize("name", TOYS)
def test_groups_partition_the_slots(name: str) -> None:
    """Each slot of each parameter axis belongs to at most one channel, and channels of a group own equally many."""
    _, _, graph = TRACED[name]
    owned: set[tuple[str, int, int]] = set()
    for group in graph.groups:
        for member in group.members:
            sizes = {len(member.slots(c)) for c in range(group.size)}
            assert sizes == {member.per_channel}
            for channel in range(group.size):
                for slot in member.slots(channel):
                    assert (member.param, member.axis, slot) not in owned
                    owned.add((member.param, member.axis, slot))


@pytest.mark.parametrize("name", TOYS)
def test_original_is_untouched_and_plan_survives_json(name: str) -> None:
    model, _, graph = TRACED[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {a.module + a.name: getattr(model.get_submodule(a.module), a.name) for a in graph.attributes}
    plan = KeepPlan({g.name: (0,) for g in graph.prunable}, graph.fingerprint)
    assert KeepPlan.from_json(plan.to_json()) == plan
    compact(model, graph, plan)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert attributes == {a.module + a.name: getattr(model.get_submodule(a.module), a.name) for a in graph.attributes}
