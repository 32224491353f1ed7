"""What every runner must do.

In a test file of the package that adds one:

    from deploypipe.testing.runners import RunnerContract

    class TestMine(RunnerContract):
        @pytest.fixture
        def runner(self):
            runner = Mine(Reach("mine", host="..."))
            yield runner
            runner.close()

The device needs `sh` with `cat`, `cp`, `printf` and `sleep`; no Python, and no runtime.
"""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from deploypipe.errors import BackendError
from deploypipe.job import PYTHON, Job
from deploypipe.runners.base import Runner

HOSTILE = (
    "a b", "-rf", "$(id)", "`id`", "it's", 'say "hi"', "back\\slash", "new\nline", "*", "~", "~root", "a;b&c|d",
    "\u00fcn\u00ef",
)  # fmt: skip


def shell(code: str, *arguments: str, push: dict[str, Path | bytes] | None = None, pull: tuple[str, ...] = ()) -> Job:
    """Return a job that runs a shell script."""
    return Job(("sh", "-c", code, "sh", *arguments), push or {}, pull)


class RunnerContract:
    """Inherit it and give the fixture `runner`."""

    def test_it_says_where_it_runs(self, runner: Runner) -> None:
        """`place` is in every error, `here` decides whether a runtime has to be installed on this machine."""
        assert runner.place
        assert isinstance(runner.here, bool)

    def test_files_go_there_and_back(self, runner: Runner, tmp_path: Path) -> None:
        """Files and content are pushed under the names that the job gives them; the pulled ones lie in `into`."""
        source = tmp_path / "source"
        source.write_bytes(bytes(range(256)))
        job = shell("cat a b > c; echo said; echo warned >&2", push={"a": source, "b": b"more"}, pull=("c",))
        result = runner.run(job, tmp_path / "new" / "into")
        assert result.pulled["c"] == tmp_path / "new" / "into" / "c"
        assert result.pulled["c"].read_bytes() == bytes(range(256)) + b"more"
        assert (result.exit_code, result.stdout, result.stderr) == (0, "said\n", "warned\n")
        assert result.seconds > 0
        assert source.read_bytes() == bytes(range(256)), "what was pushed is a copy, or is left alone"

    def test_each_job_starts_in_an_empty_folder_that_goes(self, runner: Runner, tmp_path: Path) -> None:
        """Nothing of one job is there for the next."""
        first = runner.run(shell("echo x > left; pwd"), tmp_path).stdout.strip()
        result = runner.run(shell('ls -A; [ -e "$1" ] && echo "still there"; true', first, push={"only": b""}), tmp_path)
        assert result.stdout == "only\n"

    def test_nothing_is_read_by_a_shell(self, runner: Runner, tmp_path: Path) -> None:
        """Arguments, file names and environment arrive as they are."""
        names = tuple(f"back {name}" for name in HOSTILE)
        code = 'for n; do cp -- "./$n" "./back $n"; printf "%s|" "$n"; done; printf %s "$E"'
        job = Job(("sh", "-c", code, "sh", *HOSTILE), {n: n.encode() for n in HOSTILE}, names, {"E": "".join(HOSTILE)})
        result = runner.run(job, tmp_path / "into")
        assert result.stdout == "".join(f"{name}|" for name in HOSTILE) + "".join(HOSTILE)
        assert {name: path.read_text() for name, path in result.pulled.items()} == dict(zip(names, HOSTILE, strict=True))
        assert runner.run(shell('printf %s "$1"', "~/x"), tmp_path).stdout == "~/x"

    def test_a_pushed_program_can_be_started(self, runner: Runner, tmp_path: Path) -> None:
        """A file that is executable here is executable there."""
        program = tmp_path / "program"
        program.write_text("#!/bin/sh\necho started\n")
        program.chmod(0o700)
        assert runner.run(Job(("./program",), {"program": program}), tmp_path / "into").stdout == "started\n"

    def test_a_failure_says_what_where_and_how_to_fix_it(self, runner: Runner, tmp_path: Path) -> None:
        """In each way that a job can fail."""
        failures = {
            "exit code 3.*last words": shell("echo last words >&2; exit 3"),
            "cannot start 'no-such-program'": Job(("no-such-program",)),
            "left no 'missing'": shell("true", pull=("missing",)),
            "there is no file": shell("true", push={"a": tmp_path / "nothing"}),
            "disk is full": shell("echo 'cp: error: No space left on device' >&2; exit 1"),
            "ended by signal 9": shell("kill -9 $$"),
        }
        for message, job in failures.items():
            with pytest.raises(BackendError, match=message) as caught:
                runner.run(job, tmp_path / "into")
            assert caught.value.at, message
            assert caught.value.fix, message
        assert not (tmp_path / "into").exists() or not list((tmp_path / "into").iterdir()), "nothing half-written is left"

    def test_a_program_that_takes_too_long_is_ended_with_its_children(self, runner: Runner, tmp_path: Path) -> None:
        """And the device is free for the next job."""
        note = f"../child-{time.time_ns()}"
        job = shell('sleep 6543 & echo $! > "$1"; wait', note)
        start = time.monotonic()
        with pytest.raises(BackendError, match="did not end within") as caught:
            runner.run(replace(job, timeout_s=0.7), tmp_path)
        assert caught.value.fix
        assert time.monotonic() - start < 20
        look = (
            'p=$(cat "$1"); rm "$1"; i=0; while [ $i -lt 50 ] && kill -0 "$p" 2> /dev/null && '
            '! grep -q ") Z" "/proc/$p/stat" 2> /dev/null; do sleep 0.1; i=$((i + 1)); done; echo $i'
        )
        assert int(runner.run(shell(look, note), tmp_path).stdout) < 50, "the child lives on"

    def test_it_says_what_the_device_is(self, runner: Runner) -> None:
        """At least what every Unix tells."""
        machine = runner.describe()
        assert machine.arch
        assert machine.kernel
        assert machine.memory_bytes is None or machine.memory_bytes > 2**20

    def test_it_can_be_left_and_used_again(self, runner: Runner, tmp_path: Path) -> None:
        """`close` may come at any time, and twice."""
        runner.close()
        assert runner.run(shell("echo again"), tmp_path).stdout == "again\n"
        runner.close()
        runner.close()
        assert runner.run(shell("echo and again"), tmp_path).stdout == "and again\n"

    def test_the_interpreter_is_the_devices(self, runner: Runner, tmp_path: Path) -> None:
        """`{python}` in a job stands for it; where there is none, the error says so."""
        try:
            said = runner.run(Job((PYTHON, "-c", "print(6 * 7)")), tmp_path).stdout
        except BackendError as error:
            assert "python" in error.message.lower()  # noqa: PT017 - either way is right
        else:
            assert said == "42\n"
