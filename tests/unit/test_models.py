import copy
import os
import random
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deploypipe.data.batches import seeded
from deploypipe.data.load import load_data
from deploypipe.errors import DeployPipeError, ModelError, UsageError
from deploypipe.graph import trace
from deploypipe.models.load import load_model

torch.set_num_threads(1)
EXAMPLES = Path(__file__).parents[2] / "examples"
RESNET = f"{EXAMPLES / 'cifar_resnet.py'}:resnet20"

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3))

def plain(): return Net()
def sized():
    net = Net(); net.input_size = (3, 20, 24); net.mean = (0.1, 0.2, 0.3); net.std = [1, 2, 3]; return net
def square():
    net = Net(); net.input_size = 16; return net
def pair(): return Net(), torch.ones(2, 3, 9, 9)
def declared():
    net = Net(); net.example_inputs = (torch.zeros(1, 3, 7, 7),); return net
def number(): return 7
def triple(): return Net(), 1, 2
def broken():
    width = {"a": 1}
    return Net(width["b"])
def inside_torch(): return nn.Conv2d(3, 4, 3)(torch.zeros(1, 5, 9, 9))
def quits(): raise SystemExit(3)
def wrong_default(): return nn.Linear(5, 2)
def negative_std():
    net = Net(); net.mean = (0,); net.std = (0,); return net
def no_mean():
    net = Net(); net.mean = (); net.std = (); return net
def named_mean():
    net = Net(); net.mean = ("red",); net.std = (1,); return net
def odd_size():
    net = Net(); net.input_size = "32"; return net
instance = Net()
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(FACTORIES)
    return str(path)


def error_of(spec: str, weights: Path | None = None) -> DeployPipeError:
    with pytest.raises(DeployPipeError) as caught:
        load_model(spec, weights)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("plain", (1, 3, 224, 224)),
        ("sized", (1, 3, 20, 24)),
        ("square", (1, 3, 16, 16)),
        ("pair", (2, 3, 9, 9)),
        ("declared", (1, 3, 7, 7)),
    ],
)
def test_example_comes_from_the_factory_or_the_module(net, name, shape):
    loaded = load_model(f"{net}:{name}")
    assert loaded.example[0].shape == shape
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.normalise == (((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)) if name == "sized" else None)
    assert loaded.input_shape == shape[1:]


def test_spec_is_absolute_so_that_it_works_from_elsewhere(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load_model("net.py:sized")
    monkeypatch.chdir("/")
    again = load_model(loaded.spec).model
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in loaded.model.state_dict().items()}


def test_untrained_weights_and_key_are_the_same_in_every_call(net):
    torch.manual_seed(5)
    first = load_model(f"{net}:plain")
    state = torch.get_rng_state()
    second = load_model(f"{net}:plain")
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    assert torch.equal(first.model.conv.weight, second.model.conv.weight)
    assert first.key == second.key


@pytest.mark.parametrize("spec", ["{folder}/net_of_parts.py:make", "net_of_parts:make"])
@pytest.mark.parametrize("edited", ["net_of_parts", "parts_of_net", "acts_of_parts", "numbers_of_net", "late_for_net"])
def test_key_follows_all_of_the_users_own_files(tmp_path, monkeypatch, spec, edited):
    """Also those that the factory's file imports, and that these import: a forward that was edited is another model.

    A number says not where it was imported from, nor does anything that a function imports.
    """
    files = {
        "net_of_parts": "import parts_of_net\ndef make():\n    from late_for_net import WIDTH\n"
        "    return parts_of_net.Net(WIDTH)\n",
        "parts_of_net": "from torch import nn\nfrom acts_of_parts import act\nclass Net(nn.Conv2d):\n"
        "    def __init__(self, width): super().__init__(3, width, 3)\n"
        "    def forward(self, x): return act(super().forward(x))\n",
        "acts_of_parts": "from torch.nn.functional import leaky_relu\nfrom numbers_of_net import SLOPE\n"
        "def act(x): return leaky_relu(x, SLOPE)\n",
        "numbers_of_net": "SLOPE = 0.1\n",
        "late_for_net": "WIDTH = 4\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    spec = spec.format(folder=tmp_path)
    key = load_model(spec).key
    assert load_model(spec).key == key
    (tmp_path / "unused.py").write_text("x = 1\n")
    assert load_model(spec).key == key
    (tmp_path / f"{edited}.py").write_text(files[edited] + "# changed\n")
    assert load_model(spec).key != key
    for name in files:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_key_follows_file_factory_weights_and_not_the_folder(net, tmp_path):
    key = load_model(f"{net}:plain").key
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "net.py").write_text(FACTORIES)
    assert load_model(f"{moved / 'net.py'}:plain").key == key
    (moved / "net.py").write_text(FACTORIES + "\n# changed\n")
    assert load_model(f"{moved / 'net.py'}:plain").key != key
    assert load_model(f"{net}:square").key != key
    state = load_model(f"{net}:plain").model.state_dict()
    state["conv.bias"] += 1
    save_file(state, tmp_path / "w.safetensors")
    assert load_model(f"{net}:plain", tmp_path / "w.safetensors").key != key


