"""Latency tables that price 2:4 weights: their files, what they predict, what they offer; and tables that do not."""

from dataclasses import replace

import numpy as np
import pytest

from deploypipe.allocation.allocate import allocate_widths
from deploypipe.errors import ModelError, TargetError
from deploypipe.latency.context import Context, Price
from deploypipe.latency.files import Entry, Shape
from deploypipe.latency.table import LatencyTable, structure_of
from deploypipe.latency.widths import Steps, two_four_widths
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph, Group, Layer, Width

STEPS = {"conv": Steps(8)}
SQUARE = ((3, 3), (1, 1), (1, 1), (1, 1))


def one(name):
    return Width(0, ((name, 1),))


def conv(name, n_in, n_out, **changes):
    plain = Layer(name, "conv", f"{name}.weight", "", *SQUARE, 1, (8, 8), (8, 8), 1, 64, n_in, n_out, Width(1))
    return replace(plain, **changes)


def graph(*layers):
    return Graph(layers, (Group("a", 32, ()), Group("b", 16, ())), (), {}, {}, ())


def entries(layer, ins, outs):
    """Made-up bilinear prices."""
    us = {(i, o): 1.0 + 0.5 * i + 0.25 * o + 0.125 * i * o for i in ins for o in outs}
    return [Entry(Shape.of(layer), *pair, time, 1.0, 2.0, 30) for pair, time in us.items()]


A, B = conv("a", Width(3), one("a")), conv("b", one("a"), one("b"))
HEAD = Layer("fc", "linear", "fc.weight", "", (), (), (), (), 1, (), (), 1, 1, one("b"), Width(10), Width(1))
NET = graph(A, B, HEAD)  # 3 -> a (32) -> b (16) -> 10: only B may hold the pattern
INS, OUTS = (16, 32), (8, 16)


def sparse(factor, ins=INS, outs=OUTS, layer=B):
    dense = {entry.key: entry for entry in entries(layer, ins, outs)}
    return tuple(replace(entry, median_us=factor * entry.median_us, sparsity="2:4") for entry in dense.values())


def table(*more, net=NET, layers=((A, [3], [8, 16, 32]), (B, [8, 16, 32], [8, 16]), (HEAD, [8, 16], [10]))):
    context = Context(structure_of(net), {"b": Price(1.5, 7.0)}, (), 100.0, 1.1, 1.0, 0.0, 100)
    kernels = [entry for grid in layers for entry in entries(*grid)]
    return LatencyTable({}, STEPS, (*kernels, *more), (context,))


def two_four(b=16, a=32):
    return KeepPlan.of_widths({"a": a, "b": b}, ["b"])


def test_a_table_of_dense_kernels_has_the_file_and_the_id_that_it_always_had(tmp_path):
    table().save(tmp_path)
    header, *rows = (tmp_path / "kernels.csv").read_text().splitlines()
    assert header.endswith(",runs")
    assert "dense" not in "".join(rows)
    assert LatencyTable.load(tmp_path).id == table().id


def test_a_table_with_2_4_kernels_has_one_typed_column_more_and_survives(tmp_path):
    made = table(*sparse(0.5))
    made.save(tmp_path)
    header, *rows = (tmp_path / "kernels.csv").read_text().splitlines()
    assert header.endswith(",runs,sparsity")
    assert sum(row.endswith(",2:4") for row in rows) == 4
    assert all(row.endswith((",2:4", ",dense")) for row in rows)
    read = LatencyTable.load(tmp_path)
    assert (read.id, set(read.kernels)) == (made.id, set(made.kernels))
    assert read.id != table().id
    (tmp_path / "kernels.csv").write_text("\n".join([header, *rows]).replace(",2:4", ",1:4", 1) + "\n")
    with pytest.raises(TargetError, match="sparsity is '1:4', not one of dense, 2:4"):
        LatencyTable.load(tmp_path)


def test_only_a_plan_that_names_the_layer_gets_the_price():
    dense, offering = table(), table(*sparse(0.6)).offering()
    for plan in (None, KeepPlan({}), KeepPlan.of_widths({"a": 16})):
        assert offering.predict(NET, plan) == dense.predict(NET, plan) == table(*sparse(0.6)).predict(NET, plan)
    saved = 1.1 * 1.5 * 0.4 * dense.kernel_us(B, 32, 16)
    assert dense.predict(NET) - offering.predict(NET, two_four()) == pytest.approx(saved)
    assert offering.predict(NET, two_four(a=8)) == dense.predict(NET, KeepPlan.of_widths({"a": 8})), "8 is no multiple of 16"
    assert table(*sparse(0.6)).predict(NET, two_four()) == dense.predict(NET), "nobody asked for it"


