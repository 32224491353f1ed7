from dataclasses import replace

import pytest
import torch

from deploypipe.data.load import load_data
from deploypipe.models.demo import N_RIGHT, N_TEST, WEIGHTS, demo_net
from deploypipe.models.load import load_model
from deploypipe.train_demo import SETTINGS, train_demo
from deploypipe.training.evaluate import evaluate

torch.set_num_threads(1)


def test_shipped_weights_reach_the_stated_accuracy():
    loaded = load_model("demo")
    data = load_data("demo", normalise=loaded.normalise, size=loaded.input_shape)
    accuracy = evaluate(loaded.model, data.test)
    assert (round(accuracy.top1 * accuracy.n), accuracy.n) == (N_RIGHT, N_TEST)
    assert accuracy.top1 >= 0.98


def test_shipped_weights_are_small_and_of_this_model():
    assert WEIGHTS.stat().st_size < 1_000_000
    assert not loaded_keys() ^ set(demo_net().state_dict())


def loaded_keys():
    return set(load_model("demo").model.state_dict())


def test_demo_data_is_real_stratified_and_disjoint():
    data = load_data("demo")
    assert len(data.train) + len(data.test) == 1797
    for part, share in ((data.train, 0.8), (data.test, 0.2)):
        counts = torch.bincount(part.labels, minlength=10)
        assert counts.min() >= share * 174 - 1
    same = (data.train.pixels[:, None].flatten(2) == data.test.pixels[None, :60].flatten(2)).all(-1)
    assert not same.any()


@pytest.mark.slow
def test_training_command_is_reproducible(tmp_path, monkeypatch):
    """One epoch is enough to see that the command trains, and that it does so twice alike."""
    monkeypatch.setattr("deploypipe.train_demo.SETTINGS", replace(SETTINGS, epochs=1))
    first, second = (train_demo(tmp_path / name) for name in ("a", "b"))
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first.top1 > 0.3
