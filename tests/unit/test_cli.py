"""The command line: what it passes on, what it shows, and how every failure ends."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from rich.console import Console
from rich.progress import Progress
from sample_report import REPORT

import deploypipe
from deploypipe.algorithms import algorithms
from deploypipe.artifact import ArtifactTimes
from deploypipe.backends.base import KernelTime, Profile
from deploypipe.cli import console
from deploypipe.cli.build import parse_settings
from deploypipe.cli.console import Lines
from deploypipe.cli.main import app, run
from deploypipe.errors import BackendError, BudgetError, DeployPipeError, ModelError, TargetError, UsageError
from deploypipe.inspection import GroupFacts, Inspection, LayerFacts
from deploypipe.measurement import Latency
from deploypipe.progress import Reporter
from deploypipe.reports.report import Check, Report
from deploypipe.training.evaluate import Accuracy
from deploypipe.worth.curves import Curves, Point

COMMANDS = (
    *("build", "profile", "bench", "sensitivity", "criteria", "inspect", "algos", "targets", "doctor"),
    *("compare", "ledger", "report"),
)
INSPECTION = Inspection(
    model="demo",
    n_parameters=41_290,
    n_macs=3_214_000,
    layers=(
        LayerFacts("stem", "conv", 1, 16, (3, 3), (1, 1), 1, (16, 16), (16, 16), 36_864),
        LayerFacts("mix", "grouped", 16, 16, (3, 3), (2, 2), 4, (16, 16), (8, 8), 36_864),
        LayerFacts("head", "linear", 16, 10, (), (), 1, (), (), 160),
    ),
    groups=(
        GroupFacts("stem", 16, ("stem.weight[0] produces", "bn.weight[0] carries", "mix.weight[1] consumes"), ("add",), ""),
        GroupFacts("head", 10, ("head.weight[0] produces",), (), "the network's output"),
    ),
    notes=("an op was unknown",),
    fingerprint="abc",
)


@dataclass(frozen=True)
class Request:
    model: str = "demo"
    weights: Path | None = None
    data: str = "demo"
    target: str = "cpu"
    algo: str = "auto"
    budget: str = "50%"
    metric: str = "latency"
    epochs: int = 3
    out: Path | None = None
    seed: int = 0
    options: dict[str, str] = field(default_factory=dict)
    distill: bool = True
    lr: float | None = None
    batch_size: int | None = None
    threads: int | None = None
    accuracy_floor: float | None = None
    keep: tuple[str, ...] = ()
    value: str = ""
    value_rounds: int = 2
    value_finalists: int = 1
    host: str | None = None
    sparsity: str = ""
    train_precision: str = "fp32"
    command: str = ""
    table: Path | None = None
    benchmark_binary: Path | None = None

    @property
    def folder(self) -> Path:
        return Path(self.out or "runs/demo")


class FakePipeline(ModuleType):
    """Stands in for `deploypipe.pipeline`: remembers the request, answers or raises what the test says."""

    Request = Request

    def __init__(self) -> None:
        super().__init__("deploypipe.pipeline")
        self.answer: Report | Inspection | ArtifactTimes | Curves | dict[str, Any] | BaseException = REPORT
        self.got: list[Any] = []

    def _call(self, *arguments: Any) -> Any:
        self.got = [argument for argument in arguments if not hasattr(argument, "advance")]
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def build(self, request: Request, reporter: Reporter) -> Any:
        reporter.stage("trace")
        reporter.reused("profile")
        reporter.stage("finetune", 3)
        reporter.advance(3)
        reporter.note("the machine was busy")
        return self._call(request)

    def sensitivity(self, request: Request, reporter: Reporter) -> Any:
        return self._call(request)

    def inspect(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def profile_model(self, *arguments: Any, **options: Any) -> Any:
        return self._call(*arguments, *options.values())

    def bench_artifact(self, *arguments: Any, **options: Any) -> Any:
        return self._call(*arguments, *options.values())


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "deploypipe.pipeline", fake)
    monkeypatch.setattr(deploypipe, "pipeline", fake, raising=False)
    return fake


# --- what commands pass on and show ----------------------------------------------------------------------------------


def test_build_without_options_asks_for_the_demo(pipeline: FakePipeline) -> None:
    assert run(["build"]) == 0
    assert pipeline.got == [Request(command="deploypipe build")]


def test_build_passes_every_option_on(pipeline: FakePipeline) -> None:
    line = (
        "build --model net.py:make --weights w.safetensors --data imagefolder:d --target jetson --algo l1 --budget 3ms "
        "--metric latency --epochs 7 --out runs/x "
        "--seed 5 --set images=64 --set ridge=1e-4 --no-distill --lr 0.01 --batch-size 32 --threads 2 "
        "--accuracy-floor 0.9 --keep stem --keep head --table tables/x --value measured --value-rounds 3 --value-finalists 4 "
        "--host pi@box:2222 --benchmark-binary b/perf --sparsity 2:4 --train-precision bf16"
    )
    assert run(line.split()) == 0
    expected = Request(
        "net.py:make", Path("w.safetensors"), "imagefolder:d", "jetson", "l1", "3ms", "latency", 7, Path("runs/x"), 5,
        {"images": "64", "ridge": "1e-4"}, False, 0.01, 32, 2, 0.9, ("stem", "head"), "measured", 3, 4, "pi@box:2222", "2:4",
        "bf16", f"deploypipe {line}", Path("tables/x"), Path("b/perf"),
    )  # fmt: skip
    assert pipeline.got == [expected]


def test_build_answers_on_stdout_and_reports_progress_on_stderr(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]
) -> None:
    assert run(["build", "--out", "runs/x"]) == 0
    out, err = capsys.readouterr()
    golden("cli_build.txt", out)
    assert "runs/x/report.md" in out
    assert "runs/x/model.ort.onnx" in out
    assert err.splitlines() == ["trace ...", "profile reused", "finetune ...", "note: the machine was busy"]
    assert pipeline.got


def test_build_in_json_is_the_report(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "--json"]) == 0
    assert Report.from_json(json.loads(capsys.readouterr().out)) == pipeline.answer


def test_inspect_shows_layers_groups_and_reasons(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]
) -> None:
    pipeline.answer = INSPECTION
    assert run(["inspect", "--model", "torchvision:resnet18", "--weights", "w.pt"]) == 0
    assert pipeline.got == ["torchvision:resnet18", Path("w.pt")]
    golden("cli_inspect.txt", capsys.readouterr().out)
    assert run(["inspect", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["n_parameters"], state["groups"][1]["fixed"], state["layers"][1]["groups"]) == (
        41_290,
        "the network's output",
        4,
    )


@pytest.mark.parametrize(
    ("line", "passed"),
    [
        (
            "profile --model m --target t --threads 2 --host h --benchmark-binary b",
            [Request("m", target="t", threads=2, host="h", benchmark_binary=Path("b")), False, None, None],
        ),
        ("profile --fresh --save x", [Request(), True, Path("x"), None]),
        ("profile --allow-noise", [Request(), False, None, True]),
    ],
)
def test_profile_shows_what_was_learned(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], line: str, passed: list[object]
) -> None:
    pipeline.answer = {"median_us": 12.5, "n_runs": 100}
    assert run(line.split()) == 0
    assert pipeline.got == passed
    assert capsys.readouterr().out.splitlines() == ["median us  12.5", "n runs     100"]
    assert run([*line.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pipeline.answer


TIMES = ArtifactTimes(
    "a.onnx",
    "cpu",
    1,
    Latency(50.0, 49.0, 52.0, 100, 0.01),
    Profile(
        (
            KernelTime("relu_nchwc", "Conv", "stem.weight", (), 44.5, 44.0, 45.5, 60),
            KernelTime("ReorderOutput", "ReorderOutput", "", ("stem.weight",), 2.5, 2.5, 2.5, 60),
            KernelTime("node_linear", "Gemm", "head.weight", (), 8.0, 7.5, 9.0, 60),
        ),
        0.02,
    ),
)


@pytest.mark.parametrize(
    ("line", "passed"),
    [
        ("bench a.onnx --target t --threads 2 --host h", [Path("a.onnx"), "t", 2, True, "h", None]),
        ("bench a.onnx --no-layers --benchmark-binary b", [Path("a.onnx"), "cpu", None, False, None, Path("b")]),
    ],
)
def test_bench_passes_its_options_on(pipeline: FakePipeline, line: str, passed: list[object]) -> None:
    pipeline.answer = TIMES
    assert run(line.split()) == 0
    assert pipeline.got == passed


@pytest.mark.parametrize("command", ["inspect", "profile", "build"])
def test_what_the_user_s_own_code_prints_is_no_part_of_the_answer(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    pipeline.answer = {"inspect": INSPECTION, "profile": {"target": "cpu"}, "build": REPORT}[command]
    silent = pipeline._call
    monkeypatch.setattr(pipeline, "_call", lambda *arguments: print("hello from net.py") or silent(*arguments))
    assert run([command, "--json"]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)
    assert "hello from net.py" in streams.err


def test_what_is_imported_stands_alone(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", "--import", "x.zip", "--target", "cpu"]) == 2
    assert "--import and --target" in capsys.readouterr().err


def test_bench_shows_the_whole_and_each_kernel(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]
) -> None:
    pipeline.answer = TIMES
    assert run(["bench", "a.onnx"]) == 0
    golden("cli_bench.txt", capsys.readouterr().out)
    assert run(["bench", "a.onnx", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["median_us"], state["n_runs"], state["kernels_sum_us"], state["kernels_foreign_load"]) == (50, 100, 55, 0.02)
    assert [kernel["name"] for kernel in state["kernels"]] == ["relu_nchwc", "ReorderOutput", "node_linear"]
    assert sum(kernel["share"] for kernel in state["kernels"]) == pytest.approx(1)
    assert state["kernels"][0] == {
        "name": "relu_nchwc", "op": "Conv", "weight": "stem.weight",
        "median_us": 44.5, "p10_us": 44.0, "p90_us": 45.5, "n_runs": 60, "share": pytest.approx(44.5 / 55),
    }  # fmt: skip


def test_bench_without_layers_shows_the_whole_alone(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.answer = replace(TIMES, profile=None)
    assert run(["bench", "a.onnx", "--no-layers"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert run(["bench", "a.onnx", "--no-layers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] is None


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        ("sensitivity", Request(algo="thinet", metric="macs")),
        ("sensitivity --target jetson --algo l2 --seed 3", Request(target="jetson", algo="l2", seed=3)),
        ("sensitivity --target jetson --host u@nano", Request(target="jetson", algo="thinet", host="u@nano")),
        ("sensitivity --threads 2", Request(algo="thinet", threads=2)),
        ("sensitivity --host pi", Request(algo="thinet", host="pi")),
        (
            "sensitivity --set images=64 --keep stem",
            Request(algo="thinet", metric="macs", options={"images": "64"}, keep=("stem",)),
        ),
    ],
)
def test_sensitivity_shows_what_each_width_loses_and_saves(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, request_: Request
) -> None:
    points = (Point("stem", 16, 16, 0.1, 0.0, 0.98, 0.0), Point("stem", 16, 8, 0.3456, 0.2456, 0.914, 25.0))
    pipeline.answer = Curves(points, Accuracy(0.98, 0.1, 1000), 100.0, "us", {"head": "no layer reads it"})
    assert run([*line.split(), "--out", str(tmp_path / "c.csv")]) == 0
    assert pipeline.got == [request_]
    out = capsys.readouterr().out
    assert re.search(r"stem +8 of 16 +0\.3456 +0\.2456 +91\.4 % +25\.0 us +25\.0 %", out)
    assert "1000 held-out" in out
    assert "no layer reads it" in out
    header, *_, last = (tmp_path / "c.csv").read_text().splitlines()
    assert (header, last) == ("group,size,width,loss,rise,accuracy,saves_us", "stem,16,8,0.3456,0.2456,0.914,25.0")


def test_sensitivity_finds_a_place_that_takes_no_file_before_it_measures(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "c.csv", Path("/proc/nope/c.csv")):
        assert run(["sensitivity", "--out", str(place)]) == 2
        assert "--out" in capsys.readouterr().err
    assert pipeline.got == []


def test_algos_explains_one_with_its_source_options_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["algos", "slimming"]) == 0
    out = capsys.readouterr().out
    for part in ("arXiv:1708.06519", "Deviations:", "needs", "training", "reach", "deploypipe build --algo slimming"):
        assert part in out
    assert re.search(r"lambda +0\.0 +from 0 ", out)
    assert run(["algos", "slimming", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["paper"] == algorithms()["slimming"]["paper"]
    assert {option["name"] for option in found["options"]} == {"train_epochs", "lambda_", "reach", "widths"}
    assert run(["algos", "sliming"]) == 2
    assert "did you mean 'slimming'" in capsys.readouterr().err


def test_algos_lists_every_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["algos"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(algorithms())
    assert run(["algos", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == algorithms().keys()


def test_targets_lists_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["targets"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^cpu +.*onnxruntime +local", out, re.MULTILINE)
    assert re.search(r"^cpu-openvino +.*openvino +local", out, re.MULTILINE)
    unmet = set(re.findall(r"^(\S+) .*not run on hardware$", out, re.MULTILINE))
    assert unmet == {"android-arm64", "ios", "jetson", "jetson-orin", "jetson-orin-nano", "nvidia-gpu", "raspberry-pi-5"}
    assert run(["targets", "--json"]) == 0
    assert "cpu" in [target["name"] for target in json.loads(capsys.readouterr().out)]


def test_doctor_tells_versions_backends_and_folders(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", "/somewhere/else")
    monkeypatch.setenv("DEPLOYPIPE_DATA", "/for/good")
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "/somewhere/else" in out
    assert re.search(r"^data +/for/good$", out, re.MULTILINE)
    assert re.search(r"^torch +\d+\.\d+", out, re.MULTILINE)
    assert re.search(r"^onnxruntime +yes", out, re.MULTILINE)
    assert re.search(r"^openvino +(yes|no +pip install openvino)", out, re.MULTILINE)
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"] == "/somewhere/else"


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    for name, accuracy in (("a", 0.9), ("b", 0.95)):
        (tmp_path / name).mkdir()
        replace(REPORT, pruned=replace(REPORT.pruned, accuracy=accuracy)).save(tmp_path / name / "report.json")
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_compare_sorts_by_accuracy(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", *runs]) == 0
    outcomes, widths = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in outcomes.splitlines()] == ["run", runs[1], runs[0]]
    assert widths.split() == ["group", runs[1], runs[0], "stem.conv", "16", "->", "8", "16", "->", "8"]
    assert run(["compare", *runs, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(runs)


def test_report_shows_what_build_showed(
    pipeline: FakePipeline, runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.answer = Report.load(runs[0])
    assert run(["build", "--out", runs[0]]) == 0
    built = capsys.readouterr().out
    for way in (runs[0], f"{runs[0]}/report.json"):
        assert run(["report", way]) == 0
        assert capsys.readouterr().out == built


def test_without_a_command_the_help_is_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "build" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"deploypipe {deploypipe.__version__}\n"


def test_every_command_is_summed_up_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    summary = capsys.readouterr().out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert len(summary.splitlines()) == len(app.registered_commands)
    assert "..." not in summary, "cut off"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_no_command_is_missing() -> None:
    assert tuple(command.name for command in app.registered_commands) == COMMANDS


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_text_for_the_algorithm() -> None:
    assert parse_settings(["a=1", " b = x=y ", "c="]) == {"a": "1", "b": "x=y", "c": ""}


@pytest.mark.parametrize("settings", [["a"], ["=1"], [""], ["a=1", "a=2"]])
def test_settings_that_make_no_sense(settings: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_settings(settings)
    assert caught.value.at
    assert caught.value.fix


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError, 2), (ModelError, 3), (TargetError, 4), (BackendError, 5), (BudgetError, 6)]
)
def test_our_errors_end_with_their_code_and_three_parts(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], error: type[DeployPipeError], code: int
) -> None:
    pipeline.answer = error("it broke", at="there", fix="mend it")
    assert run(["build"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("error: it broke\n   at: there\n  fix: mend it\n")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("biuld", "unknown command 'biuld'\n   at: deploypipe\n  fix: did you mean 'build'?"),
        ("build --budgt 3", "unknown option '--budgt'\n   at: deploypipe build\n  fix: did you mean '--budget'?"),
        ("--versio", "unknown option '--versio'\n   at: deploypipe\n  fix: did you mean '--version'?"),
        ("build --epochs many", "invalid value for '--epochs'"),
        ("build --epochs -1", "invalid value for '--epochs'"),
        ("build --accuracy-floor 90", "invalid value for '--accuracy-floor'"),
        ("build extra", "unexpected extra argument"),
        ("report", "missing argument 'RUN'"),
        ("compare", "missing argument 'RUN RUN...'"),
        ("report nowhere", "there is no run 'nowhere'"),
        ("build --set x", "'x' is no KEY=VALUE"),
    ],
)
def test_usage_errors(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], line: str, expected: str) -> None:
    assert run(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
    assert "\n  fix: " in err
    assert "Traceback" not in err


def test_a_bug_is_written_to_a_file_and_its_path_shown(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path))
    pipeline.answer = ZeroDivisionError("division by zero")
    assert run(["build", "--seed", "3"]) == 1
    err = capsys.readouterr().err
    assert "a bug in deploypipe (ZeroDivisionError: division by zero)" in err
    assert "Traceback" not in err
    log = Path(re.search(r"at: (.*)", err)[1])
    assert log.is_relative_to(tmp_path)
    assert "Traceback" in log.read_text()
    assert "['build', '--seed', '3']" in log.read_text()


def test_a_bug_is_logged_elsewhere_if_the_cache_cannot_be_written(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipeline.answer = ZeroDivisionError()
    assert run(["build"]) == 1
    assert "Traceback" in Path(re.search(r"at: (.*)", capsys.readouterr().err)[1]).read_text()


@pytest.mark.parametrize(
    ("command", "hint"), [("build", "the same command resumes"), ("inspect", "run the same command again")]
)
def test_an_interruption_ends_with_130(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], command: str, hint: str
) -> None:
    pipeline.answer = KeyboardInterrupt()
    assert run([command]) == 130
    err = capsys.readouterr().err
    assert "error: interrupted" in err
    assert hint in err
    assert "Traceback" not in err


# --- as a process ----------------------------------------------------------------------------------------------------


def start(code: str, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], **pipes)


def test_ctrl_c_in_a_running_build() -> None:
    process = start("""
        import sys, time, types
        fake = types.ModuleType("deploypipe.pipeline")
        fake.Request = lambda *values, **options: options
        def build(request, reporter):
            reporter.stage("finetune", 100)
            time.sleep(60)
        fake.build = build
        sys.modules["deploypipe.pipeline"] = fake
        from deploypipe.cli.main import main
        sys.argv = ["deploypipe", "build"]
        main()
    """)
    assert process.stderr is not None
    assert process.stderr.readline() == "finetune ...\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "the same command resumes" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_being_terminated_ends_what_was_started_too(number: signal.Signals, code: int) -> None:
    process = start("""
        import sys, types
        fake = types.ModuleType("deploypipe.pipeline")
        fake.Request = lambda *values, **options: options
        def build(request, reporter):
            from deploypipe.runners.process import finish
            finish(["sh", "-c", "sleep 1; echo $$; exec sleep 60"], 100, stdout=sys.stderr)  # by then it is known here
        fake.build = build
        sys.modules["deploypipe.pipeline"] = fake
        from deploypipe.cli.main import main
        sys.argv = ["deploypipe", "build"]
        main()
    """)
    assert process.stderr is not None
    child = psutil.Process(int(process.stderr.readline()))
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (code, "")
    assert "the same command resumes" in err
    assert "Traceback" not in err
    assert not child.is_running()


@pytest.mark.parametrize("line", ["algos --json", "--help", "doctor"])
def test_a_reader_that_leaves_early_is_no_failure(line: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start(
        f"import sys; sys.argv = ['deploypipe', *{line.split()}]; from deploypipe.cli.main import main; main()", stdout=writer
    )
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 0


def test_a_reader_of_progress_that_leaves_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    lines = Lines(Left(), every_s=0.0)
    lines.stage("profile", 2)
    lines.advance(1)
    lines.note("go on")
    lines.close()
    monkeypatch.setattr(sys, "stderr", Left())
    console.problem("error: something")


@pytest.mark.parametrize("line", [f"report {'x' * 300}", f"bench {'x' * 300}.onnx", f"compare {'x' * 300} b"])
def test_paths_that_the_system_refuses_are_the_users_to_change(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    assert "a bug" not in (err := capsys.readouterr().err)
    assert len(err) < 900


@pytest.mark.parametrize("command", ["build", "profile", "bench a.onnx", "doctor --target cpu", "sensitivity"])
def test_a_host_without_a_name_is_refused(command: str, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    """As an unset variable of the shell gives: `--host "$BOARD"` would be this machine."""
    assert run([*command.split(), "--host", ""]) == 2
    assert "the host has no name" in capsys.readouterr().err
    assert not pipeline.got


def test_a_run_folder_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an unset variable of the shell gives: the command line must not make the current folder of it."""
    monkeypatch.chdir(tmp_path)
    assert run(["build", "--out", ""]) == 2
    assert not list(tmp_path.iterdir())


