import pytest

from deploypipe.backends import load_backend
from deploypipe.runners import load_runner
from deploypipe.targets import list_targets, load_target


@pytest.mark.parametrize("name", sorted(list_targets()))
def test_every_target_loads_and_names_a_backend_and_a_runner(name):
    target = load_target(name)
    assert target.title
    assert load_backend(target).name == target.build.backend
    assert load_runner(target)
