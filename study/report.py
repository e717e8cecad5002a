"""Redraw every figure and table from study/results: python -m study.report [--check]

Writes study/figures, study/CLAIMS.md (each claim with its verdict, by the rules in claims.toml),
and what stands between markers in README.md and study/FINDINGS.md. Intervals are 95 % bootstrap
intervals of the interquartile mean (IQM) over seeds. A run that diverged counts with its last
evaluation.
"""

import csv
import itertools
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import tyro
from scipy import stats

from study import bench, cells

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPAIRED = "--bn-policy-critic eval"
COLORS = {  # the first whose words stand in a cell's options; legible in light and in dark
    "batchrenorm": "#9467bd",
    REPAIRED: "#1f9e5a",
    "batchnorm": "#d62728",
    "layernorm": "#3b8fd6",
    "zfilter": "#e08a1e",
    "fixed": "#17a2b8",
    "": "#7f7f7f",
}
LINES = ("-", ""), ("--", "o"), (":", "^"), ("-.", "s"), ("-", "D"), ("--", "v")  # of one colour
UNITS = {
    "eval/return": "return in evaluation (sum of rewards)",
    "charts/episodic_return": "return while training (sum of rewards)",
    "norm/actor_grad": "actor's gradient (norm)",
    "norm/saturation": "actions at their bounds (share)",
    "norm/q_bias": "bias of Q (share of the return)",
    "norm/stat_lag": "lag of running statistics (std)",
    "norm/target_stretch": "stretch of the target's features (largest)",
    "norm/first_ratio": "|ratio - 1| before the first step (maximum)",
}
MODES = {  # words: metric, marker
    "while training": ("charts/episodic_return last 1", "o"),
    "eval mode": ("norm/return_eval_mode last 1", "s"),
    "train mode": ("norm/return_train_mode last 1", "^"),
    "recalibrated, eval mode": ("norm/return_recalibrated_mode last 1", "D"),
}
FORUM = {  # words: cell
    "mlp": "reinforce-none",
    "mlp, layer norm": "reinforce-layernorm",
    "mlp, scaled rewards": "reinforce-rewards",
    "mlp, batch norm: act eval, learn train": "reinforce-eval-train",
    "mlp, batch norm: act train, learn train": "reinforce-train-train",
    "the same, momentum 0.9": "reinforce-train-train-0.9",
    "the same, momentum 0.001": "reinforce-train-train-0.001",
    "the same, scaled rewards": "reinforce-train-train-rewards",
    "mlp, batch norm: act eval, learn eval": "reinforce-eval-eval",
    "linear": "reinforce-linear-none",
    "linear, batch norm: act eval, learn train": "reinforce-linear-eval-train",
    "linear, batch norm: act train, learn train": "reinforce-linear-train-train",
    "linear, batch norm: act eval, learn eval": "reinforce-linear-eval-eval",
    "cnn": "reinforce-cnn-none",
    "cnn, batch norm: act eval, learn train": "reinforce-cnn-eval-train",
    "cnn, batch norm: act train, learn train": "reinforce-cnn-train-train",
}
PUBLISHED = {  # cell, environment: what others report
    ("reinforce-plain", "CartPole-v1"): "500 is the most there is; Gymnasium calls 475 solved",
    ("reinforce-plain", "InvertedPendulum-v4"): (
        "999 ± 2 (Tianshou, v2, 3 million, 10 seeds, best evaluation)"
    ),
    ("ppo-plain", "HalfCheetah-v4"): (
        "1443 ± 46 (CleanRL, 3 seeds, training return); 5784 ± 1244 (Tianshou, v3, 10 seeds, best"
        " evaluation)"
    ),
    ("ppo-plain", "Hopper-v4"): (
        "2383 ± 272 (CleanRL, 3 seeds, training return); 2609 ± 701 (Tianshou, v3, 10 seeds, best"
        " evaluation)"
    ),
    ("ddpg-pendulum", "Pendulum-v1"): (
        "-152 ± 94 over the episodes of one run (Stable-Baselines3 Zoo, 20 thousand)"
    ),
    ("ddpg-plain", "HalfCheetah-v4"): (
        "10374 ± 157 (CleanRL, one million, 3 seeds, training return)"
    ),
    ("ddpg-ant", "Ant-v4"): (
        "816 (Fujimoto et al. 2018, Table 2, v1, mean of the last ten evaluations); 990 ± 4"
        " (Tianshou, v3, 10 seeds, best evaluation)"
    ),
    ("sac-plain", "HalfCheetah-v4"): (
        "5831 ± 775 (SAC with rate 1e-3, 10 seeds; logs in SimbaV2's repository, by their form of"
        " CrossQ's authors)"
    ),
    ("sac-million", "HalfCheetah-v4"): "9635 ± 1424 (CleanRL, 3 seeds, training return)",
}
LAST, LAST_FIVE = "eval/return last 1", "eval/return last 5"
HALF_CHEETAH, HOPPER, ANT, CARTPOLE = "HalfCheetah-v4", "Hopper-v4", "Ant-v4", "CartPole-v1"


