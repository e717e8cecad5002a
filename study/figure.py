"""Draw the README's curves and print their tables from committed data: python -m study.figure"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SHORT, LONG = "--total-steps 40000 --eval-every 4000", "--total-steps 100000"
CROSSQ = (
    "--norm batchrenorm --norm-position input post --bn-momentum 0.01 --bn-policy-critic eval"
    " --bn-joint --adam-beta1 0.5 --policy-delay 3 --critic-hidden-sizes 512 512"
    " --no-target-network"
)
RETURN = "return in evaluation (sum of rewards)"
FIGURES = {  # name: results, {options: (label, color)}, {scalar: title}; legible in light and dark
    "first": (
        "ddpg-halfcheetah",
        {
            SHORT: ("none", "#7f7f7f"),
            f"{SHORT} --norm batchnorm": ("batchnorm", "#d62728"),
            f"{SHORT} --norm batchnorm --bn-policy-critic eval": (
                "batchnorm, --bn-policy-critic eval",
                "#1f9e5a",
            ),
        },
        {"eval/return": RETURN, "norm/actor_grad": "norm of the actor's gradient"},
    ),
    "crossq": (
        "sac-halfcheetah",
        {LONG: ("SAC", "#7f7f7f"), f"{LONG} {CROSSQ}": ("CrossQ, critics 512 wide", "#9467bd")},
        {"eval/return": RETURN, "norm/q_bias": "bias of Q (see norm/q_bias)"},
    ),
}


def iqm(x, axis=-1):
    """Interquartile mean."""
    return stats.trim_mean(x, 0.25, axis=axis)


def interval(values):
    """95 % bootstrap interval of the interquartile mean over seeds."""
    sample = (np.asarray(values),)
    result = stats.bootstrap(sample, iqm, n_resamples=10_000, method="percentile", rng=0)
    return result.confidence_interval


def read(file, env=None):
    """Return {scalar: {options: {seed: [(step, value), ...]}}}, of one environment or of all."""
    data = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with open(file) as lines:
        for row in csv.DictReader(lines):
            if env in (None, row["env"]):
                point = int(row["step"]), float(row["value"])
                data[row["scalar"]][row["options"]][int(row["seed"])].append(point)
    return data


def style():
    """Let figures be legible in light and in dark, and the same to the bit each time."""
    plt.rcParams |= {"text.color": "#808080", "axes.labelcolor": "#808080", "font.size": 11}
    plt.rcParams |= {"xtick.color": "#808080", "ytick.color": "#808080"}
    plt.rcParams |= {"axes.edgecolor": "#808080", "axes.spines.top": False}
    plt.rcParams |= {"axes.spines.right": False, "svg.hashsalt": "", "legend.frameon": False}


def draw(name, results, lines, panels):
    """Draw a figure: a thin line for each seed, a thick one for their interquartile mean."""
    data = read(HERE / "results" / f"{results}.csv")
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3.8), layout="constrained")
    for ax, (scalar, title) in zip(axes, panels.items(), strict=True):
        for options, (label, color) in lines.items():
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
        if scalar == "norm/actor_grad":
            ax.set_yscale("log")
    axes[-1].legend(loc="center")
    figure.savefig(HERE / "figures" / f"{name}.svg", transparent=True, metadata={"Date": None})

    print("| options | seeds | final return, IQM (95 % interval) | each seed |\n|---|---|---|---|")
    for options, (label, _) in lines.items():
        last = [points[-1][1] for _, points in sorted(data["eval/return"][options].items())]
        low, high = interval(last)
        each = ", ".join(f"{x:.0f}" for x in last)
        print(f"| {label} | {len(last)} | {iqm(last):.0f} ({low:.0f} to {high:.0f}) | {each} |")
    print()


if __name__ == "__main__":
    style()
    for name, figure in FIGURES.items():
        draw(name, *figure)
