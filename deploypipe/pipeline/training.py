"""Stages that train: what an algorithm trains before it plans, fine-tuning, and other ways to the same architecture."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from deploypipe import saved
from deploypipe.algorithms.base import Problem
from deploypipe.algorithms.protocols import Rival
from deploypipe.data.load import Data
from deploypipe.errors import ModelError
from deploypipe.pipeline.stages import ready
from deploypipe.plan import KeepPlan
from deploypipe.progress import Reporter
from deploypipe.reports.report import Arm
from deploypipe.store import CHECKPOINT, Kept, Store
from deploypipe.training.evaluate import evaluate
from deploypipe.training.finetune import finetune
from deploypipe.training.hints import Hint
from deploypipe.training.masked import MaskedWeights
from deploypipe.training.settings import TrainHook, TrainSettings
from deploypipe.training.trainer import Trainer

TRAINED, TRAINED_EPOCHS = "trained.safetensors", "trained.json"


def trained(
    algorithm: Any,
    problem: Problem,
    data: Data | None,
    settings: TrainSettings,
    folder: Path | None = None,
    teacher: nn.Module | None = None,
) -> tuple[nn.Module, int]:
    """Return the model that the algorithm trains before it plans, and for how many epochs it did.

    Args:
        algorithm: With a method `train`.
        problem: What it is asked, with the user's model.
        data: What is trained on; None is enough for 0 epochs.
        settings: Of the run.
        folder: For checkpoints; without it nothing is resumed.
        teacher: Of distillation; default: the user's model.

    Raises:
        ModelError: The algorithm returned another architecture.
    """
    teacher = (teacher or problem.model) if settings.distill else None
    trainer = Trainer(data, settings, teacher=teacher, folder=folder, reporter=problem.reporter)
    model: nn.Module = algorithm.train(problem, trainer)
    if _architecture(model) != _architecture(problem.model):
        raise ModelError(
            f"algorithm '{algorithm.name}' returned another architecture after training",
            at=f"{type(algorithm).__name__}.train",
            fix="fold gates and return plain modules at full width; this is a bug of the algorithm",
        )
    return model.eval(), trainer.n_epochs


def train_stage(
    store: Store, algorithm: Any, problem: Problem, data: Data, settings: TrainSettings, key: Sequence[object]
) -> Kept[nn.Module]:
    """Train before planning, and keep the result; an interrupted training goes on where it was.

    How long is fine-tuned makes no difference.
    """
    settings = replace(settings, epochs=0)

    def train(folder: Path) -> None:
        model, epochs = trained(algorithm, problem, data, settings, folder / CHECKPOINT)
        saved.save_weights(model, folder / TRAINED)
        (folder / TRAINED_EPOCHS).write_text(json.dumps({"epochs": epochs}) + "\n")

    def read(root: Path) -> nn.Module:
        return saved.restore(problem.model, problem.graph, KeepPlan({}), root / TRAINED)

    return store.keep("train", [1, settings, *key], train, read)


def epochs_before(root: Path) -> int:
    """Return how many epochs were trained before planning."""
    file = root / TRAINED_EPOCHS
    return int(json.loads(file.read_text())["epochs"]) if file.is_file() else 0


def schedule(algorithm: Any, settings: TrainSettings, problem: Problem, plan: KeepPlan) -> TrainSettings:
    """Return the settings of fine-tuning: those of the run, or what the algorithm makes of them."""
    found = algorithm.schedule(settings, problem, plan) if hasattr(algorithm, "schedule") else settings
    return replace(settings, **asdict(found))


def tuning_hooks(algorithm: Any, problem: Problem, small: nn.Module, plan: KeepPlan) -> tuple[TrainHook, ...]:
    """Return what happens while fine-tuning: the algorithm's hooks, and zeros kept where its result is zeros."""
    hooks = tuple(algorithm.hooks(problem, small, plan)) if hasattr(algorithm, "hooks") else ()
    prunable = {layer.weight for layer in problem.graph.layers}  # other parameters may be zero: a gate that begins there
    return (*hooks, MaskedWeights.of_zeros(small, prunable)) if getattr(algorithm, "sparse", False) else hooks


def tuned(
    start: nn.Module,
    data: Data,
    settings: TrainSettings,
    dense: nn.Module,
    folder: Path,
    reporter: Reporter,
    hooks: Sequence[TrainHook] = (),
    hint: Hint | None = None,
) -> nn.Module:
    """Return `start` with renewed batch norms, then fine-tuned, taught by `dense` if the settings distill; resumable."""
    small = ready(start, data, settings)
    if not settings.epochs:
        return small
    teacher, file = dense if settings.distill else None, folder / CHECKPOINT / "state.safetensors"
    return finetune(small, data, settings, teacher=teacher, checkpoint=file, reporter=reporter, hooks=hooks, hint=hint)


def arms_stage(
    store: Store,
    rivals: Sequence[Rival],
    data: Data,
    dense: nn.Module,
    own: Arm,
    key: Sequence[object],
    reporter: Reporter,
    hint: Callable[[], Hint | None],
) -> Kept[list[Arm]]:
    """Train the other ways to the same architecture, each kept, and judge them on the test set; the run's own comes first.

    The dense model teaches those that learn from it as it teaches any pruned model: with the hint that `hint` finds.
    """
    others = [_rival(store, f"rival-{i}", rival, data, dense, key, reporter, hint) for i, rival in enumerate(rivals)]

    def collect(folder: Path) -> None:
        arms = [own, *(arm.value for arm in others)]
        (folder / "arms.json").write_text(json.dumps([asdict(arm) for arm in arms], indent=1) + "\n")

    def read(root: Path) -> list[Arm]:
        return [Arm(**row) for row in json.loads((root / "arms.json").read_text())]

    return store.keep("arms", [1, own, *others], collect, read)


def _rival(
    store: Store,
    stage: str,
    rival: Rival,
    data: Data,
    dense: nn.Module,
    key: Sequence[object],
    reporter: Reporter,
    hint: Callable[[], Hint | None],
) -> Kept[Arm]:
    def train(folder: Path) -> None:
        found = hint() if rival.settings.distill else None
        model = tuned(rival.start, data, rival.settings, dense, folder, reporter, hint=found)
        n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        accuracy = evaluate(model, data.test, reporter=reporter).top1
        arm = Arm(rival.name, rival.settings.seed, rival.settings.epochs, n_parameters, accuracy)
        (folder / f"{stage}.json").write_text(json.dumps(asdict(arm)) + "\n")

    return store.keep(
        stage,
        [1, rival.name, rival.settings, *key],
        train,
        lambda root: Arm(**json.loads((root / f"{stage}.json").read_text())),
    )


def _architecture(model: nn.Module) -> list[tuple[str, ...]]:
    modules: list[tuple[str, ...]] = [(name, type(module).__name__) for name, module in model.named_modules()]
    return modules + [(name, str(tuple(tensor.shape))) for name, tensor in model.state_dict().items()]
