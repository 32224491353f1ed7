"""What is known about the algorithms that choose without training first; the others are in `catalogue_learners`."""

from deploypipe.algorithms.info import Info
from deploypipe.algorithms.options import Option

_LI = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710"
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
