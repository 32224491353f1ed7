from dataclasses import replace

import pytest

from deploypipe.errors import TargetError
from deploypipe.latency.context import Overhead, Price
from deploypipe.latency.table import Context, Entry, LatencyTable, Shape, structure_of
from deploypipe.latency.widths import Steps
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph, Group, Layer, Width

STEPS = {"conv": Steps(8, 4, 1.5, (4,)), "depthwise": Steps(8, 4, 7.0), "linear": Steps()}
SQUARE = ((3, 3), (1, 1), (1, 1), (1, 1))


def one(name, slots=1, const=0):
    return Width(const, ((name, slots),))


def conv(name, n_in, n_out, **changes):
    plain = Layer(name, "conv", f"{name}.weight", "", *SQUARE, 1, (8, 8), (8, 8), 1, 64, n_in, n_out, Width(1))
    return replace(plain, **changes)


A, B, D = conv("a", Width(3), one("a")), conv("b", one("a"), one("b")), one("a")
WISE = conv("d", D, D, kind="depthwise", groups=32, n_groups=D)
HEAD = Layer("fc", "linear", "fc.weight", "", (), (), (), (), 1, (), (), 1, 1, one("b"), Width(10), Width(1))
CAT = conv("cat", Width(0, (("a", 1), ("b", 1))), one("c"))


def graph(*layers, a=32, b=16, c=24):
    groups = tuple(Group(name, size, ()) for name, size in (("a", a), ("b", b), ("c", c)))
    return Graph(layers, groups, (), {}, {}, ())


def us(n_in, n_out):
    """A made-up bilinear price."""
    return 1.0 + 0.5 * n_in + 0.25 * n_out + 0.125 * n_in * n_out


def entries(layer, ins, outs):
    return [Entry(Shape.of(layer), n_in, n_out, us(n_in, n_out), 1.0, 2.0, 30) for n_in in ins for n_out in outs]


def context(net, *overhead, factor=1.0, **prices):
    return Context(structure_of(net), prices, overhead, 100.0, factor, 1.0, 0.0, 100)


@pytest.fixture
def net():
    return graph(A, B, WISE, HEAD)


@pytest.fixture
def kernels():
    wise = [Entry(Shape.of(WISE), n, n, 10.0 * n, 1, 1, 30) for n in (8, 16, 32)]
    grids = (A, [3], [4, 8, 16, 32]), (B, [4, 8, 32], [4, 8, 16]), (HEAD, [4, 16], [10])
    return (*wise, *(entry for grid in grids for entry in entries(*grid)))


def plan(**kept):
    return KeepPlan({name: tuple(range(n)) for name, n in kept.items()})


def test_a_model_costs_the_sum_of_its_layers(net, kernels):
    table = LatencyTable({}, STEPS, kernels, (context(net),))
    for kept in ({}, {"a": 8}, {"a": 16, "b": 8}):
        a, b = kept.get("a", 32), kept.get("b", 16)
        wanted = us(3, a) + us(a, b) + 10 * a + us(b, 10)
        assert table.predict(net, plan(**kept)) == pytest.approx(wanted)


def test_terms_add_up_to_the_prediction(net, kernels):
    relu = Overhead("Relu", ("a", "b"), 0.5, 5.5 / 48)
    table = LatencyTable({}, STEPS, kernels, (context(net, relu, b=Price(1.5, 2.0, weight_us=0.01), factor=1.1),))
    for chosen in (plan(), plan(a=8), plan(a=16, b=4)):
        kept = net.kept(chosen)
        total = sum(term.price(term.n_in.at(kept), term.n_out.at(kept)) for term in table.terms(net))
        assert table.predict(net, chosen) == pytest.approx(total)


def test_other_kernels_follow_the_widths_that_feed_them(net, kernels):
    relu, session = Overhead("Relu", ("a", "b"), 0.5, 6.0 / 48), Overhead("session", (), 3.0)
    bare = LatencyTable({}, STEPS, kernels, (context(net),))
    full = LatencyTable({}, STEPS, kernels, (context(net, relu, session),))
    assert full.predict(net) - bare.predict(net) == pytest.approx(9.5)
    half = plan(a=16, b=8)
    assert full.predict(net, half) - bare.predict(net, half) == pytest.approx(3.0 + 0.5 + 6.0 / 2)
    only_a = plan(a=8)
    assert full.predict(net, only_a) - bare.predict(net, only_a) == pytest.approx(3.0 + 0.5 + 6.0 * 24 / 48)