SUMMARY = {  # words: cell of each family, where it has one
    "none": "none",
    "none, --no-target-network": "none-no-target",
    "none, --hidden-sizes 256": "one-layer",
    "none, --actor-lr 1e-4": "low-rate",
    "none, --max-grad-norm 1": "clipped",
    "none, CrossQ's step 5": "wide",
    "zfilter": "zfilter",
    "fixed, by statistics of the row none": "fixed-1",
    "fixed, by statistics of the row above": "fixed-2",
    "layernorm": "layernorm",
    "layernorm, --no-target-network": "layernorm-no-target",
    "layernorm, --norm-position pre": "layernorm-pre",
    "layernorm, --norm-position pre --no-target-network": "layernorm-pre-no-target",
    "batchnorm": "batchnorm",
    "batchnorm, --actor-lr 0": "frozen",
    "batchnorm, --norm-position pre": "pre",
    "batchnorm, --norm-net actor": "batchnorm-actor",
    "batchnorm, --norm-net critic": "batchnorm-critic",
    "batchnorm: act eval, learn eval": "eval-eval",
    "batchnorm: act eval, learn train": "eval-train",
    "batchnorm, --norm-position input: act eval, learn train": "input",
    "batchnorm: act train, learn train": "train-train",
    "batchnorm, --bn-joint --bn-target train": "two-choices",
    f"batchnorm, {REPAIRED}": "eval-policy-critic",
    "+ --norm-position pre": "pre-eval-policy-critic",
    "+ --norm batchrenorm (in its warm-up: epsilon 1e-3)": "epsilon",
    "+ --bn-momentum 0.005": "slow-statistics",
    "+ --bn-target train": "target-train",
    "+ --bn-joint": "joint",
    "+ --bn-joint --bn-target train": "joint-target-train",
    "+ --bn-joint --no-target-network": "no-target crossnorm",
    "CrossQ": "crossq",
}
NAMES = {name: words for words, names in SUMMARY.items() for name in names.split()}


def named(family, names):
    """Return {cell: words} of cells of a family."""
    return {f"{family}-{name}": NAMES[name] for name in names.split()}


class Picture(NamedTuple):
    """What stands between the markers of its name, of those of its cells with runs."""

    labels: dict[str, str]  # {cell: words}
    envs: tuple[str, ...]
    scalars: tuple[str, ...]  # of its panels, in each environment
    has_table: bool  # of final returns


PICTURES = {
    "first": Picture(
        named("ddpg", "none layernorm-no-target batchnorm eval-policy-critic joint-target-train"),
        (HALF_CHEETAH, HOPPER),
        ("eval/return",),
        True,
    ),
    "main": Picture(
        named(
            "ddpg-main",
            "none layernorm zfilter batchnorm eval-policy-critic target-train joint-target-train",
        ),
        (ANT,),
        ("eval/return", "norm/q_bias"),
        True,
    ),
    "stretch": Picture(
        named("ddpg", "eval-policy-critic pre-eval-policy-critic"),
        (HALF_CHEETAH, HOPPER),
        ("norm/target_stretch", "norm/q_bias"),
        True,
    ),
    "joint": Picture(
        named("ddpg", "none eval-policy-critic target-train joint joint-target-train crossnorm"),
        (HALF_CHEETAH, HOPPER),
        ("eval/return", "norm/q_bias"),
        False,
    ),
    "sac": Picture(
        named("sac", "none wide zfilter batchnorm eval-policy-critic no-target crossq"),
        (HALF_CHEETAH, HOPPER),
        ("eval/return",),
        False,
    ),
    "crossq": Picture(
        {
            "sac-plain": "SAC",
            "sac-plain-crossq": "CrossQ (critics 512 wide, not 2048; batch norm to the end)",
        },
        (HALF_CHEETAH,),
        ("eval/return", "norm/q_bias"),
        True,
    ),
    "ratio": Picture(
        named("reinforce", "none layernorm eval-eval eval-train train-train"),
        (CARTPOLE,),
        ("charts/episodic_return", "norm/first_ratio"),
        False,
    ),
    "ppo": Picture(
        named("ppo", "none eval-eval eval-train train-train"),
        (HALF_CHEETAH, HOPPER),
        ("charts/episodic_return", "norm/first_ratio"),
        False,
    ),
}
LADDER = {  # the same, of the steps to CrossQ
    "no layers": "none",
    "no layers, `--norm zfilter`": "zfilter",
    "`--norm batchnorm`": "batchnorm",
    f"1. `{REPAIRED}`": "eval-policy-critic",
    "2. `--bn-joint`": "joint",
    "3. `--no-target-network`": "no-target crossnorm",
    "4. and 5.: CrossQ, critics 512 wide, batch norm to the end": "crossq",
    "5. alone, with target network and no layers": "wide",
}
MECHANISM = "norm/actor_grad", "norm/saturation", "norm/stat_lag", "norm/q_bias", "eval/return"
ORDER = "order of onset: "
TEXTS = "README.md", "study/FINDINGS.md"
HEAD = """# The claims

Written by `python -m study.report` from the results. The rules of the verdicts stand in
[claims.toml](claims.toml); intervals are 95 % bootstrap intervals over seeds. Of three seeds the
interquartile mean (IQM) is the mean, of five that of the middle three. `>` and `<` hold if the
interval of the difference lies wholly on that side; `>=`, `<=` and `=` if nothing was found against
them, which few seeds make easy. A claim holds if all its comparisons do, in every environment; one
that goes the other way refutes it.
"""


