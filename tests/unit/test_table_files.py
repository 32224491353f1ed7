"""The files of a latency table when several processes work on one cache."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

from deploypipe.latency import files
from deploypipe.latency.files import Entry, Shape
from deploypipe.profiler import whole

ROUNDS = 200


def entry(kernel: int, n_in: int) -> Entry:
    shape = Shape("conv", (kernel, kernel), (1, 1), (0, 0), (1, 1), (0, 0), (8, 8), (8, 8), 1, 0)
    return Entry(shape, n_in, 8, 1.0, 1.0, 1.0, 9)


def writes_kernels(folder: Path, mine: int) -> None:
    for n_in in range(1, ROUNDS):
        files.write_kernels(folder, [entry(mine, n_in)])


def writes_plans(folder: Path, mine: int) -> None:
    for n in range(1, ROUNDS):
        whole._keep(folder / "plans.csv", {str(mine): 1 / n})


def adds(folder: Path, mine: int) -> None:
    for n_in in range(1, ROUNDS // 4):
        files.add_kernels(folder, [entry(mine, n_in)])


def at_once(work: Callable[[Path, int], None], folder: Path) -> list[int | None]:
    """Let two processes do the work, and return how they ended."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(folder, kernel)) for kernel in (3, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("work", [writes_kernels, writes_plans])
def test_processes_that_write_the_same_file_do_not_meet_in_a_temporary_one(tmp_path: Path, work: Callable) -> None:
    assert at_once(work, tmp_path) == [0, 0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".csv"]


def test_no_kernel_is_lost_that_another_process_adds(tmp_path: Path) -> None:
    assert at_once(adds, tmp_path) == [0, 0]
    wanted = {(kernel, n_in) for kernel in (3, 5) for n_in in range(1, ROUNDS // 4)}
    assert {(found.shape.kernel[0], found.n_in) for found in files.read_kernels(tmp_path)} == wanted


def test_a_kernel_that_is_added_again_replaces_the_first(tmp_path: Path) -> None:
    again = Entry(entry(3, 4).shape, 4, 8, 2.0, 2.0, 2.0, 9)
    for kernels in ([entry(3, 4), entry(3, 8)], [again]):
        files.add_kernels(tmp_path, kernels)
    assert files.read_kernels(tmp_path) == (again, entry(3, 8))


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    files.add_kernels(tmp_path, [entry(3, 4)])
    assert len(files.read_kernels(tmp_path)) == 1
