"""Draw and print how one policy fares in three modes: python -m study.forum

From study/results/reinforce-cartpole.csv: REINFORCE with batch norm, acting and learning in either
mode; the final policy evaluated in eval mode, in train mode, and in eval mode after recalibration.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from study.figure import interval, iqm, read, style

HERE = Path(__file__).parent
LENGTH = "--total-steps 150000 --eval-every 15000"
BATCH = "--norm batchnorm"
TRAIN = f"{BATCH} --bn-rollout train"
AGAIN = "--bn-recalibrate 50"
LINEAR = "--network linear"
CELLS = {  # words: options
    "mlp": "",
    "mlp, layer norm": "--norm layernorm",
    "mlp, scaled rewards": "--reward-norm",
    "mlp, batch norm: act eval, learn train": f"{BATCH} {AGAIN}",
    "mlp, batch norm: act train, learn train": f"{TRAIN} {AGAIN}",
    "the same, momentum 0.9": f"{BATCH} --bn-momentum 0.9 --bn-rollout train {AGAIN}",
    "the same, momentum 0.001": f"{BATCH} --bn-momentum 0.001 --bn-rollout train {AGAIN}",
    "the same, scaled rewards": f"{TRAIN} {AGAIN} --reward-norm",
    "mlp, batch norm: act eval, learn eval": f"{BATCH} --bn-update eval {AGAIN}",
    "linear": LINEAR,
    "linear, batch norm: act eval, learn train": f"{BATCH} --norm-position input {AGAIN} {LINEAR}",
    "linear, batch norm: act train, learn train": (
        f"{BATCH} --norm-position input --bn-rollout train {AGAIN} {LINEAR}"
    ),
    "linear, batch norm: act eval, learn eval": (
        f"{BATCH} --norm-position input --bn-update eval {AGAIN} {LINEAR}"
    ),
}
COLUMNS = {  # words: scalar, number of its last points that are averaged
    "while training": ("charts/episodic_return", 10),
    "eval mode": ("norm/return_eval_mode", 1),
    "train mode": ("norm/return_train_mode", 1),
    "recalibrated, eval mode": ("norm/return_recalibrated_mode", 1),
}


def table(data):
    """Return {words of a cell: {words of a column: a value for each seed}}."""
    cells = {}
    for words, options in CELLS.items():
        options = " ".join([LENGTH, *options.split()])
        cells[words] = {}
        for column, (scalar, n) in COLUMNS.items():
            seeds = data[scalar].get(options)
            if seeds is None and scalar == "norm/return_eval_mode":
                seeds = data["eval/return"].get(options)  # without batch norm there is one mode
            if seeds:
                values = [np.mean([v for _, v in points[-n:]]) for points in seeds.values()]
                cells[words][column] = values
    return cells


def main():
    cells = table(read(HERE / "results" / "reinforce-cartpole.csv"))
    style()
    colors = dict(zip(COLUMNS, ("#7f7f7f", "#1f77b4", "#d62728", "#1f9e5a"), strict=True))
    figure, ax = plt.subplots(figsize=(10, 5.2), layout="constrained")
    for row, columns in enumerate(cells.values()):
        for k, (column, values) in enumerate(columns.items()):
            y = row + (k - 1.5) * 0.18
            ax.plot(values, [y] * len(values), "o", color=colors[column], alpha=0.4, markersize=4)
            ax.plot(iqm(values), y, "|", color=colors[column], markersize=11, markeredgewidth=3)
    for column, color in colors.items():
        ax.plot([], [], "o", color=color, label=column)
    ax.set(xlabel="return (steps of balance, at most 500)", yticks=range(len(cells)))
    ax.set_yticklabels(cells)
    ax.invert_yaxis()
    ax.grid(color="#808080", alpha=0.2)
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(HERE / "figures" / "forum.svg", transparent=True, metadata={"Date": None})

    print("| | seeds |", " | ".join(COLUMNS), "|\n|---|---|" + "---|" * len(COLUMNS))
    for words, columns in cells.items():
        texts = []
        for column in COLUMNS:
            values = columns.get(column)
            low, high = interval(values) if values else (0, 0)
            texts.append(f"{iqm(values):.0f} ({low:.0f} to {high:.0f})" if values else "")
        print(f"| {words} | {len(columns['while training'])} |", " | ".join(texts), "|")


if __name__ == "__main__":
    main()