def test_a_table_for_masks_everywhere_takes_the_quicker_kernel_but_leaves_the_dense_model_alone():
    masked = table(*sparse(0.6)).masked()
    assert masked.predict(NET) == table().predict(NET)
    assert masked.predict(NET, KeepPlan({})) == table(*sparse(0.6)).offering().predict(NET, two_four())
    assert table(*sparse(1.2)).masked().predict(NET, KeepPlan({})) == table().predict(NET)
    assert table().masked().predict(NET, KeepPlan({})) == table().predict(NET), "without prices the dense ones stay"


@pytest.mark.parametrize("factor", [1.0, 1.4, 0.995])
def test_a_layer_that_is_no_quicker_sparse_saves_nothing_and_is_never_chosen(factor):
    slow = table(*sparse(factor)).offering()
    assert slow.predict(NET, two_four()) == slow.predict(NET)
    values = {"a": np.arange(33.0), "b": np.arange(17.0)}
    for share in (0.5, 0.7, 0.9):
        kept, certificate = allocate_widths(NET, values, slow, share * slow.predict(NET), masks={"b": 0.0}, gap=0)
        assert certificate.two_four == ()
        assert (kept, certificate.predicted) == (
            (same := allocate_widths(NET, values, table(), share * slow.predict(NET), gap=0))[0], same[1].predicted
        )  # fmt: skip


def test_a_cheap_mask_is_chosen_before_channels_go_and_a_dear_one_is_not():
    quick = table(*sparse(0.5)).offering()
    values = {"a": np.arange(33.0), "b": np.arange(17.0)}
    budget = 1.001 * quick.predict(NET, two_four())
    kept, cheap = allocate_widths(NET, values, quick, budget, masks={"b": 0.1})
    assert (cheap.two_four, kept["a"], kept["b"]) == (("b",), 32, 16)
    assert cheap.value == pytest.approx(48 - 0.1)
    _, dear = allocate_widths(NET, values, quick, budget, masks={"b": 1000.0})
    assert dear.two_four == ()
    _, none = allocate_widths(NET, values, quick, budget)
    assert none.two_four == (), "no loss is known: it stays dense"


def test_what_was_not_measured_is_an_error_never_zero():
    with pytest.raises(TargetError, match=r"no prices of kernels with 2:4 weights[\s\S]*deploypipe profile"):
        table().offering()
    other = conv("z", one("a"), one("b"), kernel=(1, 1))
    some = table(*sparse(0.6, layer=other)).offering()
    with pytest.raises(TargetError, match=r"with 2:4 weights, 32 input and 16 output channels[\s\S]*layer b"):
        some.predict(NET, two_four())


def test_a_weight_that_two_layers_share_is_not_offered():
    twice = graph(A, B, replace(B, name="b#2"), HEAD)
    shared = table(*sparse(0.6), net=twice).offering()
    assert [term.name for term in shared.terms(twice) if term.two_four] == []
    assert [term.name for term in table(*sparse(0.6)).offering().terms(NET) if term.two_four] == ["b"]


def test_the_widths_to_price_are_those_that_the_pattern_allows():
    legal, dense = {"a": (8, 16, 24, 32), "b": (4, 8, 12, 16)}, {"a": 32, "b": 16}
    assert two_four_widths(B, legal, dense, 4, 4) == [(16, 8), (16, 16), (32, 8), (32, 16)]
    assert two_four_widths(A, legal, dense, 4, 4) == [], "three input channels"
    assert two_four_widths(replace(B, kind="depthwise"), legal, dense, 4, 4) == []
    joined = conv("j", Width(0, (("a", 1), ("b", 1))), Width(24))
    assert two_four_widths(joined, legal, dense, 9, 4) == [(16, 24), (32, 24), (48, 24)], "what lies between is interpolated"
    assert (
        len(two_four_widths(conv("w", Width(0, (("a", 1),)), Width(8)), {"a": tuple(range(16, 513, 16))}, {"a": 512}, 4, 4))
        == 4
    )


def test_a_plan_keeps_its_layers_in_its_file_and_refuses_unknown_ones(tmp_path):
    plan = two_four()
    plan.save(tmp_path / "plan.json")
    assert KeepPlan.load(tmp_path / "plan.json") == plan
    KeepPlan({}).save(tmp_path / "dense.json")
    assert "two_four" not in (tmp_path / "dense.json").read_text()
    plan.check(NET)
    with pytest.raises(ModelError, match=r"unknown layer 'c'"):
        KeepPlan({}, two_four=("c",)).check(NET)


def test_entries_of_both_kinds_stand_beside_each_other():
    one_, other = Entry(Shape.of(B), 16, 8, 2.0, 1.0, 3.0, 9), Entry(Shape.of(B), 16, 8, 1.0, 0.5, 1.5, 9, "2:4")
    assert one_.place != other.place
    assert LatencyTable({}, STEPS, (one_, other)).kernel_us(B, 16, 8, "2:4") == 1.0
