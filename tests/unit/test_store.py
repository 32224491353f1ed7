"""The run directory: reuse, invalidation, crashes at every instant, locks and full disks."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploypipe.errors import UsageError
from deploypipe.folder import explained
from deploypipe.progress import Recorder
from deploypipe.store import CHECKPOINT, Kept, Store, digest, finished

STAGES = ("trace", "profile", "plan", "compact", "report")
RESULTS = ("trace.json", "profile.csv", "plan.json", "weights/a.bin", "weights/b.bin", "report.md")
OPTIONS = {"trace": 1, "profile": 1, "plan": 1, "compact": 1, "report": 1}
DEPENDENTS = {  # changing the option of the left one recomputes all of these and nothing else
    "trace": {"trace", "plan", "compact", "report"},
    "profile": {"profile", "plan", "compact", "report"},
    "plan": {"plan", "compact", "report"},
    "compact": {"compact", "report"},
    "report": {"report"},
}


def write(text: str, *names: str) -> Callable[[Path], None]:
    def compute(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{text} {name}\n" * 3)

    return compute


def read(*names: str) -> Callable[[Path], str]:
    return lambda root: "".join((root / name).read_text() for name in names)


def chain(root: Path, options: dict[str, int] = OPTIONS, log: Callable[[str], None] = lambda stage: None) -> str:
    """A diamond of five stages: trace and profile feed plan, plan and trace feed compact, all feed report."""

    def step(store: Store, stage: str, text: str, names: tuple[str, ...], after: tuple[Kept[str], ...]) -> Kept[str]:
        def compute(folder: Path) -> None:
            log(stage)
            write(text + "".join(kept.value for kept in after), *names)(folder)

        return store.keep(stage, [1, options[stage], *after], compute, read(*names))

    with Store(root) as store:
        trace = step(store, "trace", f"t{options['trace']}", ("trace.json",), ())
        profile = step(store, "profile", f"p{options['profile']}", ("profile.csv",), ())
        plan = step(store, "plan", f"k{options['plan']}", ("plan.json",), (trace, profile))
        small = step(store, "compact", f"c{options['compact']}", ("weights/a.bin", "weights/b.bin"), (trace, plan))
        return step(store, "report", f"r{options['report']}", ("report.md",), (plan, small)).value


def snapshot(root: Path) -> dict[str, bytes]:
    """Results only: key files hold times, hidden files are the store's own."""
    paths = [
        p for p in root.rglob("*") if p.is_file() and p.suffix != ".key" and not p.relative_to(root).parts[0].startswith(".")
    ]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written; only a power cut does. One test below minds fsync."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("clean")
    chain(root)
    return snapshot(root)


def test_a_second_run_computes_nothing_and_leaves_no_scraps(tmp_path: Path, clean: dict[str, bytes]) -> None:
    ran: list[str] = []
    first = chain(tmp_path, log=ran.append)
    assert ran == list(STAGES)
    assert chain(tmp_path, log=ran.append) == first
    assert ran == list(STAGES)
    assert snapshot(tmp_path) == clean
    assert sorted(clean) == sorted(RESULTS)
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize("changed", STAGES)
def test_a_changed_option_recomputes_exactly_what_depends_on_it(tmp_path: Path, changed: str) -> None:
    chain(tmp_path)
    ran: list[str] = []
    options = OPTIONS | {changed: 2}
    chain(tmp_path, options, ran.append)
    assert set(ran) == DEPENDENTS[changed]
    chain(tmp_path / "fresh", options)
    assert {n: b for n, b in snapshot(tmp_path).items() if not n.startswith("fresh")} == snapshot(tmp_path / "fresh")


def test_results_made_from_a_former_result_vanish_when_it_is_replaced(tmp_path: Path) -> None:
    chain(tmp_path)
    assert all(finished(tmp_path, stage) for stage in STAGES)
    with Store(tmp_path) as store:
        store.keep("trace", [1, 99], write("new", "trace.json"), read("trace.json"))
    assert {stage for stage in STAGES if finished(tmp_path, stage)} == {"trace", "profile"}
    assert sorted(snapshot(tmp_path)) == ["profile.csv", "trace.json"]


