"""What is known about the algorithms that train by a procedure of their own: rounds, supernets, heads, fusion."""

from deploypipe.algorithms.info import Info
from deploypipe.algorithms.options import Option

PROCEDURES: dict[str, Info] = {
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
    "dcff": Info(
        "dcff",
        "Lin et al., Training Compact CNNs for Image Classification using Dynamic-coded Filter Fusion, TPAMI 2023, arXiv:2107.06916",
        2023,
        "structured, static, trained from fresh weights, redundancy (similarity of filters)",
        ("data", "labels", "training"),
        (
            Option("train_epochs", 20, "epochs in which filters are fused and trained", 0),
            Option("start", "fresh", "weights that training starts from", choices=("fresh", "trained")),
            Option("rise", 10.0, "how fast mixtures sharpen: k times the number of epochs", 1e-3, 500),
        ),
    ),
    "dcp": Info(
        "dcp",
        "Zhuang et al., Discrimination-aware Channel Pruning for Deep Neural Networks, NeurIPS 2018, arXiv:1810.11809",
        2018,
        "structured, static, from a trained model, reconstruction and discrimination",
        ("data", "labels", "training"),
        (
            Option("train_epochs", 6, "epochs with auxiliary classifiers before selecting, over all stages", 0),
            Option("heads", 2, "auxiliary classifiers", 0),
            Option("lambda_", 1.0, "weight of the classifier's loss against the error of the outputs", 0),
            Option("images", 1000, "training images that the selection looks at", 2),
            Option("parts", 8, "passes over them in which all channels of a group join", 1),
            Option("lr", 0.003, "learning rate with which selected channels adapt", 0),
        ),
    ),
    "dkp": Info(
        "dkp",
        "Liu et al., Discrimination-aware Network Pruning for Deep Model Compression, TPAMI 2021, arXiv:2001.01050",
        2021,
        "kernels (semi-structured), static, from a trained model, reconstruction and discrimination",
        ("data", "labels", "training"),
        (
            Option("train_epochs", 6, "epochs with auxiliary classifiers before selecting, over all stages", 0),
            Option("heads", 2, "auxiliary classifiers", 0),
            Option("lambda_", 1.0, "weight of the classifier's loss against the error of the outputs", 0),
            Option("images", 1000, "training images that the selection looks at", 2),
            Option("parts", 8, "passes over them in which the kernels of a layer join", 1),
            Option("lr", 0.003, "learning rate with which selected kernels adapt", 0),
        ),
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
}
