"""Redraw every figure and table from study/results: python -m study.report [--check] [--all]

Writes study/figures, study/CLAIMS.md (each claim with its verdict, see verdicts.py), and what
stands between markers in README.md and study/FINDINGS.md.
"""

import functools
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import pandas as pd
import tyro

from study import bench, cells
from study.verdicts import (
    DRAWS,
    RETURN,
    finite,
    interval,
    iqm,
    judge,
    missing,
    number,
    read,
    seeds,
    span,
    told,
    unit,
    values,
    with_ends,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TEXTS = "README.md", "study/FINDINGS.md", "study/SPEED.md"
BOTH, HOPPER, ANT = ("HalfCheetah-v4", "Hopper-v4"), ("Hopper-v4",), ("Ant-v4",)

HEAD = f"""# The claims

Written by `python -m study.report` from [results](results), by the rules in
[claims.toml](claims.toml). `python -m study.run Z1` makes the runs of claim Z1 that are missing.

A number is the interquartile mean (IQM) over seeds: of ten the middle six, of five the middle
three, of three all. In brackets stands its 95 % interval, and that of the difference of two: the
percentile bootstrap, {DRAWS} resamples, each within its cell. P(left > right) is the probability
of improvement: how often a seed of the left is above one of the right. p is that of the
Mann-Whitney test, exact (for the same runs on both sides: Wilcoxon's), corrected by Holm for the
number of comparisons of the claim; a difference is found if p < 0.05. Three seeds against three
never show one, and their intervals are too narrow. If no metric is named, it is the return, as the
mean of the last five evaluations. `7 + 3e` are seven seeds, and three of an earlier commit that are
to be redone. In a command `{{none}}` stands for the statistics of that cell's run of the same seed.

A claim holds if all its comparisons do, and is refuted if one is; while runs are missing it is
open. `>=`, `<=` and `=` hold, too, where no difference is found. "Smaller than X": no interval of
these comparisons goes further. `also` decides nothing, and is corrected by itself."""

COLORS = {  # the first whose words stand in a cell's options; legible in light and in dark
    "batchrenorm": "#9467bd",
    "--weight-norm": "#e377c2",
    "--bn-target train": "#17a2b8",
    "--bn-policy-critic eval": "#1f9e5a",
    "batchnorm": "#d62728",
    "layernorm": "#3b8fd6",
    "zfilter": "#e08a1e",
    "": "#7f7f7f",
}
LINES = ("-", ""), ("--", "o"), (":", "^"), ("-.", "s"), ("-", "D"), ("--", "v")  # of one colour
UNITS = {
    "eval/return": "return in evaluation",
    "charts/episodic_return": "return while training",
    "norm/actor_grad": "actor's gradient (norm)",
    "norm/saturation": "actions at their bounds (share)",
    "norm/q_bias": "bias of Q (in returns)",
    "|norm/q_bias|": "|bias of Q| (in returns)",
    "norm/stat_lag": "lag of running statistics (std)",
    "norm/first_ratio": "|ratio - 1| before the first step",
    "norm/return_eval_mode": "return in eval mode",
    "norm/return_train_mode": "return in train mode",
    "norm/return_recalibrated_mode": "return in eval mode, recalibrated",
    "wall_s": "time (s)",
}
FIRST = "none naive repair recipe crossnorm layernorm-no-target"
MAIN = "none naive two-pass recipe recipe-wn crossnorm layernorm-zfilter"
PPO = "none eval-eval eval-train train-train"
FIGURES = {  # name: families, cells of them, environments, scalars
    "first": ("ddpg", FIRST, BOTH, "eval/return"),
    "ladder": ("sac", "none zfilter naive repair recipe recipe-wn crossq", BOTH, "eval/return"),
    "filter": ("sac", "none zfilter layernorm layernorm-zfilter", BOTH, "eval/return"),
    "bias": ("ddpg sac", "none repair two-pass recipe", HOPPER, "|norm/q_bias|"),
    "gradient": ("ddpg", "naive repair", BOTH, "norm/actor_grad"),
    "main": ("ddpg-ant sac-ant", MAIN, ANT, "eval/return"),
    "ppo": ("ppo", PPO, BOTH, "charts/episodic_return norm/first_ratio"),
}
LADDER = "none naive repair joint recipe recipe-wn recipe-wn-rn crossq"
MODES = {  # words: metric, marker
    "while training": ("charts/episodic_return last 1", "o"),
    "eval mode": ("norm/return_eval_mode last 1", "s"),
    "train mode": ("norm/return_train_mode last 1", "^"),
    "recalibrated, eval mode": ("norm/return_recalibrated_mode last 1", "D"),
}


@dataclass
class Args:
    check: bool = False  # write nothing; end with 1 if a text or a figure is out of date
    all: bool = False  # draw a figure for each claim, too, into runs/figures
    root: Path = cells.ROOT  # of the repository


# ------------------------------------------------------------------------------------- Figures


def style():
    """Let figures be legible in light and in dark, and the same to the byte each time."""
    for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
        plt.rcParams[name] = "#808080"
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
    plt.rcParams |= {"svg.hashsalt": "study", "legend.frameon": False, "axes.grid": True}
    plt.rcParams |= {"grid.color": "#808080", "grid.alpha": 0.2}


def save(figure, file):
    """Write a figure without its date."""
    figure.savefig(file, transparent=True, metadata={"Date": None})
    plt.close(figure)


def color(cell):
    """Return the color of a cell's normalizer, the same in every figure."""
    return next(color for words, color in COLORS.items() if words in cell.options)


def short(cell):
    """Return a cell's name without that of its family."""
    return cell.name.removeprefix(f"{cell.family}-")


def looks(shown):
    """Return {short name: how its line looks}: its color, then a dash and marker of its own."""
    found, used = {}, dict.fromkeys(COLORS.values(), 0)
    for cell in shown:
        shade = color(cell)
        dash, marker = LINES[used[shade] % len(LINES)]
        if short(cell) not in found:
            used[shade] += 1
            found[short(cell)] = {"color": shade, "linestyle": dash, "marker": marker}
    return found


def curve(ax, runs, scalar, **look):
    """Draw the IQM over the runs of a cell, and its interval as a shade.

    Evaluations are matched by their number, since in REINFORCE and PPO steps differ a little; a run
    that diverged stays at its last value.
    """
    runs = [rows for rows in runs if len(finite(rows, scalar))]
    if not runs:
        return
    y = pd.concat([rows[scalar].where(np.isfinite) for rows in runs], axis=1).ffill()
    y = y.dropna(how="all")
    steps = pd.concat([rows["step"] for rows in runs], axis=1).max(axis=1)[y.index] / 1000
    y = y.to_numpy().T
    if len(steps) == 1:
        look["marker"] = look["marker"] or "o"
    ax.plot(steps, iqm(y), linewidth=2, markersize=5, markevery=-(-len(steps) // 10), **look)
    if len(runs) > 2:
        ax.fill_between(steps, *interval(y), color=look["color"], alpha=0.15, linewidth=0)


def set_scale(ax, scalar):
    """Choose the vertical axis of a scalar, logarithmic where its values span decades."""
    if scalar in ("norm/actor_grad", "|norm/q_bias|"):
        ax.set_yscale("log")
    if scalar == "norm/first_ratio":
        ax.set_yscale("symlog", linthresh=0.1)
    if scalar == "norm/q_bias" and np.abs(ax.get_ylim()).max() > 10:
        ax.set_yscale("symlog", linthresh=10)


def draw(data, shown, scalars, file, levels=None):
    """Draw the curves of cells: a panel for each script, environment and scalar.

    levels: {words: height} of dotted lines.
    """
    made = [(x.script, env) for x in shown for env in x.envs if (x.name, env) in data]
    panels = list(dict.fromkeys((*x, scalar) for x in made for scalar in scalars))
    columns = 3 if len(panels) in (3, 5, 6) else 2
    rows = -(-len(panels) // columns)
    figure = plt.figure(figsize=(5 * columns, 3.8 * rows + 0.6), layout="constrained")
    look, entries = looks(shown), {}
    for k, (script, env, scalar) in enumerate(panels):
        ax = figure.add_subplot(rows, columns, k + 1)
        for cell in shown:
            if cell.script == script and env in cell.envs:
                runs = data.get((cell.name, env), {}).values()
                curve(ax, runs, scalar, label=short(cell), **look[short(cell)])
        for words, level in (levels or {}).items():
            ax.axhline(level, color="#808080", linestyle=":", label=words)
        ax.set(xlabel="environment steps (thousands)", ylabel=UNITS[scalar])
        ax.set_title(f"{script}.py, {env.split('/')[-1]}")
        set_scale(ax, scalar)
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=2 * columns)
    save(figure, file)


def dots(rows, xlabel, file):
    """Draw rows of {label: {words: (values, color, marker)}}: a point a seed, a bar their IQM."""
    figure, ax = plt.subplots(figsize=(10, 1.6 + 0.36 * len(rows)), layout="constrained")
    for y, columns in enumerate(rows.values()):
        for k, (x, shade, marker) in enumerate(columns.values()):
            height = y + (k - (len(columns) - 1) / 2) * 0.2
            ax.plot(x, [height] * len(x), marker, color=shade, alpha=0.45, markersize=4)
            ax.plot(iqm(x), height, "|", color=shade, markersize=10, markeredgewidth=3)
    markers = [plt.Line2D([], [], ls="", marker=x, color="#808080") for _, x in MODES.values()]
    figure.legend(markers, MODES, loc="outside upper center", ncols=4)
    ax.set(xlabel=xlabel, yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6))
    ax.set_yticklabels(rows)
    save(figure, file)


@functools.cache
def standing():
    """Return what an ant earns that stands still, from the starts of an evaluation."""
    gym.logger.min_level = gym.logger.ERROR  # it warns that v4 is not the newest
    env, total = gym.make("Ant-v4"), 0.0
    for k in range(5):
        env.reset(seed=1_000_000 + k)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(np.zeros(env.action_space.shape))
            total, done = total + reward, terminated or truncated
    return round(total / 5)


# ---------------------------------------------------------------------------------------- Texts


def table(head, rows):
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    lines = [[str(x).replace("|", "\\|") for x in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def typed(options):
    """Return options of a cell as one types them, but for the length of its runs."""
    options = re.sub(r"--(total-steps|eval-every) \d+ ?", "", options).strip()
    return f"`{options}`" if options else "no option"


def picture(name, words):
    """Return the line that shows a figure."""
    return f"![{words}](study/figures/{name}.svg)"


def answer(data):
    """Return a line for each of DDPG, SAC and PPO: returns without and with batch norm."""
    off = {"none": "without", "naive": "naive", "repair": "repair", "recipe": "recipe"}
    off |= {"crossnorm": "CrossNorm", "crossq": "CrossQ"}  # each in one of the two
    ppo = {"none": "without", "eval-train": "naive", "train-train": "acting in train mode"}
    ppo |= {"zfilter": "a filter instead"}
    bullets = []
    for family, cell_words in {"ddpg": off, "sac": off, "ppo": ppo}.items():
        parts = []
        for name, what in cell_words.items():
            samples = [values(data, f"{family}-{name}", env) for env in BOTH]
            if min(map(len, samples)) > 2:  # one seed or two are no answer
                parts.append(f"{what} {' / '.join(number(iqm(x)) for x in samples)}")
        bullets.append(f"- **{family.upper()}**: {' · '.join(parts)}")
    return "\n".join(bullets)


def watched(data):
    """Return what DDPG shows on HalfCheetah-v4 at 20 thousand steps, and what returns are."""
    parts = []
    for name in ("none", "naive", "repair"):
        runs = data.get((f"ddpg-{name}", BOTH[0]), {}).values()
        runs = [rows[rows["step"] <= 20_000] for rows in runs]
        ends = [[rows[x].iloc[-1] for rows in runs] for x in ("norm/actor_grad", "eval/return")]
        parts += [f"{name} {' and '.join(number(iqm(x)) for x in ends)}"] if runs else []
    words = f"the return are about: {', '.join(parts)}.\n"
    words += "In the later half of 50 thousand steps (interquartile mean, 95 % interval):"
    return f"At 20 thousand steps `norm/actor_grad` and {words}"


def returns(data, known, families, names, envs):
    """Return the table of returns of cells, a row for each name that a family has."""
    columns = [(family, env) for family in families for env in envs]
    head = ["name", "options", *(f"{family.upper()}, {env}" for family, env in columns), "seeds"]
    rows, above = [], ""
    for name in names:
        of = [known[x] for family in families if (x := f"{family}-{name}") in known]
        options = of[0].options
        adds = "--norm" in above and options.startswith(above)
        words = f"`+{options.removeprefix(above)}`" if adds else typed(options)
        if name == "crossq":
            words = "see `sac_bn.py`, but 512 wide"
        samples = [values(data, f"{family}-{name}", env) for family, env in columns]
        rows.append([name, words, *map(told, samples), span([len(x) for x in samples if len(x)])])
        above = options
    return table(head, rows)


def plain(data, known, file):
    """Return the table of the algorithms without normalization layers, beside published results."""
    rows = []
    for name, env, published in pd.read_csv(file).itertuples(index=False):
        cell, x = known[name], values(data, name, env)
        what = f"`{cell.script}.py`, options: {typed(cell.options)}"
        where = f"{env}, {cell.steps / 1e6:g} million"
        rows.append([what, where, told(x), seeds(data, name, env), published])
    return table(["script", "environment, steps", "ours", "seeds", "published"], rows)


def forum(data, known, figures):
    """Return the table of the returns of each policy of REINFORCE in its modes, and draw it."""
    rows, drawn = [], {}
    for cell in (x for x in known.values() if x.family.startswith("reinforce")):
        name, env, found = cell.name, cell.envs[0], {}
        for mode, (metric, marker) in MODES.items():
            has_one = mode == "eval mode" and "batchnorm" not in cell.options
            x = values(data, name, env, "eval/return last 1" if has_one else metric)
            if len(x):
                found[mode] = x, color(cell), marker
        if "plain" in name or not found:
            continue
        texts = [told(found[mode][0]) if mode in found else "" for mode in MODES]
        row = name.removeprefix("reinforce-")
        rows.append([row, typed(cell.options), *texts, seeds(data, name, env)])
        if "cnn" not in name:
            drawn[row] = found
    if drawn:
        dots(drawn, "return (steps of balance, at most 500)", figures / "forum.svg")
    shown = picture("forum", "returns of one policy in its modes")
    return f"{shown}\n\n{table(['cell', 'options', *MODES, 'seeds'], rows)}"


def landscape(file, figures):
    """Return the text about what study.landscape saw, and draw it."""
    runs = dict(list(pd.read_csv(file).groupby("options", sort=False)))
    size = 5 * len(runs), 3.8
    figure, axes = plt.subplots(1, len(runs), figsize=size, squeeze=False, layout="constrained")
    for ax, (options, rows) in zip(axes[0], runs.items(), strict=True):
        for mode, like in (("train", "batchnorm"), ("eval", "--bn-policy-critic eval")):
            seen, label = rows[rows["mode"] == mode], f"critic in {mode} mode"
            ax.plot(seen["factor"], seen["q"], color=COLORS[like], linewidth=2, label=label)
        ax.set(xlabel="factor on all actions of the batch", ylabel="mean Q (discounted return)")
        ax.set(xticks=[-1, -0.5, 0, 0.5, 1], title=typed(options).strip("`"))
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2)
    save(figure, figures / "landscape.svg")
    return picture("landscape", "mean Q by the size of actions, in either mode")


def speed(folder):
    """Return the table of what study.bench measured, and where and when."""
    rows = pd.concat([pd.read_csv(file, dtype=str) for file in sorted(folder.glob("*.csv"))])
    where = rows[["date", "cpu", "commit", "versions"]].drop_duplicates().agg(", ".join, axis=1)
    return f"{bench.table(rows.to_dict('records'))}\n\nMeasured: {'; '.join(where)}."


def judged(claims, verdicts):
    """Return the table of claims: verdict, the comparison that decides first, and the note."""
    rows = []
    for name, claim in claims.items():
        verdict, c, _ = verdicts[name]
        right = c.rule.right if c.rule.right[0].isalpha() else "asked"
        sides = c.rule.left, f"{c.rule.factor:g}*{right}" if c.rule.factor != 1 else right
        if c.paired:
            sides = (metric.split(" last")[0] for metric in c.metrics)
        parts = [f"{x} {number(iqm(y))}" for x, y in zip(sides, (c.x, c.y), strict=True) if len(y)]
        parts = parts if len(parts) == 2 else []
        why = f"{c.env.split('/')[-1]}: {', '.join(dict.fromkeys(parts))}" if parts else ""
        why += "" if c.paired or not parts else unit(c.metrics[0])
        found = ". ".join(x for x in (why, claim.get("note")) if x)
        rows.append([f"{name}: {claim['says']}", claim["source"], verdict, found])
    return table(["claim", "who says it", "verdict", "in short"], rows)


def page(data, known, claims, verdicts):
    """Return the text of CLAIMS.md."""
    parts, rows = [HEAD, judged(claims, verdicts)], []
    for name, (_, _, comparisons) in verdicts.items():
        for c in comparisons:
            default = claims[name].get("metric", RETURN)
            by = "" if " by " in c.words or default == RETURN else f" by {default}"
            rule = "also: " * (not c.decides) + f"`{c.words}{by}`"
            sides = [c.rule.left, c.rule.right]
            made = [seeds(data, x, c.env) if x in known else "" for x in sides]
            found = ["", ""]
            if len(c.x) and len(c.y):
                found = [with_ends(iqm(c.x) - iqm(c.y), c.ends()), number(c.chance())]
            p = "" if c.found == "open" else number(c.p)
            row = [name, rule, c.env.split("/")[-1], *made, told(c.x), told(c.y)]
            rows.append([*row, *found, p, c.found])
    head = "claim", "rule", "environment", "seeds left", "seeds right", "left", "right"
    head += "difference", "P(left > right)", "p", "found"
    parts += ["## All comparisons", table(head, rows)]
    return "\n\n".join([*parts, "## All cells", all_cells(data, known)]) + "\n"


def all_cells(data, known):
    """Return the table of all cells: what runs them, what is made, and their returns."""
    rows = []
    for name, cell in known.items():
        words = " ".join(["python", *cell.program(), *cell.options.split()])
        words += f" --total-steps {cell.steps}"
        runs = [rows for env in cell.envs for rows in data.get((name, env), {}).values()]
        commits = sorted({x for run in runs for x in run["commit"].iloc[0].split()})
        made = ", ".join(seeds(data, name, env) for env in cell.envs) + f" of {len(cell.seeds)}"
        envs = () if "--bn-recalibrate" in cell.options else cell.envs  # see the forum's table
        found = [(env.split("/")[-1], told(values(data, name, env))) for env in envs]
        found = "; ".join(f"{env} {words}" for env, words in found if words)
        rows.append([f"`{name}`", f"`{words}`", made, ", ".join(commits), found])
    return table(["cell", "command", "seeds", "commits", "return"], rows)


def place(text, blocks, file):
    """Put each block between its markers in a text."""

    def content(match):
        if match[1] not in blocks:
            sys.exit(f"study.report: {file} asks for <!-- {match[1]} begin -->, which is unknown")
        block = blocks[match[1]]
        if Path(file).parent.name == "study":  # links are seen from there
            block = block.replace("](study/", "](")
        return f"<!-- {match[1]} begin -->\n{block}\n<!-- {match[1]} end -->"

    text, n = re.subn(r"<!-- (\S+) begin -->\n.*?<!-- \1 end -->", content, text, flags=re.DOTALL)
    if n != text.count(" begin -->"):
        sys.exit(f"study.report: a marker in {file} has no end")
    return text


def make(study, figures, claim_figures=None):
    """Return ({name: block}, text of CLAIMS.md), and draw into the folder figures."""
    claims, known = cells.load(study / "claims.toml")
    data = read(study / "results")
    verdicts = {name: judge(data, known, claim) for name, claim in claims.items()}
    blocks = {"answer": answer(data), "plain": plain(data, known, study / "published.csv")}
    for name, (families, names, envs, scalars) in FIGURES.items():
        every = [f"{family}-{x}" for family in families.split() for x in names.split()]
        shown = [known[x].within(*envs) for x in every if x in known]
        levels = {"an ant that stands still": standing()} if name == "main" else {}
        draw(data, shown, scalars.split(), figures / f"{name}.svg", levels)
        units = " and ".join(UNITS[scalar] for scalar in scalars.split())
        blocks[name] = picture(name, f"{units}, {' and '.join(envs)}")
    blocks["first"] = f"{watched(data)}\n\n{blocks['first']}\n\n" + returns(
        data, known, ["ddpg"], FIGURES["first"][1].split(), BOTH
    )
    blocks["rungs"] = returns(data, known, ["sac"], LADDER.split(), BOTH)
    ant = [cell for cell in known.values() if cell.family in FIGURES["main"][0].split()]
    asked, gone = sum(len(cell.runs()) for cell in ant), missing(data, ant)
    blocks["main"] += "\n\n*Two-pass* is the repair with `--bn-target train`. "
    blocks["main"] += f"{asked - gone} of {asked} runs are made."
    blocks["claims"] = judged({k: v for k, v in claims.items() if k[0] in "FZ"}, verdicts)
    blocks["forum"] = forum(data, known, figures)
    blocks["landscape"] = landscape(study / "landscape.csv", figures)
    blocks["speed"] = speed(study / "speed")
    if claim_figures:
        claim_figures.mkdir(parents=True, exist_ok=True)
        for name, claim in claims.items():
            shown = list(cells.cells_of(claim, known).values())
            metrics = [m for c in verdicts[name][2] for m in c.metrics]
            scalars = dict.fromkeys(re.sub(r"onset |\|", "", m).split()[0] for m in metrics)
            draw(data, shown, scalars, claim_figures / f"{name}.svg")
    return blocks, page(data, known, claims, verdicts)


def main(args):
    """Write all that is out of date, or say what is."""
    style()
    study = args.root / "study"
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder)
        blocks, text = make(study, figures, args.root / "runs" / "figures" if args.all else None)
        made = {study / "figures" / file.name: file.read_text() for file in figures.iterdir()}
    made[study / "CLAIMS.md"] = text
    for name in TEXTS:
        made[args.root / name] = place((args.root / name).read_text(), blocks, name)
    for file, content in made.items():
        if args.check and not (file.exists() and file.read_text() == content):
            sys.exit(f"{file.name} is out of date: run python -m study.report")
        if not args.check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(content)


if __name__ == "__main__":
    main(tyro.cli(Args))