def test_a_failing_stage_leaves_the_former_results_whole(tmp_path: Path, clean: dict[str, bytes]) -> None:
    chain(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "plan.json").write_text("half")
        raise UsageError("no such budget")

    with Store(tmp_path) as store, pytest.raises(UsageError, match="no such budget"):
        store.keep("plan", [1, 7], fail, read("plan.json"))
    assert snapshot(tmp_path) == clean
    assert all(finished(tmp_path, stage) for stage in STAGES)
    assert not list((tmp_path / ".partial").rglob("plan.json"))


def test_files_that_the_new_result_lacks_are_removed(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.keep("export", [1], write("x", "model.onnx", "model.onnx.data"), read("model.onnx"))
        store.keep("export", [2], write("x", "model.onnx"), read("model.onnx"))
    assert sorted(snapshot(tmp_path)) == ["model.onnx"]


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_text("edited"), lambda p: p.write_bytes(p.read_bytes()[::-1])]
)
def test_a_damaged_result_is_noticed_and_computed_again(
    tmp_path: Path, clean: dict[str, bytes], damage: Callable[[Path], object]
) -> None:
    chain(tmp_path)
    damage(tmp_path / "plan.json")
    assert not finished(tmp_path, "plan")
    assert not finished(tmp_path, "report")
    ran: list[str] = []
    chain(tmp_path, log=ran.append)
    assert ran == ["plan"]  # the same content came out, so what was made from it still holds
    assert snapshot(tmp_path) == clean


def key_file(**damage: object) -> str:
    sound = {"wanted": "a", "result": "b", "after": {}, "files": {"plan.json": [1, "c"]}, "seconds": 1.0, "done": True}
    return json.dumps(sound | damage)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"schema": 99}', "-----BEGIN PRIVATE KEY-----",
     key_file(files=[]), key_file(files={"plan.json": 1}), key_file(files={"plan.json": [1]}), key_file(after=[]),
     key_file(seconds="long")],
)  # fmt: skip
def test_an_unreadable_key_file_is_no_result(tmp_path: Path, text: str) -> None:
    with Store(tmp_path) as store:
        store.keep("plan", [1], write("x", "plan.json"), read("plan.json"))
        (tmp_path / "plan.key").write_text(text)
        (tmp_path / "plan.json").unlink()
        assert not finished(tmp_path, "plan")
        assert not store.keep("plan", [1], write("x", "plan.json"), read("plan.json")).reused


def test_reporter_hears_what_ran_and_what_was_reused(tmp_path: Path) -> None:
    recorder = Recorder()
    with Store(tmp_path, recorder) as store:
        first = store.keep("plan", [1], write("x", "plan.json"), read("plan.json"))
        second = store.keep("plan", [1], write("x", "plan.json"), read("plan.json"))
        (tmp_path / "plan.json").unlink()
        store.keep("plan", [1], write("x", "plan.json"), read("plan.json"))
    assert (recorder.ran, recorder.was_reused) == (["plan", "plan"], ["plan"])
    assert "plan.json" in recorder.notes[0]
    assert (first.reused, second.reused) == (False, True)
    assert (first.key, first.value, first.seconds) == (second.key, second.value, second.seconds)


@dataclass(frozen=True)
class Options:
    budget: float
    keep: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 2), (1, "1"), (True, 1.5), (None, 0), ([1, 2], [2, 1]), ({"a": 1}, {"a": 2}), (Path("a"), Path("b")),
     (Options(0.5), Options(0.6)), (Options(0.5), Options(0.5, ("x",))), (["ab"], ["a", "b"])],
)  # fmt: skip
def test_different_parts_give_different_keys(tmp_path: Path, one: object, other: object) -> None:
    with Store(tmp_path) as store:
        store.keep("plan", [one], write("x", "plan.json"), read("plan.json"))
        assert store.keep("plan", [one], write("x", "plan.json"), read("plan.json")).reused
        assert not store.keep("plan", [other], write("x", "plan.json"), read("plan.json")).reused


