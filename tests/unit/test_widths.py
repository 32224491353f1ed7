import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploypipe.latency.widths import MAX_CANDIDATES, Steps, legal_widths, reachable
from deploypipe.types import Graph, Group, Layer, Width

BLOCKS = {"conv": Steps(16, 4, 1.5, (8, 4)), "depthwise": Steps(8, 4, 7.0), "linear": Steps(4)}


def layer(name, n_in, n_out, kind="conv"):
    square = ((3, 3), (1, 1), (1, 1), (1, 1)) if kind != "linear" else ((), (), (), ())
    size = (8, 8) if kind != "linear" else ()
    return Layer(name, kind, f"{name}.weight", "", *square, 1, size, size, 1, 64, n_in, n_out, Width(1))


def graph(sizes, *layers):
    return Graph(layers, tuple(Group(name, size, ()) for name, size in sizes.items()), (), {}, {}, ())


def one(name, slots=1, const=0):
    return Width(const, ((name, slots),))


@given(st.integers(1, 2048), st.sampled_from([1, 4, 8, 16]))
def test_widths_are_whole_steps_or_full_and_ascend(size, step):
    found = legal_widths(graph({"a": size}, layer("a", Width(3), one("a"))), {"conv": Steps(step)})["a"]
    assert found[-1] == size
    assert list(found) == sorted(set(found))
    assert all(width % step == 0 or width == size for width in found)
    assert 1 <= len(found) <= MAX_CANDIDATES + 1
    if size // step <= MAX_CANDIDATES - 1:
        assert set(found) >= set(range(step, size + 1, step))


def test_small_groups_also_get_small_widths_that_gain():
    def found(size):
        return legal_widths(graph({"a": size}, layer("a", Width(3), one("a"))), BLOCKS)["a"]

    assert found(16) == (4, 8, 16)
    assert found(64) == (4, 8, 16, 32, 48, 64)
    assert found(80)[0] == 16


def test_a_group_answers_to_all_its_layers():
    net = graph({"a": 96}, layer("a", Width(3), one("a")), layer("b", one("a"), one("a"), "depthwise"))
    assert all(width % 16 == 0 for width in legal_widths(net, BLOCKS)["a"])


def test_channels_that_own_several_slots_need_fewer_of_them_for_a_step():
    # flatten: 4 slots of a linear layer per channel, so every channel is a whole step of 4
    flat = graph({"a": 12}, layer("fc", one("a", 4), Width(10), "linear"))
    assert legal_widths(flat, BLOCKS)["a"] == tuple(range(1, 13))
    # a whole group of 8 channels is the unit: two make a step of 16
    grouped = graph({"a": 8}, layer("g", one("a", 8), one("a", 8)))
    assert legal_widths(grouped, BLOCKS)["a"] == (2, 4, 6, 8)


def test_fixed_groups_have_no_widths():
    net = Graph((), (Group("a", 8, (), fixed="output"), Group("b", 8, ())), (), {}, {}, ())
    assert list(legal_widths(net, BLOCKS)) == ["b"]


def test_reachable_widths_hold_both_ends():
    legal, dense = {"a": (16, 32, 64), "b": (4, 8, 16)}, {"a": 64, "b": 16}
    assert reachable(Width(3), legal, dense, 4) == (3,)
    assert reachable(one("a"), legal, dense, 4) == (16, 32, 64)
    assert reachable(one("a", 2, const=5), legal, dense, 2) == (37, 133)
    both = reachable(Width(0, (("a", 1), ("b", 1))), legal, dense, 5)
    assert (both[0], both[-1], len(both)) == (20, 80, 5)
    assert list(both) == sorted(set(both))


@pytest.mark.parametrize(("width", "up"), [(1, 16), (4, 4), (8, 8), (9, 16), (16, 16), (17, 32)])
def test_a_width_costs_what_its_step_costs(width, up):
    assert BLOCKS["conv"].up(width) == up