def test_a_changed_file_is_imported_anew(net):
    assert load_model(f"{net}:plain").model.conv.out_channels == 4
    Path(net).write_text(FACTORIES.replace("width=4", "width=6"))
    assert load_model(f"{net}:plain").model.conv.out_channels == 6


def test_an_edit_of_equal_size_within_the_same_second_is_seen(net, monkeypatch):
    """Bytecode is kept by second and size: this once ran the file as it was before the edit."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = Path(net)
    before = path.stat()
    assert load_model(f"{net}:plain").model.conv.out_channels == 4
    path.write_text(FACTORIES.replace("width=4", "width=6"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_model(f"{net}:plain").model.conv.out_channels == 6


def test_package_spec_and_neighbour_import(tmp_path, monkeypatch):
    (tmp_path / "pkg_of_test").mkdir()
    (tmp_path / "pkg_of_test" / "__init__.py").write_text("")
    (tmp_path / "pkg_of_test" / "nets.py").write_text(FACTORIES)
    (tmp_path / "user.py").write_text("from pkg_of_test.nets import pair\n")
    monkeypatch.chdir(tmp_path)
    paths = list(sys.path)
    assert load_model("pkg_of_test.nets:pair").example[0].shape == (2, 3, 9, 9)
    assert load_model("user.py:pair").example[0].shape == (2, 3, 9, 9)
    assert sys.path == paths
    assert "nets" in error_of("pkg_of_test.net:pair").message or "pkg_of_test.net" in error_of("pkg_of_test.net:pair").message


@pytest.mark.parametrize("wrap", ["plain", "nested", "module.", "_orig_mod.module.", "nested module.", "nested twice", "net."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_files(net, tmp_path, wrap, suffix):
    trained = {name: torch.full_like(tensor, 3) for name, tensor in load_model(f"{net}:plain").model.state_dict().items()}
    prefix = wrap.rpartition(" ")[2] if wrap.endswith(".") else ""
    state = {prefix + name: tensor for name, tensor in trained.items() if "num_batches" not in name}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        nested = {"epoch": 3, "state_dict": state} if "nested" in wrap else state
        torch.save({"model": nested} if "twice" in wrap else nested, path)
    model = load_model(f"{net}:plain", path).model
    assert all(bool((parameter == 3).all()) for parameter in model.parameters())
    assert bool((model.norm.running_var == 3).all())


def test_weights_that_do_not_fit_name_the_tensors(net, tmp_path):
    state = load_model(f"{net}:plain").model.state_dict()
    del state["norm.weight"]
    state["norm.bias"] = torch.zeros(9)
    state["head.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "w.safetensors")
    error = error_of(f"{net}:plain", tmp_path / "w.safetensors")
    assert isinstance(error, ModelError)
    for part in ("1 missing: norm.weight", "1 not in the model: head.weight", "norm.bias (9,) instead of (4,)"):
        assert part in error.message


def test_weights_that_cannot_be_used(net, tmp_path):
    spec = f"{net}:plain"
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    state = load_model(spec).model.state_dict()
    state["conv.bias"][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    assert "damaged" in error_of(spec, tmp_path / "garbage.safetensors").message
    assert "damaged" in error_of(spec, tmp_path / "garbage.pt").message
    assert "its code is not run" in error_of(spec, tmp_path / "module.pt").message
    assert "not tensors" in error_of(spec, tmp_path / "numbers.pt").message
    assert "not finite: conv.bias" in error_of(spec, tmp_path / "nan.safetensors").message
    missing = error_of(spec, tmp_path / "garbag.pt")
    assert isinstance(missing, UsageError)
    assert "'garbage.pt'" in missing.fix


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.to(torch.int32), "conv.bias whole numbers instead of float"),
        (lambda t: t.to(torch.complex64), "conv.bias complex instead of float"),
        (lambda t: t.to_sparse(), "conv.bias sparse float instead of float"),
        (lambda t: torch.full_like(t, float("inf")).to(torch.float8_e5m2), "not finite: conv.bias"),
    ],
)
def test_weights_of_another_kind_are_refused(net, tmp_path, change, words):
    state = load_model(f"{net}:plain").model.state_dict()
    torch.save({**state, "conv.bias": change(state["conv.bias"])}, tmp_path / "w.pt")
    assert words in error_of(f"{net}:plain", tmp_path / "w.pt").message


def test_an_empty_weights_file_is_called_so(net, tmp_path):
    torch.save({}, tmp_path / "w.pt")
    assert error_of(f"{net}:plain", tmp_path / "w.pt").message == "the weights file is empty"


def test_compiled_modules_are_unwrapped_or_refused(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def plain():\n    net = nn.Sequential(nn.Conv2d(3, 4, 3)); net.input_size = 8; return net\n"
        "def wrapped(): return torch.compile(plain())\n"
        "def paired(): return torch.compile(plain()), torch.zeros(1, 3, 8, 8)\n"
        "def scripted(): return torch.jit.script(plain())\n"
    )
    for name in ("wrapped", "paired"):
        assert type(load_model(f"{tmp_path / 'net.py'}:{name}").model) is nn.Sequential
    assert "TorchScript" in error_of(f"{tmp_path / 'net.py'}:scripted").message


def test_a_pickle_in_a_weights_file_is_not_executed(net, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    error_of(f"{net}:plain", tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_wrong_names_suggest_the_nearest(net):
    assert "'net.py'" in error_of(f"{Path(net).with_name('nett.py')}:plain").fix
    assert "'plain'" in error_of(f"{net}:plian").fix
    assert "'resnet18'" in error_of("torchvision:resnet-18").fix
    assert "'demo'" in error_of("dmo").fix
    assert "elsewhere" in error_of(f"{Path(net).parent / 'elsewhere' / 'net.py'}:plain").fix
    for spec in (
        "dmo",
        f"{net}:plian",
        "torchvision:",
        f"{net}:",
        "no_such_package.nets:f",
        "not a module:f",
        f"{net}:instance",
    ):
        assert error_of(spec).exit_code == 2, spec


def test_advice_lists_what_could_be_meant_and_nothing_else(net, tmp_path):
    folder = tmp_path / "project"
    (folder / "runs.py").mkdir(parents=True)
    for name in ("README.md", "net.safetensors", "net.pt", ".hidden.py"):
        (folder / name).write_text("")
    missing, weights = f"{folder / 'nett.py'}:make", folder / "nett.pt"
    assert error_of(missing).fix == f"there is no Python file in '{folder}'"
    assert error_of(f"{net}:plain", weights).fix == "did you mean 'net.pt'? (known: net.pt, net.safetensors)"
    assert error_of(f"{net}:plain", Path(net).with_name("w.pt")).fix.startswith("there is no .safetensors, .pt or .pth file in")
    for number in range(30):
        (folder / f"z{number}.py").write_text("")
    (folder / "net.py").write_text("")
    fix = error_of(missing).fix
    assert fix.startswith("did you mean 'net.py'? (known: net.py, z")
    assert fix.count(".py") == 1 + 20, "of many, those that are most alike"
    assert (
        error_of(f"{net}:plain", folder / "no" / "such" / "net.pt").fix == f"the folder '{folder / 'no'}' does not exist either"
    )
    assert error_of(f"{net}:plain", Path(net) / "net.pt").fix == f"'{net}' is a file, not a folder"
    assert error_of(f"{net}:plain", Path("/zzz-net.pt")).fix.startswith("there is no"), "the system's folders are no answer"


def test_a_relative_import_that_the_file_gives_up_is_no_error(tmp_path, monkeypatch):
    package = tmp_path / "sole"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text(
        "from torch import nn\ntry:\n    from ..common import f\nexcept ImportError:\n    f = None\n"
        "def make():\n    net = nn.Conv2d(3, 4, 3); net.input_size = 8; return net\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_model("sole.net:make").example[0].shape == (1, 3, 8, 8)


@pytest.fixture
def somebody_else():
    """A folder for what the process may not read. Where it is the system's owner, who may read everything, it looks as another.

    Not one of pytest's own folders: those above it are closed to others, and shared by the tests that run beside this one.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        owner = os.geteuid()

        @contextmanager
        def looking():
            os.seteuid(65534 if owner == 0 else owner)
            try:
                yield
            finally:
                os.seteuid(owner)

        yield folder, looking
        for place in (folder / "locked", folder / "locked" / "net.py"):
            place.chmod(0o755)


