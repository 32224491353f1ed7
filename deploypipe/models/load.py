"""Turn `--model` into a module and an example input: `demo`, `torchvision:NAME`, `timm:NAME`, or a factory of the user's."""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from deploypipe.data.batches import seeded
from deploypipe.data.images import IMAGENET, Normalise
from deploypipe.errors import ModelError, UsageError, nearest
from deploypipe.factory import find_factory, guarded, own_sources, source_file
from deploypipe.graph.outputs import copied, output_tensors
from deploypipe.models.demo import WEIGHTS, demo_net
from deploypipe.models.plain import fold_weights
from deploypipe.models.weights import fit_weights, read_weights
from deploypipe.training.checkpoint import state_digest

KINDS = ("demo", "torchvision:NAME", "timm:NAME", "file.py:factory", "package.module:factory")
_SEED = 0
_SHOWN = 3  # names in a note
DEFAULT_SHAPE = (1, 3, 224, 224)
_TRANSFORMING = ("googlenet", "inception_v3")  # trained on inputs of another mean and deviation, which the model makes itself
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # of Inception and GoogLeNet: for training only, never exported


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that is ready to be traced.

    Attributes:
        model: In eval mode.
        example: Arguments of one forward pass.
        spec: What was given; a file is named by its absolute path.
        key: Hash of the specification, the factory's file, the weights and the example's shapes.
        normalise: Mean and standard deviation per channel that the model wants its inputs normalised by, if known.
        notes: What the user should know.
    """

    model: nn.Module
    example: tuple[Tensor, ...]
    spec: str
    key: str
    normalise: Normalise | None
    notes: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first input without the batch axis."""
        return tuple(self.example[0].shape[1:])


@dataclass(frozen=True, eq=False)
class _Built:
    model: nn.Module
    example: tuple[Tensor, ...]
    normalise: Normalise | None
    is_default_example: bool = False


def load_model(spec: str = "demo", weights: str | Path | None = None) -> Loaded:
    """Build the model that `--model` names, fill it with `weights`, and run it once.

    Args:
        spec: One of `KINDS`. A factory takes no arguments and returns a module, or a module and its example inputs; the
            module may declare `example_inputs` or `input_size`, `mean` and `std`.
        weights: A safetensors file, or a state dict written by torch.save. Without it the demo has its own trained
            weights, a factory's model stays as the factory made it, and zoo models get random weights (seeded).

    Raises:
        UsageError: The specification is unknown, or a file, module or factory does not exist.
        ModelError: The factory fails, the weights do not fit, or the model cannot be run on its example.

    >>> load_model("demo").example[0].shape
    torch.Size([1, 1, 16, 16])
    """
    built = _build(spec)
    kind, _, name = spec.partition(":")
    notes = []
    if weights is not None:
        path = Path(os.path.expanduser(weights))  # noqa: PTH111 - Path.expanduser raises where there is no such user
        fit_weights(built.model, read_weights(path), f"--weights {weights}", unused=_AUXILIARY if kind == "torchvision" else ())
        if kind == "torchvision" and name in _TRANSFORMING:
            built.model.transform_input = True  # type: ignore[assignment]
            notes.append(f"{name} changes its inputs as torchvision's does with published weights (transform_input)")
    elif spec == "demo":
        fit_weights(built.model, read_weights(WEIGHTS), str(WEIGHTS))
    elif kind in _ZOOS:
        notes.append(f"{spec} has random weights; give trained ones with --weights FILE")
    before = _run_once(built, spec)
    if folded := fold_weights(built.model):
        _check_folded(before, _run_once(built, spec), spec)
        shown = ", ".join(folded[:_SHOWN]) + (", ..." if len(folded) > _SHOWN else "")
        notes.append(f"weights that were computed at every pass (as by weight norm) are plain ones from here on: {shown}")
    return Loaded(built.model, built.example, _absolute(spec), _key(spec, built), built.normalise, tuple(notes))


