import pytest

from deploypipe.latency.files import Entry
from deploypipe.profiler.learn import alignment, learn_steps, smaller, step_of


def machine(block, align, narrow):
    """A made-up runtime: whole blocks of channels, a slow path off the alignment, `narrow` inputs at a discount."""

    def up(width):
        return -(-width // block) * block

    def us(n_in, n_out):
        slow = 1.5 if n_in % align or n_out % align else 1.0
        reads = n_in if n_in in narrow else up(n_in)
        return slow * (0.5 + reads * up(n_out) / 100)

    def measure(probes):
        return {p: Entry(p.shape, p.n_in, p.n_out, us(p.n_in, p.n_out), us(p.n_in, p.n_out), 1e9, 30) for p in probes}

    return measure


@pytest.mark.parametrize(("block", "align"), [(1, 1), (2, 1), (4, 4), (8, 4), (16, 4), (16, 8), (32, 16)])
def test_blocks_and_alignment_are_found(block, align):
    steps = learn_steps(machine(block, align, ()))
    for kind in ("conv", "linear"):
        assert steps[kind].step == block
        assert steps[kind].align == (align if align > 1 else 1)
        assert (steps[kind].penalty > 1.2) == (align > 1)


def test_narrow_inputs_count_only_if_they_gain_and_are_aligned():
    assert learn_steps(machine(16, 4, (8, 4, 2)))["conv"].small == (8, 4)
    assert learn_steps(machine(16, 4, ()))["conv"].small == ()


def test_a_step_must_show_at_both_bases():
    flat_at_48 = {w: 48.0 if w <= 48 else 64.0 for w in range(16, 65)}
    assert step_of(flat_at_48) == 32
    assert step_of({w: float(w) for w in range(16, 65)}) == 1


def test_two_per_cent_of_noise_do_not_make_a_step():
    jitter = {w: (-(-w // 16) * 16) * (1.02 if w % 3 else 0.985) for w in range(16, 65)}
    assert step_of(jitter) == 16
    one_off = {w: float(-(-w // 16) * 16) for w in range(16, 65)} | {63: 63.0, 47: 47.0}
    assert step_of(one_off) == 16, "a hundredth saved by one channel fewer is noise where eight fewer save nothing"
    assert alignment(100.0, {1: 103.0, 2: 99.0, 4: 104.0}, 16) == (1, 1.0)
    assert smaller({16: 100.0, 8: 95.0, 4: 60.0, 2: 58.0}, 16) == (4,)