@dataclass
class Args:
    check: bool = False  # write nothing; end with 1 if a text or a figure is out of date
    root: Path = cells.ROOT  # of the repository


# --------------------------------------------------------------------------------------- Numbers


def read_rows(file):
    with open(file) as lines:
        return list(csv.DictReader(lines))


def read(folder):
    """Return {(cell, environment): {seed: rows}} of the files of results."""
    data = {}
    for file in sorted(folder.glob("*/*.csv")):
        rows = read_rows(file)
        data.setdefault((rows[0]["cell"], rows[0]["env"]), {})[int(rows[0]["seed"])] = rows
    return data


def points(rows, scalar):
    """Return the steps and values of a scalar, where it is known and finite."""
    known = [(int(row["step"]), float(row[scalar])) for row in rows if row.get(scalar)]
    return np.array([x for x in known if np.isfinite(x[1])]).reshape(-1, 2).T


def values(data, cell, env, metric):
    """Return a metric of each seed, nan where it is not known."""
    scalar, how = metric.split(" ", 1)
    runs = [rows for _, rows in sorted(data.get((cell, env), {}).items())]
    if how.startswith("last"):
        n = int(how.split()[1])
        evaluated = [[row for row in rows if points([row], LAST.split()[0]).size] for rows in runs]
        runs = [rows[-n:] for rows in evaluated]  # a run that diverged: those before
    known = [points(rows, scalar)[1] for rows in runs]
    return [float(np.mean(x)) if len(x) else float("nan") for x in known]


def iqm(x, axis=-1):
    """Interquartile mean."""
    return stats.trim_mean(x, 0.25, axis=axis)


def interval(*samples, paired=False):
    """Return the interval of the IQM of a sample (seeds first), or of two samples' difference."""
    if min(map(len, samples)) < 2 or not all(np.isfinite(x).all() for x in samples):
        return float("nan"), float("nan")

    def statistic(x, y=None, axis=-1):
        return iqm(x, axis) - (0 if y is None else iqm(y, axis))

    # few seeds make few different resamples, so a verdict may hang on chance: draw many for these
    n = 100_000 if np.ndim(samples[0]) == 1 else 10_000
    options = {"method": "percentile", "n_resamples": n, "paired": paired, "rng": 0}
    return stats.bootstrap(samples, statistic, axis=0, **options).confidence_interval


class Comparison(NamedTuple):
    rule: str
    env: str
    left: float  # interquartile means, and the interval of their difference
    right: float
    low: float
    high: float
    verdict: str


def judge(relation, low, high):
    """Return whether a relation holds, is refuted or not decided, by the rules in claims.toml."""
    if np.isnan(low):
        return "not decided"
    if relation in (">", ">="):
        low, high = -high, -low  # now below 0 is on the named side
    if relation == "=":
        return "holds" if low <= 0 <= high else "refuted"
    if low > 0:
        return "refuted"
    return "holds" if high < 0 or relation in ("<=", ">=") else "not decided"


def compare(data, known, claim, rule):
    """Return the comparisons that a rule asks for, one for each environment."""
    left, relation, right, *where = rule.split()
    envs, found = where[1:] or known[left].envs, []
    for env in envs:
        x = values(data, left, env, claim["metric"])
        if right in known:
            y = values(data, right, env, claim.get("against", claim["metric"]))
            low, high = interval(x, y, paired=left == right)
        else:
            y = [float(right)]
            low, high = np.array(interval(x)) - y[0]
        verdict = judge(relation, low, high)
        if relation == "same":
            curves = [
                [[row[claim["metric"].split()[0]] for row in rows] for rows in seeds.values()]
                for seeds in (data[left, env], data[right, env])
            ]
            verdict = "holds" if curves[0] == curves[1] else "refuted"
        found.append(Comparison(rule, env, float(iqm(x)), float(iqm(y)), low, high, verdict))
    return found


