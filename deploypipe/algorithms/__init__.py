"""Pruning algorithms by name; importing this needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from deploypipe.algorithms.options import Option, options_of, parse_options
from deploypipe.plugins import known, resolve

ENTRY_POINTS = "deploypipe.algorithms"

ALGORITHMS: dict[str, str] = {
    "admm": "deploypipe.algorithms.admm:Admm",
    "autoslim": "deploypipe.algorithms.autoslim:AutoSlim",
    "erk": "deploypipe.algorithms.erk:Erk",
    "halp": "deploypipe.algorithms.halp:Halp",
    "l1": "deploypipe.algorithms.l1:L1",
    "l2": "deploypipe.algorithms.l2:L2",
    "lamp": "deploypipe.algorithms.lamp:Lamp",
    "lth": "deploypipe.algorithms.lth:Lth",
    "netadapt": "deploypipe.algorithms.netadapt:NetAdapt",
    "random": "deploypipe.algorithms.random:Random",
    "thinet": "deploypipe.algorithms.thinet:ThiNet",
}


@dataclass(frozen=True)
class Info:
    """What a user should know before choosing an algorithm.

    Attributes:
        name: As on the command line.
        paper: First author, title, venue, identifier.
        year: Of the paper.
        taxonomy: What is removed, when it is decided, and by what.
        needs: "data" and "labels" if it needs them.
        options: Its options with defaults and ranges.
    """

    name: str
    paper: str
    year: int
    taxonomy: str
    needs: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()


_LI = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710"
INFO: dict[str, Info] = {
    "admm": Info(
        "admm",
        "Zhang et al., A Systematic DNN Weight Pruning Framework using ADMM, ECCV 2018, arXiv:1804.03294",
        2018,
        "structured or unstructured, static, from a trained model, penalty with a moving target",
        ("data", "labels", "training"),
        (
            Option("scheme", "filter", "what becomes zero", choices=("filter", "channel", "unstructured", "2:4")),
            Option("train_epochs", 10, "epochs with the pull, before pruning", 0),
            Option("every", 1, "epochs between two projections", 1),
            Option("rho", 0.1, "strength of the pull at the start, of the order of the loss's curvature", 0),
            Option("growth", 1.4, "factor on rho after every projection", 1),
        ),
    ),
    "erk": Info(
        "erk",
        "Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, arXiv:1911.11134",
        2020,
        "structured, static, from a trained model, magnitude with layer densities by rule",
        (),
        (Option("rule", "erk", "how the densities of layers differ", choices=("erk", "uniform", "uniform+")),),
    ),
    "autoslim": Info(
        "autoslim",
        "Yu and Huang, AutoSlim: Towards One-Shot Architecture Search for Channel Numbers, 2019, arXiv:1903.11728",
        2019,
        "structured, static, from a trained model, greedy search on a supernet by measured latency",
        ("data", "labels", "training"),
        (
            Option("train_epochs", 10, "epochs in which the supernet is trained", 0),
            Option("start", "trained", "weights that the supernet starts from", choices=("trained", "fresh")),
            Option("n_random", 2, "random sub-networks of each step, beside the largest and the smallest", 0),
            Option("least", 0.15, "narrowest width of a sub-network, as a share of its group", 0, 1),
            Option(
                "prefer",
                "accuracy",
                "narrows where accuracy stays highest, or where least is lost for what is saved",
                choices=("accuracy", "ratio"),
            ),
            Option("images", 1000, "training images that are held out to judge candidates, at most half of all", 1),
            Option("norm_images", 512, "training images that renew a candidate's batch norms; 0 leaves them as they are", 0),
        ),
    ),
    "halp": Info(
        "halp",
        "Shen et al., Structural Pruning via Latency-Saliency Knapsack, NeurIPS 2022, arXiv:2210.06659",
        2022,
        "structured, static, from a trained model, gradient and latency",
        ("data", "labels"),
        (
            Option("steps", 10, "pruning steps on the way to the budget", 1),
            Option("interval", 20, "mini-batches before each step, whose saliencies are averaged", 1),
            Option("batch", 64, "images of one mini-batch", 2),
            Option("lr", 0.01, "learning rate while the network adapts; 0 only measures", 0),
        ),
    ),
    "l1": Info(
        "l1",
        _LI,
        2017,
        "structured, static, from a trained model, magnitude",
        (),
        (Option("greedy", False, "leave out the input channels that earlier layers have lost, when ranking"),),
    ),
    "l2": Info("l2", _LI, 2017, "structured, static, from a trained model, magnitude"),
    "lamp": Info(
        "lamp",
        "Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, arXiv:2010.07611",
        2021,
        "structured, static, from a trained model, magnitude with one global threshold",
    ),
    "lth": Info(
        "lth",
        "Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019, arXiv:1803.03635",
        2019,
        "unstructured, static, tickets from random weights found by rounds of training, magnitude",
        ("data", "labels", "training"),
        (
            Option("rounds", 5, "rounds of training and pruning", 1),
            Option("train_epochs", 5, "epochs of each round", 1),
            Option("rewind", 0, "optimizer steps after which the weights are those to go back to; 0 for the very start", 0),
            Option("start", "fresh", "weights of the start: drawn anew, or those that were loaded", choices=("fresh", "given")),
            Option("scope", "global", "one threshold for all weights, or one for each layer", choices=("global", "layer")),
            Option(
                "control",
                "ticket",
                "what the masks of the last round are put on",
                choices=("ticket", "reinit", "random-mask", "finetune"),
            ),
        ),
    ),
    "netadapt": Info(
        "netadapt",
        "Yang et al., NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications, ECCV 2018, arXiv:1804.03230",
        2018,
        "structured, static, from a trained model, greedy search by latency and accuracy",
        ("data", "labels"),
        (
            Option("reduction", 0.025, "what the first round takes off the cost, as a share of the dense cost", 1e-4, 1),
            Option("decay", 0.96, "factor on the reduction from one round to the next", 0.01, 1),
            Option(
                "prefer",
                "accuracy",
                "takes the most accurate, or the smallest loss of accuracy for what is saved",
                choices=("accuracy", "ratio"),
            ),
            Option("images", 512, "training images that are held out to judge candidates, at most half of all", 1),
            Option("norm_images", 256, "training images that renew a candidate's batch norms; 0 leaves them as they are", 0),
            Option("steps", 0, "steps of short-term training before a candidate is judged", 0),
            Option("lr", 0.001, "learning rate of the short-term training", 0),
        ),
    ),
    "random": Info(
        "random",
        "Li et al., Revisiting Random Channel Pruning for Neural Network Compression, CVPR 2022, arXiv:2205.05676",
        2022,
        "structured, static, baseline",
    ),
    "thinet": Info(
        "thinet",
        "Luo et al., ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression, ICCV 2017, arXiv:1707.06342",
        2017,
        "structured, static, from a trained model, reconstruction",
        ("data",),
        (
            Option("images", 2000, "selection images whose activations are read", 1),
            Option("locations", 10, "random (filter, position) pairs read for each image and layer", 1),
            Option("ridge", 1e-6, "ridge of the least squares, as a share of the mean squared contribution", 1e-9, 1),
        ),
    ),
}


def algorithms() -> dict[str, dict[str, Any]]:
    """Return what is known about every algorithm, our own and installed ones, as plain values by name."""
    own = {name: asdict(info) for name, info in INFO.items()}
    return {name: own.get(name, {"name": name, "plugin": place}) for name, place in known(ALGORITHMS, ENTRY_POINTS).items()}


def make(name: str, options: Mapping[str, object] | None = None) -> Any:
    """Return the algorithm called `name` with these options, given as text or as values.

    Raises:
        UsageError: There is no such algorithm or option, or a value has another type or is out of range.

    >>> make("l1", {"greedy": "yes"})
    L1(greedy=True)
    """
    algorithm = resolve(name, ALGORITHMS, ENTRY_POINTS, what="algo")
    return algorithm(**parse_options(name, options or {}, options_of(algorithm)))
