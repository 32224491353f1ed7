import pytest
import torch
from torch import nn

from deploypipe.backends.ort_mobile import OrtMobile, platform_of
from deploypipe.errors import TargetError
from deploypipe.export import export_onnx
from deploypipe.runners.local import Local
from deploypipe.targets import Reach, load_target

TARGET = load_target("cpu-ort-mobile")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    return export_onnx(net, torch.zeros(1, 3, 16, 16), tmp_path_factory.mktemp("model") / "model.onnx").path


@pytest.mark.parametrize(("arch", "word"), [("x86_64", "amd64"), ("arm64", "arm"), ("aarch64", "arm"), ("armv7l", "arm")])
def test_architectures_are_translated(arch, word):
    assert platform_of(TARGET.replace(arch=arch)) == word


def test_an_unknown_architecture_suggests_the_nearest():
    with pytest.raises(TargetError, match=r"no architecture 'arm65'[\s\S]*did you mean 'arm64'"):
        OrtMobile().describe_job(TARGET.replace(arch="arm65"))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "blocked"), [("x86_64", True), ("arm64", False)])
def test_only_files_for_amd64_have_the_blocked_layout(model, tmp_path, arch, blocked):
    """Without the platform the converter leaves it out, and the model takes twice as long; on arm it does not exist."""
    target = TARGET.replace(arch=arch)
    before = sorted(model.parent.iterdir())
    built = Local(Reach()).run(OrtMobile().build_job(model, target), tmp_path).pulled["artifact.ort"].read_bytes()
    assert built[4:8] == b"ORTM"
    assert (b"ReorderOutput" in built) == blocked
    assert sorted(model.parent.iterdir()) == before, "nothing is written beside the user's file"