def _build(spec: str) -> _Built:
    kind, _, name = spec.partition(":")
    with seeded(_SEED):  # an untrained model must be the same one in every run
        if spec == "demo":
            built = _described(demo_net(), spec)
        elif kind in _ZOOS:
            if not name:
                raise UsageError("no model is named", at=f"--model {spec}", fix=f"write {kind}:NAME")
            built = _ZOOS[kind](name, spec)
        elif name:
            built = _from_factory(spec)
        else:
            raise UsageError(f"unknown model '{spec}'", at=f"--model {spec}", fix=nearest(spec, KINDS))
    built.model.eval()
    return built


def _from_torchvision(name: str, spec: str) -> _Built:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UsageError(
            f"torchvision has no classifier '{name}'",
            at=f"--model {spec}",
            fix=_near(name, names, "torchvision.models.list_models()"),
        )
    # Auxiliary classifiers exist in training only: eval mode never runs them, so nothing could keep them in step with pruning.
    extra = {"aux_logits": False, "init_weights": True} if name in _TRANSFORMING else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    published = list(torchvision.models.get_model_weights(name))
    transforms = published[-1].transforms() if published else None
    side = transforms.crop_size[0] if transforms else DEFAULT_SHAPE[-1]
    normalise = (tuple(transforms.mean), tuple(transforms.std)) if transforms else IMAGENET
    return _Built(model, (_example((1, 3, side, side)),), normalise)


def _from_timm(name: str, spec: str) -> _Built:
    if importlib.util.find_spec("timm") is None:
        raise UsageError("timm is not installed", at=f"--model {spec}", fix="pip install 'deploypipe[timm]'")
    import timm  # noqa: PLC0415 - an extra

    names = timm.list_models()
    if name.partition(".")[0] not in names:
        raise UsageError(f"timm has no model '{name}'", at=f"--model {spec}", fix=_near(name, names, "timm.list_models()"))
    model = guarded(partial(timm.create_model, name, pretrained=False), f"timm cannot build '{name}'", spec, ModelError)
    config: Mapping[str, Any] = model.pretrained_cfg
    return _Built(model, (_example((1, *config["input_size"])),), (tuple(config["mean"]), tuple(config["std"])))


_ZOOS: dict[str, Callable[[str, str], _Built]] = {"torchvision": _from_torchvision, "timm": _from_timm}


def _near(name: str, names: list[str], command: str) -> str:
    """Suggest from a list that is too long to print."""
    advice = nearest(name, names)
    return advice.partition(" (known")[0] if advice.startswith("did you mean") else f"{command} lists the names"


def _from_factory(spec: str) -> _Built:
    factory = find_factory(spec, option="--model", error=ModelError)
    with seeded(_SEED):  # anew: the import may have drawn numbers, and happens only once
        made = factory()
    made = (_uncompiled(made[0], spec), *made[1:]) if isinstance(made, tuple) and made else _uncompiled(made, spec)
    if isinstance(made, nn.Module):
        return _described(made, spec)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        example = _as_example(made[1], spec)
        return _Built(made[0], example, _declared_normalise(made[0], spec))
    what = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else f"a {type(made).__name__}"
    raise ModelError(
        f"the factory returned {what}", at=f"--model {spec}", fix="return an nn.Module, or (nn.Module, example inputs)"
    )


def _uncompiled(made: Any, spec: str) -> Any:
    """Return the module under `torch.compile`, which would compile what looks at it as well."""
    if isinstance(made, torch.jit.ScriptModule):
        fix = "return the module that was scripted or traced: a compiled one shows neither its layers nor lets them be replaced"
        raise ModelError("the factory returned a TorchScript module", at=f"--model {spec}", fix=fix)
    return getattr(made, "_orig_mod", made) if isinstance(made, nn.Module) else made