@pytest.mark.parametrize("locked", ["folder", "file"])
def test_what_may_not_be_read_is_the_users_to_allow(somebody_else, locked):
    folder, looking = somebody_else[0] / "locked", somebody_else[1]
    (folder / "inner").mkdir(parents=True)
    (folder / "net.py").write_text(FACTORIES)
    (folder if locked == "folder" else folder / "net.py").chmod(0)
    with looking():
        found = [error_of(f"{folder / 'net.py'}:plain"), error_of("demo", folder / "inner" / "w.pt")]
        with pytest.raises(UsageError) as caught:
            load_data(f"imagefolder:{folder}")
    assert [error.exit_code for error in found] == [2, 2]
    if locked == "folder":
        closed = f"the folder '{folder}' cannot be looked at: Permission denied"
        assert [error.fix for error in found] == [closed, closed], "whether what is asked for exists cannot be told"
        assert "cannot be looked at" in caught.value.message
    else:
        assert "cannot be read" in found[0].message


COMPUTED = """
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune
def net(norm=lambda layer: layer):
    made = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.Conv2d(8, 6, 3)), nn.Flatten(), nn.Linear(96, 4))
    made.input_size = 8
    return made
def masked(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return prune.random_unstructured(layer, "weight", 0.5)
def frozen(layer):
    return parametrizations.weight_norm(layer.requires_grad_(False))
def plain(): return net()
def weight(): return net(parametrizations.weight_norm)
def spectral(): return net(parametrizations.spectral_norm)
def old_weight(): return net(utils.weight_norm)
def old_spectral(): return net(utils.spectral_norm)
def masks(): return net(masked)
def fixed(): return net(frozen)
def shared():
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    made[1].weight = made[0].weight
    parametrizations.spectral_norm(made[0])
    made.example_inputs = torch.randn(1, 4)
    return made
"""


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", ["weight", "spectral", "old_weight", "old_spectral", "masks", "fixed"])
def test_computed_weights_become_plain_ones_and_the_function_stays(tmp_path, name):
    file = tmp_path / "computed.py"
    file.write_text(COMPUTED)
    scope: dict[str, Any] = {}
    exec(COMPUTED, scope)
    with seeded(0):
        before = scope[name]().eval()
    loaded, plain = load_model(f"{file}:{name}"), load_model(f"{file}:plain")
    assert sorted(loaded.model.state_dict()) == sorted(plain.model.state_dict())
    torch.testing.assert_close(loaded.model(*loaded.example), before(*loaded.example))
    assert [p.requires_grad for _, p in sorted(loaded.model.named_parameters())][:2] == [name != "fixed"] * 2
    assert loaded.notes[-1].endswith("plain ones from here on: 0.weight, 2.weight")
    assert not plain.notes
    graph = trace(loaded.model, loaded.example)
    assert {group.name: group.fixed == "" for group in graph.groups} == {"0": True, "2": True, "4": False}
    assert {*dict(before.named_parameters())} != {*dict(loaded.model.named_parameters())}, "there was nothing to fold"
    loaded.model(*loaded.example).sum().backward()
    copy.deepcopy(loaded.model)  # which older weight norms cannot be after a backward pass