def test_what_one_group_feeds_is_gone_with_it(net, kernels):
    own, shared = Overhead("Pool", ("b",), 4.0, 0.5), Overhead("Relu", ("a", "b"), 2.0, 0.25)
    bare, full = (LatencyTable({}, STEPS, kernels, (context(net, *extra),)) for extra in ((), (own, shared)))
    gone = KeepPlan({"b": ()})
    assert full.predict(net, gone) - bare.predict(net, gone) == pytest.approx(2.0 + 0.25 * 32)


def test_context_scales_layers_and_the_factor_everything(net, kernels):
    plain = LatencyTable({}, STEPS, kernels, (context(net),))
    scaled = LatencyTable({}, STEPS, kernels, (context(net, b=Price(2.0), factor=1.25),))
    assert scaled.predict(net) == pytest.approx(1.25 * (plain.predict(net) + us(32, 16)))


def test_inside_the_model_a_layer_also_pays_for_what_it_touches(net, kernels):
    plain = LatencyTable({}, STEPS, kernels, (context(net),))
    cold = LatencyTable({}, STEPS, kernels, (context(net, b=Price(0.9, 2.0, 0.3, 0.4, 0.05)),))
    for a, b in ((32, 16), (16, 8), (8, 4)):
        chosen = plan(a=a, b=b)
        more = cold.predict(net, chosen) - plain.predict(net, chosen)
        assert more == pytest.approx(2.0 + 0.3 * a + 0.4 * b + 0.05 * a * b - 0.1 * us(a, b))


def test_what_only_full_layers_pay_fades_quickly(net, kernels):
    plain = LatencyTable({}, STEPS, kernels, (context(net),))
    full = LatencyTable({}, STEPS, kernels, (context(net, b=Price(crowded_us=10.0, full=32 * 16)),))
    more = [full.predict(net, plan(a=a)) - plain.predict(net, plan(a=a)) for a in (32, 16, 8)]
    assert more[0] == pytest.approx(10.0)
    assert 0 < more[2] < more[1] < 0.1


def test_tensors_that_do_not_fill_their_blocks_cost_more(net, kernels):
    pool, joint = Overhead("Pool", ("b",), 4.0, 0.5, 2.0, 0.25, block=8), Overhead("Add", ("a", "b"), 1.0, 0.5, block=8)
    bare, full = (LatencyTable({}, STEPS, kernels, (context(net, *extra),)) for extra in ((), (pool, joint)))
    for b, taken in ((16, 4.0 + 8.0), (8, 4.0 + 4.0), (4, 6.0 + 3.0)):
        chosen = plan(b=b)
        assert full.predict(net, chosen) - bare.predict(net, chosen) == pytest.approx(taken + 1.0 + 0.5 * (32 + b))


def test_tensors_that_leave_the_near_cache_cost_more_for_what_is_beyond(net, kernels):
    pool = Overhead("Pool", ("b",), 4.0, 0.5, beyond_us=0.25, knee=6.0)
    bare, full = (LatencyTable({}, STEPS, kernels, (context(net, *extra),)) for extra in ((), (pool,)))
    for b, taken in ((16, 4.0 + 8.0 + 2.5), (8, 4.0 + 4.0 + 0.5), (4, 4.0 + 2.0)):
        assert full.predict(net, plan(b=b)) - bare.predict(net, plan(b=b)) == pytest.approx(taken)


@pytest.mark.parametrize(("n_in", "n_out", "same"), [(20, 16, (24, 16)), (8, 12, (8, 16)), (1, 8, None), (30, 16, None)])
def test_between_steps_a_width_costs_the_next_step_and_off_alignment_more(net, kernels, n_in, n_out, same):
    table = LatencyTable({}, STEPS, kernels, (context(net),))
    if same:
        assert table.kernel_us(B, n_in, n_out) == pytest.approx(us(*same))
    else:
        aligned = us(8 if n_in == 1 else 32, n_out)
        assert table.kernel_us(B, n_in, n_out) == pytest.approx(1.5 * aligned)