def _described(model: nn.Module, spec: str) -> _Built:
    """Read what a module declares about its input."""
    normalise = _declared_normalise(model, spec)
    given = getattr(model, "example_inputs", None)
    if given is not None:
        return _Built(model, _as_example(given, spec), normalise)
    size = getattr(model, "input_size", None)
    if size is None:
        return _Built(model, (_example(DEFAULT_SHAPE),), normalise, is_default_example=True)
    return _Built(model, (_example(_as_shape(size, spec)),), normalise)


def _as_example(given: Any, spec: str) -> tuple[Tensor, ...]:
    example = (given,) if isinstance(given, Tensor) else tuple(given) if isinstance(given, tuple | list) else ()
    if not example or not all(isinstance(part, Tensor) for part in example):
        raise ModelError(
            f"example inputs are a {type(given).__name__}", at=f"--model {spec}", fix="give a tensor or a tuple of tensors"
        )
    return example


def _as_shape(size: Any, spec: str) -> tuple[int, ...]:
    """Read `input_size`: 32, (32, 32), (3, 32, 32) or (1, 3, 32, 32)."""
    sizes = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
    if not 2 <= len(sizes) <= 4 or not all(isinstance(part, int) and part > 0 for part in sizes):
        fix = "declare (channels, height, width), or example_inputs"
        raise ModelError(f"input_size {size!r} is not a size", at=f"--model {spec}", fix=fix)
    return (*DEFAULT_SHAPE[: 4 - len(sizes)], *sizes)


def _declared_normalise(model: nn.Module, spec: str) -> Normalise | None:
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if not (isinstance(mean, tuple | list) and isinstance(std, tuple | list)):
        return None  # modules may have a method or a tensor of that name
    numbers = all(isinstance(value, int | float) for value in (*mean, *std))
    if not numbers or not mean or len(mean) != len(std) or min(std) <= 0:
        fix = "declare one mean and one positive std per channel"
        raise ModelError(f"mean {mean} and std {std} do not fit together", at=f"--model {spec}", fix=fix)
    return tuple(map(float, mean)), tuple(map(float, std))


def _example(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _run_once(built: _Built, spec: str) -> list[Tensor]:
    shapes = ", ".join("x".join(map(str, part.shape)) for part in built.example)
    fix = "check the model's forward"
    if built.is_default_example:
        fix = "this input is only the default: set input_size = (channels, height, width) or example_inputs on the module"
    with torch.no_grad():
        result = guarded(
            partial(built.model, *copied(built.example)),
            f"the model cannot be run on an input of {shapes}",
            f"--model {spec}",
            ModelError,
            fix,
        )
    return output_tensors(result)


def _check_folded(before: list[Tensor], after: list[Tensor], spec: str) -> None:
    if not all(
        torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in zip(before, after, strict=True)
    ):
        message = "the model changes when its computed weights (parametrizations) become plain ones: two layers share one"
        raise ModelError(message, at=f"--model {spec}", fix="take the parametrizations off in the factory")


def _absolute(spec: str) -> str:
    if spec == "demo" or spec.partition(":")[0] in _ZOOS:
        return spec
    path = source_file(spec)
    return spec if path is None else f"{path}:{spec.rpartition(':')[2]}"


def _key(spec: str, built: _Built) -> str:
    """Hash what the model is, not where its files lie."""
    path = None if spec == "demo" or spec.partition(":")[0] in _ZOOS else source_file(spec)
    name = spec if path is None else f"{path.name}:{spec.rpartition(':')[2]}"
    digest = hashlib.sha256(name.encode())
    if path:
        digest.update(path.read_bytes())
    for source in own_sources(spec, sorted({type(module).__module__ for module in built.model.modules()})):
        if source != path:
            digest.update(source.name.encode() + source.read_bytes())
    digest.update(state_digest(built.model).encode())
    digest.update(repr(([tuple(part.shape) for part in built.example], built.normalise)).encode())
    if getattr(built.model, "transform_input", False) is True:
        digest.update(b"transform_input")
    return digest.hexdigest()[:16]
