"""What is known about the algorithms that choose without training first; the others are in `catalogue_learners`."""

from deploypipe.algorithms.info import Info
from deploypipe.algorithms.options import Option

_LI = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710"
_LIU = "Liu et al., Rethinking the Value of Network Pruning, ICLR 2019, arXiv:1810.05270"
_SCRATCH = "evaluation protocol: another method's architecture from fresh weights"
_ARMS = (
    Option("inner", "l2", "the method whose plan is trained, with its own defaults"),
    Option("train_epochs", 0, "E: epochs that the dense model was trained; 0 takes the run's", 0),
    Option("cap", 0.0, "most epochs of scratch-b, as a multiple of E; 0 for no limit", 0),
    Option("seeds", 1, "seeds of every way to train; a gain is named from 2 on", 1),
    Option("compare", True, "also train the other two ways, for the report"),
)
SCORERS: dict[str, Info] = {
    "erk": Info(
        "erk",
        "Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, arXiv:1911.11134",
        2020,
        "structured, static, from a trained model, magnitude with layer densities by rule",
        (),
        (Option("rule", "erk", "how the densities of layers differ", choices=("erk", "uniform", "uniform+")),),
    ),
    "halp": Info(
        "halp",
        "Shen et al., Structural Pruning via Latency-Saliency Knapsack, NeurIPS 2022, arXiv:2210.06659",
        2022,
        "structured, static, from a trained model, gradient and latency",
        ("data", "labels", "gradients"),
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
        (),
        (
            Option(
                "of",
                "weights",
                "what is scored: single weights, for densities of layers, or channels",
                choices=("weights", "channels"),
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
    "random-search": Info(
        "random-search",
        "Li et al., Revisiting Random Channel Pruning for Neural Network Compression, CVPR 2022, arXiv:2205.05676",
        2022,
        "structured, static, from a trained model, random search",
        ("data", "labels"),
        (
            Option("n", 50, "networks that are judged", 1),
            Option("r_min", 0.25, "smallest share of a group's channels that is drawn", 0, 1),
            Option("tolerance", 0.02, "how far below the budget a network's cost may be, as a share of it", 1e-4, 1),
            Option(
                "criterion",
                "l2",
                "which channels of a group stay",
                choices=("l1", "l2", "fpgm", "fermat", "gamma", "beta", "random"),
            ),
            Option("images", 1000, "training images that are held out to judge networks, at most half of all", 1),
            Option("norm_images", 1280, "training images that renew a network's batch norms", 1),
        ),
    ),
    "scratch-b": Info("scratch-b", _LIU, 2019, _SCRATCH + ", for the dense model's computation", ("training",), _ARMS),
    "scratch-e": Info("scratch-e", _LIU, 2019, _SCRATCH + ", for the dense model's epochs", ("training",), _ARMS),
    "taylor": Info(
        "taylor",
        "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv:1906.10771",
        2019,
        "structured, static, from a trained model, gradient",
        ("data", "labels", "gradients"),
        (
            Option(
                "on",
                "gate",
                "what is scaled to zero: a gate on the channel, or each weight of its filters by itself",
                choices=("gate", "weight"),
            ),
            Option("order", "first", "order of the expansion", choices=("first", "second")),
            Option("steps", 10, "pruning steps on the way to the budget", 1),
            Option("interval", 20, "mini-batches before each step", 1),
            Option("batch", 64, "images of one mini-batch", 2),
            Option("lr", 0.001, "learning rate while the network adapts; 0 only measures", 0),
            Option("probes", 1, "random probes of the Hessian for each mini-batch; 0 for its exact diagonal", 0),
            Option(
                "widths",
                "threshold",
                "what decides widths: one threshold, equal shares, or the exact allocator",
                choices=("threshold", "uniform", "shares"),
            ),
        ),
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
