"""Draw the README's figure and print its table from committed data: python -m study.figure"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LENGTH = "--total-steps 40000 --eval-every 4000"
LINES = {  # options: (label, color); legible in light and in dark
    LENGTH: ("none", "#7f7f7f"),
    f"{LENGTH} --norm batchnorm": ("batchnorm", "#d62728"),
    f"{LENGTH} --norm batchnorm --bn-policy-critic eval": (
        "batchnorm, --bn-policy-critic eval",
        "#1f9e5a",
    ),
}
PANELS = {
    "eval/return": "return in evaluation (sum of rewards)",
    "norm/actor_grad": "norm of the actor's gradient",
}


def iqm(x, axis=-1):
    """Interquartile mean."""
    return stats.trim_mean(x, 0.25, axis=axis)


def interval(values):
    """95 % bootstrap interval of the interquartile mean over seeds."""
    sample = (np.asarray(values),)
    result = stats.bootstrap(sample, iqm, n_resamples=10_000, method="percentile", rng=0)
    return result.confidence_interval


def read(file):
    """Return {scalar: {options: {seed: [(step, value), ...]}}}."""
    data = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with open(file) as lines:
        for row in csv.DictReader(lines):
            point = int(row["step"]), float(row["value"])
            data[row["scalar"]][row["options"]][int(row["seed"])].append(point)
    return data


def style():
    """Let figures be legible in light and in dark, and the same to the bit each time."""
    plt.rcParams |= {"text.color": "#808080", "axes.labelcolor": "#808080", "font.size": 11}
    plt.rcParams |= {"xtick.color": "#808080", "ytick.color": "#808080"}
    plt.rcParams |= {"axes.edgecolor": "#808080", "axes.spines.top": False}
    plt.rcParams |= {"axes.spines.right": False, "svg.hashsalt": "", "legend.frameon": False}


def main():
    data = read(HERE / "results" / "ddpg-halfcheetah.csv")
    style()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for ax, (scalar, title) in zip(axes, PANELS.items(), strict=True):
        for options, (label, color) in LINES.items():
            seeds = data[scalar][options]
            for points in seeds.values():
                ax.plot(*zip(*points, strict=True), color=color, alpha=0.35, linewidth=0.8)
            steps = [step for step, _ in next(iter(seeds.values()))]
            if any([step for step, _ in points] != steps for points in seeds.values()):
                raise SystemExit(f"{options}: a seed was stopped early; collect finished runs only")
            values = np.array([[value for _, value in points] for points in seeds.values()])
            ax.plot(steps, iqm(values, 0), color=color, linewidth=2.2, label=label)
        ax.set(xlabel="environment steps", title=title)
        ax.grid(color="#808080", alpha=0.2)
    axes[1].legend(loc="center")
    axes[1].set_yscale("log")
    figure.savefig(HERE / "figures" / "first.svg", transparent=True, metadata={"Date": None})

    print("| options | seeds | final return, IQM (95 % interval) | each seed |\n|---|---|---|---|")
    for options, (label, _) in LINES.items():
        last = [points[-1][1] for _, points in sorted(data["eval/return"][options].items())]
        low, high = interval(last)
        each = ", ".join(f"{x:.0f}" for x in last)
        print(f"| {label} | {len(last)} | {iqm(last):.0f} ({low:.0f} to {high:.0f}) | {each} |")


if __name__ == "__main__":
    main()