def test_a_locale_without_the_sign_ends_no_answer() -> None:
    code = "from deploypipe.cli import console, main; main.run = lambda _: console.answer('90 \\u00b1 1 %'); main.main()"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=True)
    assert done.stdout == b"90 ? 1 %\n"


def test_work_that_a_broken_pipe_ends_all_the_same_has_not_succeeded(pipeline: FakePipeline) -> None:
    pipeline.answer = BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert run(["build"]) == 1


def test_starting_imports_nothing_heavy_and_is_fast() -> None:
    heavy = [
        "torch",
        "torchvision",
        "onnx",
        "onnxruntime",
        "openvino",
        "executorch",
        "ncnn",
        "coremltools",
        "onnxscript",
        "scipy",
        "numpy",
        "sklearn",
        "lightning",
        "rich",
        "click",
    ]
    process = start(f"""
        import sys, deploypipe.cli.main
        print([name for name in {heavy} if name in sys.modules])
    """)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("[]\n", "")


def test_help_takes_less_than_three_tenths_of_a_second() -> None:
    """Processor time, so that a busy machine does not matter; the best of three, so that a cold disk does not either."""
    times = []
    for _ in range(3):
        before = os.times()
        process = start("import sys; sys.argv = ['deploypipe', '--help']; from deploypipe.cli.main import main; main()")
        process.communicate(timeout=60)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.3


