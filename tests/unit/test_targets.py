from pathlib import Path

import pytest

from deploypipe.backends import load_backend
from deploypipe.errors import TargetError
from deploypipe.targets import list_targets, load_target

GOOD = 'name = "box"\n[build]\nbackend = "onnxruntime"\n[measure]\nthreads = 2\n'


def write(folder: Path, text: str, name: str = "box") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_with_defaults_for_what_it_leaves_out(tmp_path):
    target = load_target(write(tmp_path, GOOD))
    assert (target.name, target.build.backend, target.build.opset, target.measure.threads) == ("box", "onnxruntime", 20, 2)
    assert target.reach.via == "local"


def test_own_targets_come_before_packaged_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_target("cpu").measure.threads == 1
    write(tmp_path / "targets", GOOD.replace("box", "cpu"), "cpu")
    assert load_target("cpu").measure.threads == 2
    assert list_targets()["cpu"] == Path("targets/cpu.toml")


def test_replace_changes_facts_wherever_they_stand():
    target = load_target("cpu")
    changed = target.replace(threads=4, precision="fp16", title="x")
    assert (changed.measure.threads, changed.build.precision, changed.title) == (4, "fp16", "x")
    assert (target.measure.threads, target.build.precision) == (1, "fp32")
    assert changed.measure.runs == target.measure.runs
    with pytest.raises(TargetError, match="did you mean 'threads'"):
        target.replace(thread=4)
    with pytest.raises(TargetError, match="batch is 8"):
        target.replace(batch=8)


@pytest.mark.parametrize(
    ("like", "own", "expected"),
    [
        ("jetson-orin", '[build]\ntool = "/opt/trtexec"', ("tensorrt", "fp16", "/opt/trtexec", "ssh", "")),
        ("jetson", '[build]\nprecision = "fp32"', ("tensorrt", "fp32", "", "ssh", "")),  # itself like another
        ("raspberry-pi-5", '[reach]\npython = "~/venv/bin/python"', ("onnxruntime", "fp32", "", "ssh", "~/venv/bin/python")),
    ],
)
def test_a_target_is_like_another_but_for_the_keys_that_it_states(tmp_path, like, own, expected):
    target = load_target(write(tmp_path, f'name = "box"\nlike = "{like}"\n{own}\n'))
    build, reach = target.build, target.reach
    assert (build.backend, build.precision, build.tool, reach.via, reach.python) == expected
    assert (target.name, target.like, target.device, target.rates) == (
        "box", like, load_target(like).device, load_target(like).rates,
    )  # fmt: skip


def test_a_target_that_is_like_itself_is_refused(tmp_path):
    one, other = (write(tmp_path, f'name = "{name}"\nlike = "{tmp_path}/{like}.toml"\n', name) for name, like in ("ab", "ba"))
    with pytest.raises(TargetError, match=r"like itself: a -> b -> a[\s\S]*without like"):
        load_target(one)
    with pytest.raises(TargetError, match="b -> a -> b"):
        load_target(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "treads = 3\n", r"unknown key 'measure.treads'[\s\S]*box.toml: measure.treads[\s\S]*did you mean 'threads'"),
        (GOOD + "runs = true\n", r"'measure.runs' is True[\s\S]*type int"),
        (GOOD + "runs = 0\n", r"runs is 0[\s\S]*box.toml: measure.runs[\s\S]*use 1 or more"),
        (GOOD + "batch = 8\n", r"batch is 8[\s\S]*box.toml: measure.batch[\s\S]*of the model's example inputs"),
        (GOOD + "least_us = nan\n", r"least_us is nan[\s\S]*use 0 or more"),
        (GOOD + "least_us = inf\n", r"least_us is inf[\s\S]*measure.least_us"),
        (GOOD.replace("2", "100000"), r"threads is 100000[\s\S]*measure.threads[\s\S]*use 1 to 1024"),
        (GOOD + "[rates]\nquantum = 0\n", r"quantum is 0[\s\S]*box.toml: rates.quantum[\s\S]*use 1 or more"),
        (GOOD + "[rates]\nlaunch_us = -1\n", r"launch_us is -1[\s\S]*use 0 or more"),
        (GOOD + "[rates]\ntflops = nan\n", r"tflops is nan"),
        ('name = "box"\n', r"key 'build' is missing"),
        ('name = "box"\nbuild = 3\n', r"'build' must be a table"),
        ('name = "box"\n[build]\nopset = 20\n', r"key 'build.backend' is missing"),
        (GOOD.replace("box", "bax"), r"target calls itself 'bax'"),
        ("name = \n", r"target is not TOML"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, message):
    with pytest.raises(TargetError, match=message):
        load_target(write(tmp_path, text))


def test_a_host_without_a_way_there_is_refused(tmp_path):
    """This machine's latencies would stand under the board's name."""
    path = tmp_path / "board.toml"
    path.write_text('name = "board"\nlike = "cpu"\n[reach]\nhost = "pi@raspberrypi.local"\n')
    with pytest.raises(TargetError, match="is this machine") as caught:
        load_target(path)
    assert caught.value.at == f"{path}: reach.host"
    path.write_text('name = "board"\nlike = "cpu"\n[reach]\nvia = "ssh"\nhost = "pi@raspberrypi.local"\n')
    assert load_target(path).shown == "board at pi@raspberrypi.local"


@pytest.mark.parametrize(
    ("backend", "key", "user"),
    [
        ("onnxruntime", "binary", "onnxruntime-binary"),
        ("tensorrt", "binary", "onnxruntime-binary"),
        ("ncnn", "tool", "tensorrt"),
    ],
)
def test_what_the_runtime_does_not_read_is_no_silent_wish(backend, key, user):
    target = load_target("cpu").replace(**{"backend": backend, key: "/opt/program"})
    with pytest.raises(TargetError, match=f"{key} is '/opt/program', and {backend} uses none") as caught:
        load_backend(target)
    assert caught.value.at == f"target cpu: build.{key}"
    assert caught.value.fix == f'leave it out, or write backend = "{user}"'
    load_backend(target.replace(backend=user))


def test_like_names_files_as_the_file_sees_them(tmp_path, monkeypatch):
    (tmp_path / "base.toml").write_text('name = "base"\nlike = "cpu"\n[measure]\nruns = 7\n')
    (tmp_path / "mine.toml").write_text('name = "mine"\nlike = "base.toml"\n')
    monkeypatch.chdir("/")
    assert load_target(tmp_path / "mine.toml").measure.runs == 7


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(TargetError, match="did you mean 'cpu'"):
        load_target("cpuu")
    with pytest.raises(TargetError, match="there is no target file"):
        load_target("missing/box.toml")
    for name in ("~nosuch/box.toml", f"{'x' * 300}.toml"):
        with pytest.raises(TargetError, match="there is no target file"):
            load_target(name)
