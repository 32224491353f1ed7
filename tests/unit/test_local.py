import sys
import time
from pathlib import Path

import psutil
import pytest

from deploypipe.errors import BackendError
from deploypipe.job import PYTHON, Job
from deploypipe.runners.local import Local
from deploypipe.targets import Reach


def job(code, **options):
    return Job((PYTHON, "-c", code), **options)


@pytest.fixture
def local():
    return Local(Reach())


def test_files_are_pushed_and_pulled_and_the_folder_goes(local, tmp_path):
    (tmp_path / "in.txt").write_text("abc")
    code = "import os; open('out.txt', 'w').write(open('a').read() + open('b').read() + os.environ['C']); print(os.getcwd())"
    push = {"a": tmp_path / "in.txt", "b": b"def"}
    result = local.run(job(code, push=push, pull=("out.txt",), env={"C": "ghi"}), tmp_path / "into")
    assert result.pulled["out.txt"].read_text() == "abcdefghi"
    assert not Path(result.stdout.strip()).exists()
    assert (tmp_path / "in.txt").read_text() == "abc"


def test_a_failure_shows_the_end_of_what_the_program_said(local, tmp_path):
    with pytest.raises(BackendError, match="exit code 3: last words") as caught:
        local.run(job("import sys; print('last words', file=sys.stderr); sys.exit(3)"), tmp_path)
    assert "fix:" in str(caught.value)
    assert caught.value.exit_code == 5


def test_of_a_traceback_the_end_is_shown(local, tmp_path):
    with pytest.raises(BackendError) as caught:
        local.run(job("def f(): raise ValueError('one\\ntwo')\nf()"), tmp_path)
    assert caught.value.message.endswith("exit code 1: ValueError: one | two")


def test_a_missing_package_is_named_in_the_fix(local, tmp_path):
    with pytest.raises(BackendError, match="pip install a_module_that_is_not_there"):
        local.run(job("import a_module_that_is_not_there"), tmp_path)


def test_a_timeout_ends_the_program_and_its_children(local, tmp_path):
    mark = tmp_path / "pid"
    code = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(mark)!r}, 'w').write(str(p.pid)); p.wait()"
    start = time.monotonic()
    with pytest.raises(BackendError, match="did not end within 1 s"):
        local.run(job(code, timeout_s=1), tmp_path)
    assert time.monotonic() - start < 10
    child = int(mark.read_text())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")


def test_what_is_missing_is_said_before_and_after(local, tmp_path):
    with pytest.raises(BackendError, match="there is no file"):
        local.run(job("", push={"a": tmp_path / "nothing"}), tmp_path)
    with pytest.raises(BackendError, match=r"left no 'out\.txt'"):
        local.run(job("", pull=("out.txt",)), tmp_path)
    with pytest.raises(BackendError, match="cannot start 'no-such-program'"):
        local.run(Job(("no-such-program",)), tmp_path)


def test_the_interpreter_is_our_own(local, tmp_path):
    assert local.run(job("import sys; print(sys.executable)"), tmp_path).stdout.strip() == sys.executable


def test_a_working_folder_that_takes_no_files_is_named(tmp_path):
    for place in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(BackendError, match=r"no folder for jobs can be made[\s\S]*\[reach\] workdir") as caught:
            Local(Reach(workdir=str(place))).describe()
        assert str(place) in caught.value.at
