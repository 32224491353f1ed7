"""Write what benchmarks found into docs: the methods at equal milliseconds, and how far latency predictions were off.

    python benchmarks/render.py

It reads benchmarks/results and measures nothing.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from latency import ALL, by_model, judged, read

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- evidence: written by `python benchmarks/render.py` -->", "<!-- end of evidence -->"
LATENCY = {"latency.csv": "ONNX Runtime", "latency-openvino.csv": "OpenVINO", "latency-avx2.csv": "ONNX Runtime, AVX2 only"}
HEAD = (
    "| row | epochs before + after | before tuning | accuracy | seeds | of dense, measured | us | MACs | parameters | minutes |"
)
Row = Mapping[str, str]
Part = tuple[str, str, str, str, str]  # model, training images (0: all), epochs, distillation, batch size


def column(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def line(name: str, rows: Sequence[Row]) -> str:
    """Return one row of the table: means over the seeds, of the accuracy the standard deviation as well."""
    accuracy = [100 * value for value in column(rows, "accuracy")]
    error = f" +- {stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
    minutes = mean(a + b for a, b in zip(column(rows, "plan_s"), column(rows, "train_s"), strict=True)) / 60
    cells = [
        f"`{name}`",
        f"{rows[0]['epochs_before']} + {rows[0]['epochs_after']}",
        f"{100 * mean(column(rows, 'before')):.1f} %",
        f"{mean(accuracy):.2f}{error} %",
        str(len(rows)),
        f"{100 * mean(column(rows, 'of_dense')):.1f} %",
        f"{mean(column(rows, 'us')):.0f}",
        f"{mean(column(rows, 'macs')) / 1e6:.1f} M",
        f"{mean(column(rows, 'params')) / 1e3:.0f} k",
        f"{minutes:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of every name, the most accurate name first."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["row"]].append(row)
    return dict(sorted(found.items(), key=lambda item: -mean(column(item[1], "accuracy"))))


def section(part: Part, rows: Sequence[Row]) -> str:
    """Return the table of one network and schedule."""
    model, images, epochs, distill, batch = part
    which = "all" if images == "0" else images
    taught = f"distillation {float(distill):g}" if float(distill) else "no distillation"
    lines = [line(name, same) for name, same in by_name(rows).items()]
    return "\n".join(
        [
            f"**{model}, {epochs} epochs in all on {which} training images, batch {batch}, {taught}**",
            "",
            HEAD,
            "|" + " --- |" * (HEAD.count(" | ") + 1),
            *lines,
        ]
    )


def plot(parts: Mapping[Part, Sequence[Row]], file: Path) -> None:
    """Draw accuracy against measured latency."""
    mpl.rcParams["svg.hashsalt"] = file.name  # else names within the file are drawn at random
    figure, axes = plt.subplots(1, len(parts), figsize=(6 * len(parts), 5), squeeze=False)
    for ax, (part, rows) in zip(axes[0], parts.items(), strict=True):
        for name, same in by_name(rows).items():
            x, y = 100 * mean(column(same, "of_dense")), 100 * mean(column(same, "accuracy"))
            ax.plot(x, y, "s" if name.startswith("torch-pruning") else "o", color="C1" if name.startswith("torch") else "C0")
            ax.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        ax.set(
            xlabel="% of the dense model's latency, measured",
            ylabel="accuracy, %",
            title=f"{part[0]}, {part[2]} epochs" + (f", {part[1]} images" if part[1] != "0" else ""),
        )
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def algorithms() -> str:
    """Return the plot, and one table for each network and schedule."""
    lines = (RESULTS / "algorithms.csv").read_text().splitlines()
    parts: dict[Part, list[Row]] = defaultdict(list)
    for row in csv.DictReader(text for text in lines if not text.startswith("#")):
        parts[row["model"], row["images"], row["epochs"], row["distill"], row["batch_size"]].append(row)
    plot(parts, DOCS / "algorithms.svg")
    return "\n\n".join(["![accuracy against latency](algorithms.svg)", *(section(part, parts[part]) for part in parts)])


PREDICTED = (
    *("model", "threads", "dense", "plans", "of dense", "off, after one factor", "off, relative to dense", "repeats within"),
    *("rank", "parts", "profile", "attempts", "date"),
)


def table(file: str) -> str:
    """Return the table of one file: models in the order of the bench, then threads."""
    lines = [f"| {' | '.join(PREDICTED)} |", "|" + " --- |" * len(PREDICTED)]
    rows = by_model(read(RESULTS / file)[1])
    for model, threads in sorted(rows, key=lambda key: (ALL.index(key[0]), key[1])):
        dense, found = rows[model, threads][0], judged(rows[model, threads])
        cells = [
            *(model, threads, f"{found['dense_us']:.0f} us", str(len(rows[model, threads]) - 1)),
            f"{100 * found['fastest']:.0f} to {100 * found['slowest']:.0f} %",
            *(f"{100 * found[name]:.1f} %" for name in ("mape", "relative", "scatter")),
            *(f"{found[name]:.3f}" for name in ("rank", "additivity")),
            *(f"{float(dense['profile_s']):.0f} s", dense["attempts"], dense["date"][:16].replace("T", " ")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def predictions() -> str:
    """Return one table for each runtime and machine."""
    tables = [f"**{title}** ([{file}](../benchmarks/results/{file}))\n\n" + table(file) for file, title in LATENCY.items()]
    return "\n\n".join(tables)


def write(document: Path, text: str) -> None:
    """Put the text between the marks of a document."""
    before, _, rest = document.read_text().partition(BEGIN)
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


def main() -> None:
    write(DOCS / "algorithms.md", algorithms())
    write(DOCS / "predictions.md", predictions())


if __name__ == "__main__":
    main()