def test_a_computed_weight_that_another_layer_shares_is_refused(tmp_path):
    (tmp_path / "computed.py").write_text(COMPUTED)
    error = error_of(f"{tmp_path / 'computed.py'}:shared")
    assert "the model changes when its computed weights" in error.message


@pytest.mark.parametrize("place", ["~nosuchuser/net.py", "x" * 300 + ".py"])
def test_paths_that_cannot_be_are_missing(place):
    assert "there is no file" in error_of(f"{place}:make").message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_published_weights_of_inception_get_the_inputs_that_they_were_trained_on(name, tmp_path):
    """torchvision's own rule: ImageNet's mean and deviation outside, those of TensorFlow inside."""
    plain = load_model(f"torchvision:{name}")
    save_file(plain.model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model(f"torchvision:{name}", tmp_path / "w.safetensors")
    assert any("transform_input" in note for note in loaded.notes)
    x = plain.example[0][:, :, :96, :96]
    mean, std = (torch.tensor(values)[:, None, None] for values in plain.normalise)
    heard = []
    for model in (loaded.model, plain.model):
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    with torch.no_grad():
        loaded.model(x), plain.model(((x * std + mean) - 0.5) / 0.5), plain.model(x)
    torch.testing.assert_close(heard[0], heard[1])
    assert (heard[0] - heard[2]).abs().max() > 0.5
    assert loaded.key != plain.key
    graph = trace(loaded.model, (x,))
    assert len(graph.prunable) == len(trace(plain.model, (x,)).prunable)


def test_failing_factories_point_into_the_users_file(net):
    line = FACTORIES.splitlines().index('    return Net(width["b"])') + 1
    error = error_of(f"{net}:broken")
    assert isinstance(error, ModelError)
    assert "KeyError: 'b'" in error.message
    assert error.at == f'{net}:{line}: return Net(width["b"])'
    inside = error_of(f"{net}:inside_torch")
    assert inside.at.startswith(f"{net}:"), "the frame in the user's file, not the one in torch"
    assert "SystemExit" in error_of(f"{net}:quits").message


def test_broken_files(tmp_path):
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "imports.py").write_text("import torch\nimport no_such_thing\ndef f(): ...\n")
    syntax = error_of(f"{tmp_path / 'syntax.py'}:f")
    assert "SyntaxError" in syntax.message
    assert f"{tmp_path / 'syntax.py'}:1" in syntax.at
    imports = error_of(f"{tmp_path / 'imports.py'}:f")
    assert "no_such_thing" in imports.message
    assert f"{tmp_path / 'imports.py'}:2" in imports.at


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("number", "returned a int"),
        ("triple", "returned (Net, int, int)"),
        ("negative_std", "do not fit together"),
        ("no_mean", "do not fit together"),
        ("named_mean", "do not fit together"),
        ("odd_size", "input_size '32'"),
        ("wrong_default", "cannot be run on an input of 1x3x224x224"),
    ],
)
def test_unusable_models(net, name, text):
    error = error_of(f"{net}:{name}")
    assert isinstance(error, ModelError)
    assert text in error.message
    assert name != "wrong_default" or "only the default" in error.fix


