"""What is known about the algorithms that train before they choose."""

from deploypipe.algorithms.info import Info
from deploypipe.algorithms.options import Option

_WIDTHS = ("threshold", "uniform", "shares")
_TRAINING = ("data", "labels", "gradients", "training")


def _widths(default: str, meaning: str) -> Option:
    return Option("widths", default, meaning, choices=_WIDTHS)


LEARNERS: dict[str, Info] = {
    "depgraph": Info(
        "depgraph",
        "Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, arXiv:2301.12900",
        2023,
        "structured, static, from a trained model, penalty and magnitude of coupled groups",
        _TRAINING,
        (
            Option("train_epochs", 5, "epochs of training with the regulariser, before channels are chosen", 0),
            Option("reg", 5e-4, "weight of the regulariser", 0),
            Option("alpha", 4.0, "the weakest channel of a group decays 2^alpha times as fast as the strongest", 0, 20),
            Option("steps", 10, "rounds of scoring and cutting on the way to the budget", 1),
            _widths("threshold", "what decides widths: one threshold, equal shares, or the exact allocator"),
        ),
    ),
    "fpgm": Info(
        "fpgm",
        "He et al., Filter Pruning via Geometric Median for Deep Neural Networks Acceleration, CVPR 2019, arXiv:1811.00250",
        2019,
        "structured, static, from a trained model, redundancy",
        _TRAINING,
        (
            Option("train_epochs", 0, "epochs of training, filters zeroed softly after each; 0 prunes at once", 0),
            Option("norm_share", 0.0, "share of what goes that goes by the smallest norm first (mix)", 0, 1),
            _widths("uniform", "what decides widths: equal shares, one threshold, or the exact allocator"),
        ),
    ),
    "scp": Info(
        "scp",
        "Kang and Han, Operation-Aware Soft Channel Pruning using Differentiable Masks, ICML 2020, arXiv:2007.03938",
        2020,
        "structured, static, from a trained model, penalty on differentiable masks",
        _TRAINING,
        (
            Option("train_epochs", 5, "epochs of training with sampled masks, before channels are chosen", 0),
            Option("lambda_", 0.0, "weight of the penalty on the number of channels that stay; 0 lets reach decide", 0),
            Option("reach", 3.0, "how far a gradient of 1 times the penalty's weight moves a shift during the training", 0),
            Option("most", 0.3, "most that the penalty adds to the loss at the start, whatever reach says; 0 for no limit", 0),
            _widths("shares", "what decides widths: the exact allocator, one threshold, or equal shares"),
        ),
    ),
    "slimming": Info(
        "slimming",
        "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, arXiv:1708.06519",
        2017,
        "structured, static, from a trained model, penalty",
        _TRAINING,
        (
            Option("train_epochs", 5, "epochs of training with the penalty, before channels are chosen", 0),
            Option("lambda_", 0.0, "weight of the penalty; 0 lets reach decide", 0),
            Option("reach", 1.0, "how far the penalty alone can move a scale during the training", 0),
            _widths("shares", "what decides widths: the exact allocator, one threshold, or equal shares"),
        ),
    ),
    "smcp": Info(
        "smcp",
        "Humble et al., Soft Masking for Cost-Constrained Channel Pruning, ECCV 2022, arXiv:2211.02206",
        2022,
        "structured, static, from a trained model, magnitude or gradient and latency, soft masks",
        _TRAINING,
        (
            Option("train_epochs", 5, "epochs of training with soft masks, before channels are chosen", 0),
            Option("every", 80, "steps from one choice of channels to the next", 1),
            Option("warmup", 0.1, "share of the training before the first choice", 0, 1),
            Option("cooldown", 0.3, "share of the training after the last choice, with fixed masks", 0, 1),
            Option("decay", 2e-4, "decay of masked weights", 0),
            Option(
                "importance",
                "magnitude",
                "what an input channel is worth: sum of |w|, or |sum of w dE/dw|",
                choices=("magnitude", "taylor"),
            ),
        ),
    ),
}