@pytest.mark.parametrize(("n_in", "n_out"), [(16, 64), (64, 8), (40, 64)])
def test_narrower_than_all_that_was_measured_is_an_error_and_no_guess(net, n_in, n_out):
    table = LatencyTable({"target": "box"}, STEPS, tuple(entries(B, [48, 64], [16, 64])), (context(net),))
    assert table.kernel_us(B, 41, 9) == pytest.approx(1.5 * us(48, 16)), "on the step of what was measured, off alignment"
    with pytest.raises(TargetError, match=f"with {n_in} input and {n_out} output channels") as caught:
        table.kernel_us(B, n_in, n_out)
    assert "known: 48 to 64 input and 16 to 64 output channels" in caught.value.message
    assert "layer b" in caught.value.at
    assert "deploypipe profile --model MODEL --target box" in caught.value.fix


@pytest.mark.parametrize(("error", "additivity", "doubts"), [(0.02, 1.0, 0), (0.04, 1.0, 1), (0.02, 0.93, 1), (0.12, 1.06, 2)])
def test_error_and_additivity_outside_of_their_bounds_are_doubts(net, error, additivity, doubts):
    found = replace(context(net), errors=(error, -error), additivity=additivity)
    assert len(found.doubts) == doubts
    assert found.far_off == (error > 0.1)
    assert found.adds_up == (0.95 <= additivity <= 1.05)
    assert not replace(context(net), errors=()).far_off, "a model that cannot be narrowed was not checked"


def test_small_widths_that_were_measured_count_as_themselves(net, kernels):
    table = LatencyTable({}, STEPS, kernels, (context(net),))
    assert table.kernel_us(B, 4, 8) == us(4, 8)


def test_rows_measured_at_this_width_come_before_interpolated_ones(net):
    # Another model left a coarse row between: its middle must not stand in for what was measured.
    coarse = [Entry(Shape.of(B), 16, n, 1000.0, 1, 1, 30) for n in (8, 32)]
    fine = entries(B, [8, 32], [16])
    table = LatencyTable({}, STEPS, (*coarse, *fine), (context(net),))
    assert table.kernel_us(B, 24, 16) == pytest.approx(us(24, 16))


def test_a_missing_kernel_or_model_is_an_error_with_the_command(net, kernels):
    def fails(table, of, message):
        with pytest.raises(TargetError, match=message) as caught:
            table.predict(of)
        assert "deploypipe profile --model MODEL --target box" in str(caught.value)
        assert caught.value.exit_code == 4

    facts = {"target": "box"}
    fails(LatencyTable(facts, STEPS, kernels), net, "has not been profiled as a whole")
    fails(LatencyTable(facts, STEPS, kernels[:3], (context(net),)), net, "no measurement for conv 3x3")
    wider = graph(A, B, WISE, HEAD, a=64)
    fails(LatencyTable(facts, STEPS, kernels, (context(wider),)), wider, "with 3 input and 64 output channels")


def test_a_pruned_model_is_still_the_profiled_one(net, kernels):
    relu = Overhead("Relu", ("a",), 0.0, 6.0 / 32, beyond_us=0.5, knee=16.0)
    table = LatencyTable({}, STEPS, kernels, (context(net, relu),))
    small = replace_widths(net, a=16, b=8)
    assert structure_of(small) == structure_of(net)
    assert table.predict(small) == pytest.approx(table.predict(net, plan(a=16, b=8)))


def replace_widths(net, a, b):
    return Graph(net.layers, (Group("a", a, ()), Group("b", b, ()), net.groups[2]), (), {}, {}, ())


def test_a_wider_model_is_another_one(net, kernels):
    """Beyond the widths that a price was learned at, it says nothing: what full layers pay would grow with their power."""
    table = LatencyTable({}, STEPS, kernels, (context(net, a=Price(crowded_us=1.0, full=3 * 16)),))
    assert table.known(replace_widths(net, a=16, b=16))
    assert table.known(net) is None
    with pytest.raises(TargetError, match="not been profiled as a whole, or only with fewer channels"):
        table.predict(net)


