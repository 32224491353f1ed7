"""What a request names, opened: the model, its data, and its graph with the groups that the user keeps whole."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deploypipe.compact import compact
from deploypipe.count import MacTable
from deploypipe.data.batches import Samples, count, labels_of, seeded, take
from deploypipe.data.load import Data, load_data
from deploypipe.errors import ModelError
from deploypipe.factory import guarded
from deploypipe.graph import trace
from deploypipe.graph.outputs import copied
from deploypipe.models.load import Loaded, load_model
from deploypipe.pipeline.request import KEPT_BY_USER, Request
from deploypipe.pipeline.stages import real_inputs
from deploypipe.plan import KeepPlan
from deploypipe.progress import Reporter
from deploypipe.training.evaluate import logits, main_output
from deploypipe.types import Graph

_TRIED = 4  # samples of each part


@dataclass(frozen=True, eq=False)
class Given:
    """Model, data, some inputs of the training set for verification, and the channel graph."""

    loaded: Loaded
    data: Data
    inputs: list[tuple[Tensor, ...]]
    graph: Graph


def given(request: Request, reporter: Reporter, *, trains: bool = False) -> Given:
    """Open what the request names. A model that the data cannot be given to is found before anything slow.

    So is one that could not be trained once it is smaller, if it is to be trained (`trains`).

    Raises:
        DeployPipeError: By class: see `errors`.
    """
    loaded = load_model(str(request.model), request.weights)
    _check_inputs(loaded, request)
    size = loaded.input_shape if len(loaded.input_shape) in {2, 3} else None  # else of something that no file of images holds
    data = load_data(request.data, normalise=loaded.normalise, size=size, seed=request.seed, reporter=reporter)
    inputs = real_inputs(data, loaded.example)
    _check_samples(loaded.model, data)
    graph = trace(loaded.model, loaded.example).keeping(request.keep, KEPT_BY_USER)
    if trains:
        if not any(parameter.requires_grad for parameter in loaded.model.parameters()):
            fix = "set requires_grad on its parameters, or leave training out: --epochs 0"
            raise ModelError("the model has nothing to train: all of it is frozen", at=f"--model {request.model}", fix=fix)
        _check_gradients(loaded, f"--model {request.model}")
        _check_training(loaded.model, graph, f"--model {request.model}")
    loaded = replace(loaded, notes=(*loaded.notes, *_class_notes(loaded, len(data.classes))))
    return Given(loaded, data, inputs, graph)


def _class_notes(loaded: Loaded, n_classes: int) -> list[str]:
    """Say so if the model was made for other classes: accuracies then mean something only if these are its first ones."""
    with torch.no_grad():
        out = main_output(loaded.model(*copied(loaded.example)))
    if not isinstance(out, Tensor) or out.dim() != 2 or out.shape[1] == n_classes:
        return []
    return [f"the model has {out.shape[1]} outputs, the data {n_classes} classes: label 0 is taken to be output 0, and so on"]


def _check_inputs(loaded: Loaded, request: Request) -> None:
    """Refuse a model that needs more than one input: samples are pairs of one input and a label."""
    if len(loaded.example) == 1:
        return
    with torch.no_grad():
        guarded(
            lambda: loaded.model(*copied(loaded.example[:1])),
            f"the model takes {len(loaded.example)} inputs, and does not run with the first alone: --data gives no more",
            f"--model {request.model}",
            ModelError,
            "wrap it in a module of one input that makes the others; without data it can be used as it is: deploypipe inspect "
            "and profile, in Python deploypipe.prune(model, inputs, algo='l1', metric='macs') and deploypipe.compact",
        )


def _check_samples(model: nn.Module, data: Data) -> None:
    """Try some samples of both parts, so that what is wrong with the test set is not found after all training.

    Raises:
        ModelError: They do not fit the model, hold NaN, or the model gives NaN or two answers to the same input.
    """
    for part, samples in (("training", data.train), ("test", data.test)):
        at = f"the {part} set"
        images, labels = _some(samples, data.input_shape, at)
        with torch.no_grad(), seeded(0):
            first = logits(model, images.clone(), labels)
        if bool(torch.isnan(first).any()):
            fix = "look at the weights, and at how inputs are normalised"
            raise ModelError("the model's outputs are not all numbers", at=at, fix=fix)
        if part == "training":
            with torch.no_grad(), seeded(1):
                again = logits(model, images.clone(), labels)
            if not torch.allclose(first, again, rtol=1e-3, atol=1e-4):
                fix = "let forward draw in training mode only (F.dropout takes training=self.training)"
                raise ModelError("two passes over the same inputs differ in evaluation mode: forward draws", at=at, fix=fix)


def _some(samples: Samples, shape: tuple[int, ...], at: str) -> tuple[Tensor, Tensor]:
    """Return a few inputs, evenly spaced, and as many labels: the largest and the smallest of all where they are known."""
    places = torch.linspace(0, count(samples) - 1, min(_TRIED, count(samples))).long()
    with seeded(0):
        images, labels = take(samples, places)
    if tuple(images.shape[1:]) != shape:
        message = f"samples of shape {tuple(images.shape[1:])}, where training has {shape}"
        raise ModelError(message, at=at, fix="give both parts the same size")
    finite = [not image.is_floating_point() or bool(torch.isfinite(image).all()) for image in images]
    if not all(finite):
        message = f"sample {int(places[finite.index(False)])} holds NaN or infinities"
        raise ModelError(message, at=at, fix="leave such samples out of the data")
    known = labels_of(samples)
    return images, labels if known is None else _extremes(known, len(labels))


def _extremes(labels: Tensor, n: int) -> Tensor:
    """Return `n` labels, the largest and the smallest of all among them: if these two are in range, all are."""
    return torch.cat([labels.max()[None], labels.min().expand(n - 1)]) if n > 1 else labels.max()[None]


def _check_gradients(loaded: Loaded, at: str) -> None:
    """Refuse a forward through which no gradient flows."""
    with torch.enable_grad():
        out = main_output(loaded.model(*copied(loaded.example)))
    if isinstance(out, Tensor) and not out.requires_grad:
        fix = "take torch.no_grad, detach and .data out of forward, or leave training out: --epochs 0"
        raise ModelError("no gradient flows through the model's forward: it cannot be trained", at=at, fix=fix)


def _check_training(model: nn.Module, graph: Graph, at: str) -> None:
    """Refuse a model with layers that run in training mode only: the graph does not know them, so that no plan cuts them.

    Unless they read nothing that may be cut, which a trial with every group at a middle width shows.
    """
    try:
        only = sorted(_called(model, graph, training=True) - _called(model, graph, training=False))
    except Exception:  # it may not train on two images of the example; what is wrong is said when it is trained
        return
    if not only:
        return
    middle = {name: widths[len(widths) // 2] for name, widths in MacTable().candidates(graph).items()}
    small = compact(model, graph, KeepPlan.of_widths(middle), check=False)
    try:
        _called(small, graph, training=True)
    except Exception as error:
        raise ModelError(
            f"{', '.join(only)} run in training mode only, and cannot follow when the channels that they read go",
            at=at,
            fix="make the model without them (auxiliary classifiers are not deployed), or keep what they read: --keep NAME",
        ) from error


def _called(model: nn.Module, graph: Graph, *, training: bool) -> set[str]:
    """Return the modules with parameters of their own that a pass over two images calls; the model stays as it is."""
    twin, called = copy.deepcopy(model).train(training), set[str]()
    for name, module in twin.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda _module, _args, name=name: called.add(name))
    image, *more = graph.example
    with torch.no_grad(), seeded(0):
        twin(torch.cat([image, image]), *more)
    return called