def onset(rows, scalar, scalars):
    """Return the first step at which one of scalars is past half of its change since all began."""
    steps, x = points([row for row in rows if all(row[name] for name in scalars)], scalar)
    if not len(x):
        return float("nan")
    return steps[np.argmax((x - x[0]) / (x[-1] - x[0] or 1) >= 0.5)]


def number(x):
    """Return a number as short as it may be told."""
    if not np.isfinite(x):
        return "unknown"
    return f"{x:.0f}" if abs(x) >= 100 or x == int(x) else f"{x:.3g}"


def with_interval(x):
    """Return the IQM of a sample and its interval in words."""
    low, high = interval(x)
    words = number(iqm(x)) if len(x) else "no run"
    return words if np.isnan(low) else f"{words} ({number(low)} to {number(high)})"


# --------------------------------------------------------------------------------------- Figures


def color(cell):
    """Return the color of a cell's normalizer, the same in every figure."""
    return next(color for words, color in COLORS.items() if words in cell.options)


def style():
    """Let figures be legible in light and in dark, and the same to the byte each time."""
    for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
        plt.rcParams[name] = "#808080"
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
    plt.rcParams |= {"svg.hashsalt": "study", "legend.frameon": False, "axes.grid": True}
    plt.rcParams |= {"grid.color": "#808080", "grid.alpha": 0.2}


def save(figure, file):
    figure.savefig(file, transparent=True, metadata={"Date": None})
    plt.close(figure)


def set_scale(ax, scalar):
    """Choose the vertical axis of a scalar, logarithmic where its values span decades."""
    if scalar == "norm/actor_grad":
        ax.set_yscale("log")
    if scalar == "norm/target_stretch":
        top = max(40, ax.get_ylim()[1])
        ax.set(yscale="log", yticks=(1, 2, 5, 10, 20, 50, 100, 300), ylim=(1, top))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.minorticks_off()
    if scalar == "norm/first_ratio":
        ax.set_yscale("symlog", linthresh=0.1)
    if scalar == "norm/q_bias" and np.abs(ax.get_ylim()).max() > 10:
        ax.set_yscale("symlog", linthresh=10)
    if scalar == "norm/stat_lag":
        ax.set_ylim(0)