def test_torchvision_declares_its_own_input():
    loaded = load_model("torchvision:mobilenet_v3_small")
    assert loaded.example[0].shape == (1, 3, 224, 224)
    assert loaded.normalise == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert "random weights" in loaded.notes[0]


def test_timm_without_timm(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'deploypipe[timm]'" in error_of("timm:resnet18").fix


def resnet_module():
    model = load_model(RESNET).model
    return sys.modules[type(model).__module__]


def test_cifar_resnet_select_equals_slice_and_pad():
    module = resnet_module()
    select, literal = load_model(RESNET).model.train(), load_model(RESNET + "_sliced").model.train()
    assert list(select.state_dict()) == list(literal.state_dict()), "the fixed weight is not part of the state dict"
    literal.load_state_dict(select.state_dict())
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(select(x), literal(x), rtol=0, atol=1e-6)
    z = torch.randn(2, 16, 8, 10)
    assert torch.equal(module.SelectShortcut(16, 32)(z), module.SliceShortcut(16, 32)(z))


@pytest.mark.parametrize(("name", "n_parameters"), [("resnet20", 269_722), ("resnet32", 464_154), ("resnet56", 853_018)])
def test_cifar_resnets_have_the_published_sizes(name, n_parameters):
    model = load_model(RESNET.replace("resnet20", name)).model
    assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters
    names = set(model.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.bias"} <= names


@pytest.mark.parametrize("place", ["~nosuch/w.pt", "x" * 300])
def test_weights_that_cannot_be_are_missing(place):
    assert "there is no weights file" in error_of("demo", Path(place)).message


def test_weights_under_numbers_are_refused(tmp_path):
    torch.save({0: torch.zeros(2)}, tmp_path / "w.pt")
    assert "holds '0', not tensors under names" in error_of("demo", tmp_path / "w.pt").message


def test_a_factory_that_draws_from_numpy_or_python_makes_the_same_model_every_time(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "drawn.py").write_text("""
import random
import numpy as np
import torch
from torch import nn

def net():
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    made[0].weight.data = torch.from_numpy(np.random.randn(4, 3, 3, 3)).float() * random.random()
    return made
""")
    spec = f"{tmp_path / 'drawn.py'}:net"
    before = random.getstate(), np.random.get_state()[1].tolist()
    first, second = load_model(spec), load_model(spec)
    assert first.key == second.key
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before, "and the caller's numbers go on as they would"
