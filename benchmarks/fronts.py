"""Draws the fronts of benchmarks.learning: what was learned over what was forgotten.

    python -m benchmarks.fronts FILE.json [FILE.json ...] --titles TEXT [TEXT ...] --out PICTURE.svg

A file is what `python -m benchmarks.learning --json FILE` wrote, and becomes a panel. A point is one evaluation of an
arm at one learning rate, the mean over its seeds, with a bar from the least to the largest of them; the line joins the
points of an arm that no other point of the same arm beats. Needs matplotlib (the benchmark extra).
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.learning import front, learned  # noqa: E402

NAMES = {
    "recipe": "SDFT, recipe facts",
    "recipe-at-1": "the same with teacher_temperature 1",
    "facts-without-anchors": "SDFT without anchors",
    "sft": "SFT",
    "sft+replay": "SFT with anchors replayed",
}
COLOURS = ("#1b6ca8", "#c0392b", "#e8a33d", "#5aa9d6", "#6b4fa0", "#4d9a57")


def draw(axes: plt.Axes, results: dict[str, dict[str, list[dict]]]) -> None:
    """results: of each arm and learning rate the evaluated points, as benchmarks.learning writes them."""
    for (arm, rates), colour in zip(results.items(), COLOURS, strict=False):
        found = [point for points in rates.values() for point in points if point["step"] > 0]
        for point in found:
            least, most = ((point["spread"]["trained"][i] + point["spread"]["other"][i]) / 2 for i in (0, 1))
            axes.vlines(point["kl"], least, most, colors=colour, linewidth=0.8, alpha=0.5)
        axes.scatter(
            [p["kl"] for p in found], [learned(p) for p in found], s=14, color=colour, alpha=0.55, linewidths=0
        )
        best = sorted(front(found), key=lambda point: point["kl"])
        # The markers show a front of one point as well.
        axes.plot(
            [p["kl"] for p in best], [learned(p) for p in best],
            color=colour, marker="o", markersize=5, label=NAMES.get(arm, arm),
        )  # fmt: skip
    axes.set_xscale("log", subs=[1, 2, 3, 5])
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("KL to the start on unrelated prompts, nats/token")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--titles", nargs="+", default=[], help="one for each file")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure, panels = plt.subplots(
        1, len(args.files), figsize=(5.2 * len(args.files), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, file in zip(panels[0], args.files, strict=True):
        draw(axes, json.loads(file.read_text()))
    for axes, title in zip(panels[0], args.titles, strict=False):
        axes.set_title(title, fontsize=10)
    panels[0][0].set_ylabel("new facts answered right, mean of both wordings")
    panels[0][0].legend(fontsize=8, loc="lower right", frameon=False)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