def curves(ax, data, labels, known, env, scalar):
    """Draw the IQM over seeds of each cell, and its interval as a shade.

    Evaluations at which the scalar is known are matched by their number, since in REINFORCE and
    PPO steps differ a little; a run that diverged stays at its last value.
    """
    used = {}
    for cell, label in labels.items():
        shade = color(known[cell])
        dash, marker = LINES[next(used.setdefault(shade, itertools.count())) % len(LINES)]
        if (cell, env) not in data:
            continue
        seeds = [points(rows, scalar) for _, rows in sorted(data[cell, env].items())]
        length = max(x.shape[1] for x in seeds)
        if not length or not min(x.shape[1] for x in seeds):
            continue
        seeds = [np.pad(x, ((0, 0), (0, length - x.shape[1])), "edge") for x in seeds]
        steps, y = np.max([x[0] for x in seeds], 0), np.array([x[1] for x in seeds])
        line = {"linestyle": dash, "marker": "o" if len(steps) == 1 else marker}
        line |= {"linewidth": 2, "markersize": 5, "markevery": -(-len(steps) // 10)}
        ax.plot(steps / 1000, iqm(y, 0), color=shade, label=label, **line)
        low, high = interval(y)
        if not np.isnan(low).all():
            ax.fill_between(steps / 1000, low, high, color=shade, alpha=0.15, linewidth=0)
    ax.set(xlabel="environment steps (thousands)", ylabel=UNITS[scalar])
    set_scale(ax, scalar)


def draw(data, known, panels, labels, file, levels=()):
    """Draw a figure of (script, environment, scalar) panels, with lines at levels and a legend."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    size = 5 * max(columns, 1.4), 3.8 * -(-len(panels) // columns) + 0.15 * len(labels)
    figure = plt.figure(figsize=size, layout="constrained")
    entries = {}
    for k, (script, env, scalar) in enumerate(panels):
        ax = figure.add_subplot(-(-len(panels) // columns), columns, k + 1)
        here = {name: label for name, label in labels.items() if known[name].script == script}
        curves(ax, data, here, known, env, scalar)
        ax.set_title(f"{script}.py, {env.split('/')[-1]}")
        for level in levels:
            ax.axhline(level, color="#808080", linestyle=":")
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(3, columns + 1))
    save(figure, file)


def dots(rows, xlabel, file):
    """Draw rows of {label: {words: (values, color, marker)}}: a point a seed, a bar their IQM."""
    figure, ax = plt.subplots(figsize=(10, 1.6 + 0.36 * len(rows)), layout="constrained")
    markers = {}
    for y, columns in enumerate(rows.values()):
        for k, (words, (x, shade, marker)) in enumerate(columns.items()):
            height = y + (k - (len(columns) - 1) / 2) * 0.2
            ax.plot(x, [height] * len(x), marker, color=shade, alpha=0.45, markersize=4)
            ax.plot(iqm(x), height, "|", color=shade, markersize=10, markeredgewidth=3)
            markers[words] = marker
    handles = [plt.Line2D([], [], ls="", marker=m, color="#808080") for m in markers.values()]
    figure.legend(handles, markers, loc="outside upper center", ncols=4)
    ax.set(xlabel=xlabel, yticks=range(len(rows)), ylim=(-0.6, len(rows) - 0.4))
    ax.set_yticklabels(rows)
    ax.invert_yaxis()
    save(figure, file)


def mechanism(data, known, labels, envs, scalars, file, has_onsets):
    """Draw seed 1 of two cells on one time axis, and when each scalar of the first set in."""
    size = 1 + 5.5 * len(envs), 1.9 * len(scalars) + 0.6
    figure, axes = plt.subplots(
        len(scalars), len(envs), figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for (k, scalar), (j, env) in itertools.product(enumerate(scalars), enumerate(envs)):
        ax = axes[k, j]
        for name, label in labels.items():
            steps, x = points(data[name, env][1], scalar)
            ax.plot(steps / 1000, x, color=color(known[name]), linewidth=2, label=label)
        first = next(iter(labels))
        at = onset(data[first, env][1], scalar, scalars) / 1000
        if has_onsets:
            ax.axvline(at, color=color(known[first]), linestyle=":")
            ax.annotate(f" onset {at:.0f}", (at, 1), xycoords=("data", "axes fraction"))
        set_scale(ax, scalar)
        if j == 0:
            ax.set_ylabel("\n(".join(UNITS[scalar].split(" (")))
        if scalar == scalars[-1]:
            ax.set_xlabel(f"environment steps (thousands), {env}, seed 1")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    save(figure, file)


# ---------------------------------------------------------------------------------------- Tables


def table(head, rows):
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def missing(data, of):
    """Return {name: number of missing runs} of the cells that lack some."""
    found = {x.name: sum(r.seed not in data.get((x.name, r.env), {}) for r in x.runs()) for x in of}
    return {name: n for name, n in found.items() if n}


def told(gone, of):
    """Return (how many of the runs of cells are missing, of which cells), in words."""
    n, every = sum(gone.values()), sum(len(cell.runs()) for cell in of)
    words = f"{n} of {every} runs {'is' if n == 1 else 'are'} missing"
    return words, ", ".join(f"`{name}` ({n})" for name, n in gone.items())


def final_table(data, picture):
    """Return the table of final returns of a picture's cells."""
    head, rows = ["options"], [[label] for label in picture.labels.values()]
    for env in picture.envs:
        head += [f"{env}: final return, IQM (95 % interval)", "mean of the last five"]
        for row, cell in zip(rows, picture.labels, strict=True):
            row.append(with_interval(values(data, cell, env, LAST)))
            row.append(number(iqm(values(data, cell, env, LAST_FIVE))))
    return table(head, rows)


def plain_table(data, known):
    """Return the table of the algorithms without normalization layers, beside published results."""
    rows = []
    for (name, env), published in PUBLISHED.items():
        cell, x = known[name], values(data, name, env, LAST)
        options = re.sub(r" ?--eval-every \d+", "", cell.options)
        ours = ", ".join(f"{v:.0f}" for v in x) or "no run"
        ours += f"; {with_interval(x)}" if len(x) > 1 else ""
        what = f"`{cell.script}.py {options}".rstrip() + "`"
        rows.append([what, f"{env}, {cell.steps / 1e6:g} million", ours, published])
    head = "script", "environment, steps", "ours: each seed; IQM (95 % interval)", "published"
    return table(head, rows)


def forum_table(data, known, done):
    """Return the table of returns in each mode, of the cells that are done."""
    rows = []
    for words, name in done.items():
        found = modes(data, known, name)
        texts = [with_interval(found[mode][0]) if mode in found else "" for mode in MODES]
        rows.append([words, len(known[name].seeds), *texts])
    return table(["", "seeds", *MODES], rows)


def summary_table(data, known, labels, *families):
    """Return the table of final returns of cells, {words: names}, in families, where all is run."""
    columns = [(family, env) for family in families for env in known[f"{family}-none"].envs]
    rows = []
    for words, names in labels.items():
        shown = []
        for family, env in columns:
            shown.append("")
            found = [x for name in names.split() if (x := f"{family}-{name}") in known]
            found = [x for x in found if not missing(data, [known[x].within(env)])]
            for cell in found[:1]:
                last, five = (values(data, cell, env, metric) for metric in (LAST, LAST_FIVE))
                shown[-1] = f"{with_interval(last)}; {number(iqm(five))}"
        rows.append([words, *shown])
    head = ["", *(f"`{family}_bn.py`, {env}" for family, env in columns)]
    used = [column for column in zip(head, *rows, strict=True) if any(column[1:])]
    head, *rows = zip(*used, strict=True)
    return table(head, [row for row in rows if any(row[1:])])


def command(cell):
    """Return the command of a cell's first run, and how the others differ."""
    _, *more = cell.seeds
    seeds = [f"--seed {more[0]} to {more[-1]}"] if more else []
    others = ", ".join([f"--env {env}" for env in cell.envs[1:]] + seeds)
    line = f"python {cell.script}.py {shlex.join(cell.runs()[0].words())}"
    return f"{line}  # and {others}" if others else line


def finished(data, known, rules):
    """Return the rules all of whose runs are made."""
    asked = {rule: cells.cells_of({"compare": [rule]}, known) for rule in rules}
    return [rule for rule in rules if not missing(data, asked[rule].values())]


def verdict_of(rules, comparisons):
    """Return (verdict, the comparison that decides it) of the rules of a claim."""
    order = "refuted", "not decided", "holds"
    decisive = [c for c in comparisons if c.rule in rules]
    first = min(decisive, key=lambda c: order.index(c.verdict), default=None)
    return first.verdict if first else "not decided", first


def why(known, claim, c):
    """Say in one line what a comparison found."""
    left, relation, right, *_ = c.rule.split()
    if "against" in claim:
        left, right = (claim[side].split()[0] for side in ("metric", "against"))
        known = {right}
    words = f"`{left}` {number(c.left)}, claimed {relation} "
    words += f"`{right}` {number(c.right)}" if right in known else right
    difference = f"difference {number(c.left - c.right)} ({number(c.low)} to {number(c.high)})"
    return f"{c.env.split('/')[-1]}: {words}; {difference}"


def claim_page(data, known, claim, figures):
    """Return (a claim's part of CLAIMS.md, its row of the summary), and draw it."""
    name, every = claim["id"], cells.cells_of(claim, known)
    lines = ["```bash", f"python -m study.run {name}", *map(command, every.values()), "```"]
    commands = "\n".join(lines) + "\n"
    parts = [f"## {name}. {claim['says']}", f"Said by: {claim['source']}."]
    row = [f"{name}: {claim['says']}", claim["source"]]
    gone = missing(data, every.values())
    words, listed = told(gone, every.values())
    # what cannot change the verdict does not delay it: one rule is enough to refute
    done = {side: finished(data, known, claim.get(side, [])) for side in ("compare", "also")}
    rules = done["compare"] + [rule for rule in done["also"] if not rule.startswith(ORDER)]
    comparisons = [c for rule in rules for c in compare(data, known, claim, rule)]
    verdict, decisive = verdict_of(done["compare"], comparisons)
    if done["compare"] != claim["compare"] and verdict != "refuted":
        page = "\n\n".join([*parts, f"**{words}**: {listed}.", commands])
        return page, [*row, "no verdict yet", "", words]

    claim = claim | done
    known = cells.cells_of(claim, known)
    draw_claim(data, known, claim, figures / f"{name}.svg")
    rows = []
    for c in comparisons:
        difference = f"{number(c.left - c.right)} ({number(c.low)} to {number(c.high)})"
        sides = number(c.left), number(c.right), difference, c.verdict
        rows.append(["also: " * (c.rule in claim["also"]) + f"`{c.rule}`", c.env, *sides])
    head = "comparison", "environment", "left", "right", "difference (95 %)", "verdict"
    metric = f"Verdict: **{verdict}**. Metric: {claim['metric']}"
    metric += f", on the right {claim['against']}." if "against" in claim else "."
    notes = [f"Note after the runs: {claim['note']}"] if "note" in claim else []
    notes += [f"{words}, which cannot change that: {listed}."] if gone else []
    parts += [metric, *notes, f"![{name}](figures/{name}.svg)", table(head, rows)]
    parts += [seeds_table(data, known, claim), *onsets(data, known, claim), commands]
    reason = f"{why(known, claim, decisive)}. {claim.get('note', '')}".strip()
    row += [verdict, f"[figure](study/figures/{name}.svg)", reason]
    return "\n\n".join(parts), row


def seeds_table(data, known, claim):
    """Return the table of a claim's metric in each cell and environment."""
    rows = []
    for name, cell in known.items():
        for env in cell.envs:
            diverged = sum(run[-1]["diverged"] == "1" for run in data[name, env].values())
            for metric in filter(None, (claim["metric"], claim.get("against"))):
                x = values(data, name, env, metric)
                what = f"`{name}`" + f", {metric}" * ("against" in claim)
                rows.append([what, env, with_interval(x), ", ".join(map(number, x)), diverged])
    return table(["cell", "environment", "IQM (95 %)", "each seed", "diverged"], rows)


def order_of(claim):
    """Return the scalars whose order of onset a claim asks for, or none."""
    rules = [rule for rule in claim.get("also", []) if rule.startswith(ORDER)]
    return rules[0].removeprefix(ORDER).split(", ") if rules else []


def onsets(data, known, claim):
    """Return what says when each scalar of a claim's order of onset began, if it asks for it."""
    cell, order, rows = known[claim["compare"][0].split()[0]], order_of(claim), []
    for env, scalar in itertools.product(cell.envs, order):
        steps = [onset(run, scalar, order) for _, run in sorted(data[cell.name, env].items())]
        rows.append([env, scalar, ", ".join(map(number, steps))])
    words = f"Onset in `{cell.name}`: the first evaluation past half of the change from the first "
    words += "evaluation at which all are known; it means nothing where a scalar hardly changed."
    head = "environment", "scalar", "step, each seed"
    return [words, table(head, rows)] if rows else []


def draw_claim(data, known, claim, file):
    """Draw what a claim is about: curves, the modes of one policy, or an order of onset."""
    metric, against = claim["metric"], claim.get("against")
    labels = {name: name for name in known}
    if order := order_of(claim):
        envs = known[claim["compare"][0].split()[0]].envs
        return mechanism(data, known, labels, envs, order, file, True)
    if against:
        sides = {words: mode for words, mode in MODES.items() if mode[0] in (metric, against)}
        rows = {name: modes(data, known, name, sides) for name in known}
        return dots(rows, "return (sum of rewards)", file)
    scalar = metric.split()[0]
    panels = {(cell.script, env, scalar): 0 for cell in known.values() for env in cell.envs}
    sides = [rule.split()[2] for rule in claim["compare"]]
    levels = [float(side) for side in sides if side not in known]
    draw(data, known, list(panels), labels, file, levels)


def modes(data, known, name, sides=MODES):
    """Return {words: (values, color, marker)} of a cell, as `dots` draws them."""
    env, row = known[name].envs[0], {}
    for words, (metric, marker) in sides.items():
        x = values(data, name, env, metric)
        if words == "eval mode" and np.isnan(x).all():  # without batch norm there is one mode
            x = values(data, name, env, LAST)
        if not np.isnan(x).any():
            row[words] = x, color(known[name]), marker
    return row


# ------------------------------------------------------------------------------------ All of it


def place(texts, name, content):
    """Put content between the markers of this name, which stand once in texts, {file: text}."""
    inside = re.compile(rf"(?<=<!-- {name} begin -->\n).*?(?=<!-- {name} end -->)", re.DOTALL)
    homes = [file for file, text in texts.items() for _ in inside.finditer(text)]
    if len(homes) != 1:
        where = " or ".join(TEXTS)
        raise SystemExit(f"study.report: {where} needs <!-- {name} begin --> and end once")
    (file,) = homes
    if file.parent.name == "study":
        content = content.replace("](study/", "](")
    texts[file] = inside.sub(lambda _: f"{content}\n", texts[file])


def not_made(names):
    words = f"The runs are not made yet; `python -m study.run {' '.join(names)}`"
    return f"{words} makes them, and `python -m study.report` puts them here."


def make(data, known, claims, figures):
    """Return {marker: text} and the text of CLAIMS.md, and draw into the folder figures."""
    blocks = {"plain": plain_table(data, known)}
    for name, picture in PICTURES.items():
        labels, envs, scalars, has_table = picture
        of = [known[cell].within(*envs) for cell in labels]
        gone = missing(data, of)
        labels = {x: label for x, label in labels.items() if all((x, env) in data for env in envs)}
        if not labels:
            blocks[name] = not_made(picture.labels)
            continue
        words = " and ".join(UNITS[scalar].split(" (")[0] for scalar in scalars)
        blocks[name] = f"![{words}, {' and '.join(envs)}](study/figures/{name}.svg)"
        if has_table:
            blocks[name] += f"\n\n{final_table(data, picture._replace(labels=labels))}"
        if gone:
            blocks[name] += "\n\n{}: {}.".format(*told(gone, of))
        script = known[next(iter(labels))].script
        panels = [(script, env, scalar) for env in envs for scalar in scalars]
        draw(data, known, panels, labels, figures / f"{name}.svg")

    blocks["summary"] = summary_table(data, known, SUMMARY, "reinforce", "ppo", "ddpg", "sac")
    blocks["ladder"] = summary_table(data, known, LADDER, "ddpg", "sac")
    labels = named("ddpg", "batchnorm eval-policy-critic")
    blocks["mechanism"] = not_made(labels)
    if not missing(data, [known[cell] for cell in labels]):
        words = "Gradient, saturation, lag of statistics, bias of Q and return of two runs"
        blocks["mechanism"] = f"![{words}](study/figures/mechanism.svg)"
        file = figures / "mechanism.svg"
        mechanism(data, known, labels, (HALF_CHEETAH, HOPPER), MECHANISM, file, False)
    done = {words: name for words, name in FORUM.items() if not missing(data, [known[name]])}
    blocks["forum"] = not_made([f"F{k}" for k in range(1, 7)])
    if done:
        picture = "![Returns of one policy in three modes](study/figures/forum.svg)"
        blocks["forum"] = f"{picture}\n\n{forum_table(data, known, done)}"
        cartpole = {words: name for words, name in done.items() if "cnn" not in name}
        if cartpole:
            rows = {words: modes(data, known, name) for words, name in cartpole.items()}
            dots(rows, "return (steps of balance, at most 500)", figures / "forum.svg")

    pages, rows = zip(
        *(claim_page(data, known, claim, figures) for claim in claims.values()), strict=True
    )
    judged, open_yet = ([row for row in rows if bool(row[3]) == x] for x in (True, False))
    hold, refuted, undecided = (
        sum(row[2] == verdict for row in rows) for verdict in ("holds", "refuted", "not decided")
    )
    waiting = ", ".join(f"{row[0].split(':')[0]} ({row[4]})" for row in open_yet) or "none"
    blocks["claims"] = f"{hold} claims hold, {refuted} are refuted, {undecided} are not decided by "
    blocks["claims"] += f"their runs. Without a verdict yet: {waiting}.\n\n"
    blocks["claims"] += table(["claim", "who says it", "verdict", "figure", "why"], judged)
    return blocks, "\n".join([HEAD, *pages])


def landscape(file, figures):
    """Return the text about what study.landscape saw, and draw it."""
    if not file.exists():
        return "Not looked at yet: `python -m study.landscape`, then `python -m study.report`."
    rows = read_rows(file)
    runs = dict.fromkeys(row["options"] for row in rows)
    size = 5 * len(runs), 3.8
    figure, axes = plt.subplots(1, len(runs), figsize=size, squeeze=False, layout="constrained")
    for ax, options in zip(axes[0], runs, strict=True):
        for mode, shade in (("train", COLORS["batchnorm"]), ("eval", COLORS[REPAIRED])):
            seen = [row for row in rows if (row["options"], row["mode"]) == (options, mode)]
            x, q = ([float(row[name]) for row in seen] for name in ("factor", "q"))
            ax.plot(x, q, color=shade, linewidth=2, label=f"critic in {mode} mode")
        ax.set(xlabel="factor on all actions of the batch", ylabel="mean Q (discounted return)")
        ax.set_xticks([-1, -0.5, 0, 0.5, 1])
        ax.set_title(re.sub(r"--(total-steps|eval-every) \d+ ?", "", options))
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2)
    save(figure, figures / "landscape.svg")
    return "![mean Q by the size of actions, in either mode](study/figures/landscape.svg)"


def speed(folder):
    """Return the table of what study.bench measured, and where and when."""
    rows = [row for file in sorted(folder.glob("*.csv")) for row in read_rows(file)]
    if not rows:
        return "Not measured yet: `python -m study.bench`, then `python -m study.report`."
    keys = "date", "cpu", "commit", "versions"
    where = dict.fromkeys(", ".join(row[key] for key in keys) for row in rows)
    return f"{bench.table(rows)}\n\nMeasured: {'; '.join(where)}."


def main(args):
    style()
    study = args.root / "study"
    claims, known = cells.load(study / "claims.toml")
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder)
        blocks, page = make(read(study / "results"), known, claims, figures)
        blocks["speed"] = speed(study / "speed")
        blocks["landscape"] = landscape(study / "landscape.csv", figures)
        drawn = {study / "figures" / file.name: file.read_text() for file in figures.iterdir()}
    texts = {args.root / name: (args.root / name).read_text() for name in TEXTS}
    for name, content in blocks.items():
        place(texts, name, content)
    for file, content in (texts | {study / "CLAIMS.md": page} | drawn).items():
        if not args.check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(content)
        elif not file.exists() or file.read_text() != content:
            sys.exit(f"{file.name} is out of date: run python -m study.report")


if __name__ == "__main__":
    main(tyro.cli(Args))