def test_the_order_of_options_does_not_matter(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.keep("plan", [{"a": 1, "b": 2}], write("x", "plan.json"), read("plan.json"))
        assert store.keep("plan", [{"b": 2, "a": 1}], write("x", "plan.json"), read("plan.json")).reused


def test_a_part_without_a_stable_form_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path) as store, pytest.raises(TypeError, match="object has no stable form"):
        store.keep("plan", [object()], write("x", "plan.json"), read("plan.json"))


def test_two_stages_cannot_own_one_file(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.keep("plan", [1], write("x", "plan.json"), read("plan.json"))
        with pytest.raises(ValueError, match=r"plan\.json"):
            store.keep("other", [1], write("x", "plan.json"), read("plan.json"))


def test_a_file_of_the_user_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    with Store(tmp_path) as store, pytest.raises(UsageError, match=r"plan\.json.*not written by a run"):
        store.keep("plan", [1], write("x", "plan.json"), read("plan.json"))
    assert (tmp_path / "plan.json").read_text() == "mine"


def test_a_checkpoint_outlives_an_interruption_but_not_another_key(tmp_path: Path) -> None:
    seen: list[int] = []

    def train(stop: bool) -> Callable[[Path], None]:
        def compute(folder: Path) -> None:
            counter = folder / CHECKPOINT / "epoch"
            start = int(counter.read_text()) if counter.exists() else 0
            seen.append(start)
            assert [p.name for p in folder.iterdir()] == [CHECKPOINT]
            counter.write_text(str(start + 1))
            (folder / "half").write_text("half")
            if stop:
                raise KeyboardInterrupt
            (folder / "tuned").write_text(str(start + 1))

        return compute

    with Store(tmp_path) as store:
        for key, stop in ((1, True), (1, True), (2, True), (1, True), (1, False)):
            try:
                tuned = store.keep("finetune", [key], train(stop), read("tuned"))
            except KeyboardInterrupt:
                continue
            assert tuned.value == "2"
    assert seen == [0, 1, 0, 0, 1]
    assert sorted(snapshot(tmp_path)) == ["half", "tuned"]
    assert not (tmp_path / ".partial").exists()


# --- crashes ---------------------------------------------------------------------------------------------------------


def in_child(run: Callable[[], None]) -> int:
    """Run in a forked process; return its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(event_number: int) -> None:
    """Let the process die by SIGKILL right before its n-th change of the disk; what it reads in between changes nothing."""
    count, changes = 0, {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in changes or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            count += 1
            if count == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def log_into(path: Path) -> Callable[[str], None]:
    def log(stage: str) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{stage}\n".encode())
        os.close(descriptor)

    return log


def check_recovery(root: Path, log: Path, clean: dict[str, bytes], options: dict[str, int] = OPTIONS) -> None:
    """What is finished is right and is not computed again; what is not finished is; the result is as without a crash."""
    done = {stage for stage in STAGES if finished(root, stage)}
    log.unlink(missing_ok=True)
    chain(root, options, log_into(log))
    ran = log.read_text().split() if log.exists() else []
    assert len(ran) == len(set(ran))
    if options == OPTIONS:
        assert set(ran) == set(STAGES) - done
    assert snapshot(root) == clean
    assert not (root / ".partial").exists()


@pytest.mark.slow
def test_killed_before_any_file_operation_the_same_command_resumes(tmp_path: Path, clean: dict[str, bytes]) -> None:
    for number in range(1, 2000):
        root, log = tmp_path / str(number), tmp_path / f"{number}.log"
        status = in_child(lambda n=number, r=root: (kill_at(n), chain(r)))  # type: ignore[misc]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        check_recovery(root, log, clean)
    assert number > 10  # the hook did see the store at work


def test_killed_while_a_former_result_is_replaced_no_mixture_remains(tmp_path: Path) -> None:
    options = OPTIONS | {"trace": 2}
    chain(tmp_path / "new", options)
    expected, former = snapshot(tmp_path / "new"), tmp_path / "former"
    chain(former)
    olds = snapshot(former)
    for number in range(1, 2000, 2):
        root, log = tmp_path / str(number), tmp_path / f"{number}.log"
        chain(root)
        status = in_child(lambda n=number, r=root: (kill_at(n), chain(r, options)))  # type: ignore[misc]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        whole = {stage for stage in STAGES if finished(root, stage)}
        for stage, names in {
            "trace": ["trace.json"],
            "plan": ["plan.json"],
            "compact": ["weights/a.bin", "weights/b.bin"],
        }.items():
            if stage in whole:  # finished stages are all of the old or all of the new run
                side = expected if (root / "trace.json").read_bytes() == expected["trace.json"] else olds
                assert all((root / name).read_bytes() == side[name] for name in names)
        check_recovery(root, log, expected, options)
    assert number > 50


def test_killed_at_random_moments_until_it_gets_through(tmp_path: Path, clean: dict[str, bytes]) -> None:
    chance, start = random.Random(0), time.monotonic()
    assert in_child(lambda: chain(tmp_path / "undisturbed")) == 0
    takes = time.monotonic() - start  # milliseconds on one machine, tens of them on another
    for attempt in range(8):
        root, log = tmp_path / str(attempt), tmp_path / f"{attempt}.log"
        for _ in range(200):
            before = {stage for stage in STAGES if finished(root, stage)}
            log.unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                chain(root, log=log_into(log))
                os._exit(0)
            time.sleep(chance.uniform(0, 1.5 * takes))
            os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            ran = set(log.read_text().split()) if log.exists() else set()
            assert not ran & before
            if status == 0:
                break
        check_recovery(root, log, clean)


def test_every_file_is_on_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    replace_ = os.replace

    def fsync(descriptor: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def replace(source: Path, goal: Path) -> None:
        events.append(("move", Path(goal).name))
        replace_(source, goal)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with Store(tmp_path) as store:
        store.keep("plan", [1], write("x", "a.json", "b.json"), read("a.json"))
    folder = ("sync", tmp_path.name)
    key = [("sync", "plan.key"), ("move", "plan.key"), folder]
    files = [("move", "a.json"), folder, ("move", "b.json"), folder]
    assert events == [("sync", "a.json"), ("sync", "b.json"), *key, *files, *key]


# --- locks -----------------------------------------------------------------------------------------------------------


def test_two_processes_cannot_share_a_run_folder(tmp_path: Path) -> None:
    with Store(tmp_path):
        with pytest.raises(
            UsageError, match=f"another process works on this run folder \\(process {os.getpid()} on "
        ) as caught:
            Store(tmp_path).__enter__()
        assert "choose another --out" in caught.value.fix
    with Store(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    def hold() -> None:
        Store(tmp_path).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(hold) == -signal.SIGKILL
    assert (tmp_path / ".lock").read_text().startswith("process ")
    with Store(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_workers_that_outlive_a_killed_owner_for_a_moment_do_not_block_it(tmp_path: Path) -> None:
    def hold() -> None:
        Store(tmp_path).__enter__()
        if os.fork() == 0:  # a data loader's worker inherits the descriptor
            time.sleep(0.3)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(hold) == -signal.SIGKILL
    with Store(tmp_path):
        pass


def test_a_run_that_failed_before_its_first_result_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError), Store(tmp_path / "new"):
        raise UsageError("no such model")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with Store(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()


def test_two_processes_that_come_and_go_never_hold_the_lock_together(tmp_path: Path) -> None:
    """Each removes the folder when it leaves; a lock on a removed file must not count."""

    def work() -> None:
        for _ in range(300):
            try:
                with Store(tmp_path / "run"):
                    (tmp_path / "inside").mkdir()  # fails if another one is inside
                    (tmp_path / "inside").rmdir()
            except UsageError:
                continue

    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]


# --- folders that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_way_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match=r"taken' is a file, not a folder") as caught:
        Store(tmp_path / "taken" / below).__enter__()
    assert caught.value.fix


@contextmanager
def as_nobody() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("below", ["", "new/run"])
def test_a_folder_without_permission_is_explained(tmp_path: Path, below: str) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with as_nobody(), pytest.raises(UsageError, match="the folder cannot be written: Permission denied") as caught:
        Store(locked / below).__enter__()
    assert str(locked) in caught.value.at
    assert "--out" in caught.value.fix


def test_a_full_device_is_explained_and_nothing_half_written_remains(tmp_path: Path) -> None:
    def compute(folder: Path) -> None:
        (folder / "plan.json").write_text("half")
        with Path("/dev/full").open("w") as file:
            file.write("x")

    with Store(tmp_path) as store, pytest.raises(UsageError, match="the disk is full: No space left on device") as caught:
        store.keep("plan", [1], compute, read("plan.json"))
    assert caught.value.at
    assert "the same command then resumes" in caught.value.fix
    assert snapshot(tmp_path) == {}
    assert not list(tmp_path.rglob("plan*.json"))
    assert not finished(tmp_path, "plan")


def test_a_real_size_limit_in_the_middle_of_a_file_is_explained(tmp_path: Path) -> None:
    """The kernel refuses the write (RLIMIT_FSIZE), as a quota or a small disk would."""
    script = textwrap.dedent("""
        import sys
        from deploypipe.errors import UsageError
        from deploypipe.store import Store
        small = lambda folder: (folder / "a.json").write_text("a" * 100)
        large = lambda folder: (folder / "b.bin").write_bytes(b"b" * 100_000)
        with Store(sys.argv[1]) as store:
            a = store.keep("a", [1], small, lambda root: None)
            print(a.reused)
            try:
                store.keep("b", [1, a], large, lambda root: None)
            except UsageError as error:
                print(error)
                sys.exit(error.exit_code)
    """)
    command = [sys.executable, "-c", script, str(tmp_path)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    short = subprocess.run(command, check=False, preexec_fn=limit, capture_output=True, text=True, timeout=60)
    assert short.returncode == 2, short.stderr
    assert "error: the disk is full: File too large" in short.stdout
    assert str(tmp_path) in short.stdout
    assert sorted(snapshot(tmp_path)) == ["a.json"]
    again = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (again.returncode, again.stdout) == (0, "True\n")
    assert sorted(snapshot(tmp_path)) == ["a.json", "b.bin"]


def test_a_full_disk_is_recognised_behind_a_library_that_hides_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the disk is full"), explained(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_other_failures_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), explained(tmp_path):
        raise RuntimeError("a bug")
    with pytest.raises(PermissionError), explained(tmp_path):
        raise PermissionError(13, "Permission denied", "/somewhere/else")


def test_digest_is_the_sha256_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_key_files_say_what_a_result_was_made_from(tmp_path: Path) -> None:
    chain(tmp_path)
    record = json.loads((tmp_path / "compact.key").read_text())
    assert record["after"] == {
        stage: json.loads((tmp_path / f"{stage}.key").read_text())["result"] for stage in ("trace", "plan")
    }
    assert sorted(record["files"]) == ["weights/a.bin", "weights/b.bin"]
    assert record["done"] is True


def test_a_half_written_key_is_taken_for_no_other_stage_s_folder(tmp_path):
    (tmp_path / "run" / ".partial").mkdir(parents=True)
    (tmp_path / "run" / ".partial" / "plan-1.key").write_text("{")
    with Store(tmp_path / "run") as store:
        assert store.keep("plan", [1], write("x", "plan.json"), read("plan.json")).value.startswith("x plan.json")