# --- console ---------------------------------------------------------------------------------------------------------


def test_plain_progress_tells_the_time_left() -> None:
    now, out = [0.0], io.StringIO()
    lines = console.Lines(out, clock=lambda: now[0])
    lines.stage("finetune")
    lines.stage("finetune", 40)
    for second in range(1, 26):
        now[0] = float(second)
        lines.advance(second, "loss 0.5")
    lines.stage("export")
    lines.close()
    assert out.getvalue().splitlines() == [
        "finetune ...",
        "finetune 10 of 40, 30 s left  loss 0.5",
        "finetune 20 of 40, 20 s left  loss 0.5",
        "finetune done in 25.0 s",
        "export ...",
    ]


def test_plain_progress_without_a_known_length() -> None:
    now, out = [0.0], io.StringIO()
    lines = console.Lines(out, clock=lambda: now[0])
    lines.stage("search")
    now[0] = 11.0
    lines.advance(3)
    lines.advance(4)
    assert out.getvalue().splitlines() == ["search ...", "search 3"]


def test_bars_leave_a_line_for_each_stage() -> None:
    out = io.StringIO()
    with Progress(console=Console(file=out, force_terminal=True, width=100), transient=True) as bars:
        reporter = console.Bars(bars)
        reporter.stage("trace")
        reporter.stage("finetune", 3)
        reporter.stage("finetune", 4)
        assert [task.total for task in bars.tasks] == [4]
        reporter.advance(2, "loss")
        assert [task.completed for task in bars.tasks] == [2]
        reporter.reused("export")
        reporter.note("[bold] is shown as it is")
        reporter.stage("bench")
        reporter.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"trace +0\.0 s", text)
    assert re.search(r"finetune +0\.0 s", text)
    assert re.search(r"export +reused", text)
    assert "note: [bold] is shown as it is" in text
    assert re.search(r"bench +0\.0 s", text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], coloured: bool) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console.problem("error: it broke\n   at: there")
    assert terminal.getvalue() == ("\x1b[31merror:\x1b[0m" if coloured else "error:") + " it broke\n   at: there\n"


@pytest.mark.parametrize(
    ("variables", "kind"), [({}, console.Bars), ({"CI": "1"}, console.Lines), ({"TERM": "dumb"}, console.Lines)]
)
def test_bars_on_a_terminal_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], kind: type) -> None:
    for name in ("CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress() as reporter:
        assert isinstance(reporter, kind)
        reporter.stage("trace")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with console.progress() as reporter:
        assert isinstance(reporter, console.Lines)


def test_tables_are_aligned_and_end_without_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("name", "x"), [("a", "1"), ("longer", "")])
    assert capsys.readouterr().out == "name    x\na       1\nlonger\n"
    console.table(("name", "x"), [])
    assert capsys.readouterr().out == "name  x\n"


def test_a_failed_check_is_loud_in_the_summary(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.answer = replace(REPORT, checks=(Check("onnx", "compacted", 1.0, 1e-4, 8),))
    assert run(["build"]) == 0
    assert "FAILED: onnx differs" in capsys.readouterr().out
