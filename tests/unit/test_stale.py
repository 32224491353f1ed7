import pytest

from deploypipe.errors import TargetError
from deploypipe.latency.stale import CONDITIONS, refuse_stale

FACTS = {
    "runtime": "onnxruntime", "version": "1.32.0", "precision": "fp32", "threads": 1, "arch": "x86_64", "cpu": "Some CPU",
    "cpu_flags": ["avx2", "fma"], "governor": "performance", "date": "2026-11-24", "timer_us": 1.2,
}  # fmt: skip


def test_the_same_conditions_are_accepted_whatever_else_differs() -> None:
    refuse_stale(FACTS, {**FACTS, "date": "2027-01-01", "timer_us": 1.5}, "profiles/x")


@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("runtime", "openvino"), ("version", "1.33.0"), ("precision", "fp16"), ("threads", 2), ("arch", "aarch64"),
        ("cpu", "Other CPU"), ("cpu_flags", ["avx2"]), ("governor", "powersave"), ("power_mode", "MAXN"),
    ],
)  # fmt: skip
def test_every_other_condition_is_refused_by_name(name: str, now: object) -> None:
    assert name in CONDITIONS
    with pytest.raises(TargetError, match=f"{name} was ") as caught:
        refuse_stale(FACTS, {**FACTS, name: now}, "profiles/x")
    assert caught.value.at == "profiles/x"
    assert "deploypipe profile" in caught.value.fix


def test_all_differences_are_told_at_once() -> None:
    with pytest.raises(TargetError, match=r"version was 1\.32\.0, is 2\.0; threads was 1, is 4"):
        refuse_stale(FACTS, {**FACTS, "version": "2.0", "threads": 4}, "profiles/x")