def test_structure_tells_operations_apart(net):
    called = [replace(net, ops=ops) for ops in ({"relu": 2}, {"relu": 1, "hardswish": 1}, {"hardswish": 1, "relu": 1})]
    first, other, same = map(structure_of, called)
    assert first != other == same


def test_structure_tells_input_sizes_apart(net):
    larger = graph(A, conv("b", one("a"), one("b"), in_size=(16, 16)), WISE, HEAD)
    assert structure_of(larger) != structure_of(net)


def test_concatenated_inputs_are_priced_by_their_sum():
    net = graph(CAT)
    table = LatencyTable({}, STEPS, tuple(entries(CAT, [8, 48], [8, 16, 24])), (context(net),))
    assert table.predict(net, plan(a=16, b=8, c=8)) == pytest.approx(us(24, 8))


def test_saving_and_loading_is_the_identity(net, kernels, tmp_path):
    relu = Overhead("Relu", ("a",), 0.0, 6.0 / 32, beyond_us=0.5, knee=16.0)
    table = LatencyTable(
        {"runtime": "r", "threads": 1},
        STEPS,
        kernels,
        (context(net, relu, a=Price(1.25, input_us=0.5, crowded_us=3.0, full=96)),),
    )
    table.save(tmp_path)
    loaded = LatencyTable.load(tmp_path)
    assert (loaded.facts, loaded.steps, loaded.contexts) == (table.facts, table.steps, table.contexts)
    assert set(loaded.kernels) == set(table.kernels)
    assert loaded.predict(net, plan(a=8)) == table.predict(net, plan(a=8))
    assert loaded.id == table.id
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*.*")}
    loaded.save(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_table_of_other_measurements_has_another_id(net, kernels):
    table = LatencyTable({"threads": 1}, STEPS, kernels, (context(net),))
    assert LatencyTable({"threads": 1}, STEPS, kernels[::-1], (context(net),)).id == table.id, "the order says nothing"
    others = [
        replace(table, facts={"threads": 2}),
        replace(table, kernels=kernels[1:]),
        replace(table, kernels=(replace(kernels[0], median_us=1.0), *kernels[1:])),
        replace(table, contexts=(context(net, factor=1.1),)),
        replace(table, steps={}),
    ]
    assert len({table.id, *(other.id for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("device.json", '"schema": 5', '"schema": 9', "schema 9, this version reads 5"),
        ("device.json", "{", "", "damaged"),
        ("device.json", '"steps"', '"stops"', "malformed"),
        ("device.json", '"step": 8', '"step": 0', "a step of 0 channels"),
        ("kernels.csv", "n_in", "inputs", "other columns"),
        ("kernels.csv", "conv,3x3", "conv,3y3", "kernels.csv:2"),
        ("kernels.csv", ",2.750,", ",0,", "latency is 0"),
        ("kernels.csv", ",2.750,", ",nan,", "latency is nan"),
    ],
)
def test_damaged_tables_are_refused(net, tmp_path, file, old, new, message):
    kernel = Entry(Shape.of(B), 8, 8, 2.75, 1.0, 3.0, 30)
    LatencyTable({}, STEPS, (kernel,), (context(net),)).save(tmp_path)
    path = tmp_path / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(TargetError, match=message):
        LatencyTable.load(tmp_path)


def test_there_is_no_table_in_an_empty_folder(tmp_path):
    with pytest.raises(TargetError, match="cannot read latency table"):
        LatencyTable.load(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00n", b"n_in\x00"])
def test_kernels_that_are_no_text_are_refused(net, tmp_path, content):
    LatencyTable({}, STEPS, (Entry(Shape.of(B), 8, 8, 2.75, 1.0, 3.0, 30),), (context(net),)).save(tmp_path)
    (tmp_path / "kernels.csv").write_bytes(content)
    with pytest.raises(TargetError, match=r"kernels.csv"):
        LatencyTable.load(tmp_path)
