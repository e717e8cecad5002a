"""What follows from study/results: metrics of runs, what two cells differ by, verdicts of claims.

The rules stand in claims.toml, and the method in CLAIMS.md.
"""

import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from study import cells, collect

RETURN = "eval/return last 5"  # what a comparison is by, if nothing else is said
DRAWS = 10_000  # resamples of an interval
HOLDS = {  # relation: what may be found
    ">": ["ahead"],
    "<": ["behind"],
    ">=": ["ahead", "no difference"],
    "<=": ["behind", "no difference"],
    "=": ["no difference"],
    "same": ["same"],
}

# ------------------------------------------------------------------------------------ Results


def read(folder):
    """Return {(cell, environment): {seed: rows}}; a new run takes the place of an earlier one."""
    data = {}
    for where in ("earlier/*/*.csv", "*/*.csv"):
        for file in sorted(folder.glob(where)):
            try:
                rows = pd.read_csv(file, dtype={"commit": str}).reindex(columns=collect.COLUMNS)
                cell, env, seed = rows.loc[0, ["cell", "env", "seed"]]
            except (ValueError, KeyError) as error:
                sys.exit(f"study.report: {file} holds no results ({error!r})")
            rows["earlier"] = where.startswith("earlier")
            rows["|norm/q_bias|"] = rows["norm/q_bias"].abs()
            data.setdefault((cell, env), {})[seed] = rows
    return {key: dict(sorted(runs.items())) for key, runs in data.items()}


def finite(rows, scalar):
    """Return the rows of a run in which a scalar is known and finite."""
    return rows[np.isfinite(rows[scalar])]


def value(rows, metric):
    """Return a metric of a run, as claims.toml describes them; nan where it is not known."""
    if metric.startswith("|"):
        return abs(value(rows, metric.strip("|")))
    if metric.startswith("onset "):
        return onset(rows, metric.removeprefix("onset "))
    scalar, how, *n = metric.split()
    if how == "last":  # of the evaluations that a run that diverged has
        rows = finite(rows, "eval/return").tail(int(n[0]))
    return finite(rows, scalar)[scalar].mean()


def onset(rows, scalar):
    """Return the first step at which a scalar is past half of its change from first to last."""
    rows = finite(rows, scalar)
    x = rows[scalar].to_numpy()
    if not len(x) or x[0] == x[-1]:
        return np.nan
    past = (x - x[0]) / (x[-1] - x[0]) >= 0.5
    return float(rows["step"].iloc[np.argmax(past)])


def values(data, cell, env, metric=RETURN):
    """Return a metric of all runs that have it, by seed."""
    runs = data.get((cell, env), {})
    return pd.Series(
        {seed: value(rows, metric) for seed, rows in runs.items()}, dtype=float
    ).dropna()


def seeds(data, cell, env):
    """Return how many seeds were run, those of earlier commits apart: `7 + 3e`."""
    earlier = [rows["earlier"].iloc[0] for rows in data.get((cell, env), {}).values()]
    counts = f"{earlier.count(False)}", f"{earlier.count(True)}e"
    return " + ".join(x for x in counts if x not in ("0", "0e")) or "0"


def missing(data, some):
    """Return how many runs of these cells are missing."""
    runs = [run for cell in some for run in cell.runs()]
    return sum(run.seed not in data.get((run.cell.name, run.env), {}) for run in runs)


# --------------------------------------------------------------------------------- Statistics


def iqm(x, axis=0):
    """Return the interquartile mean."""
    return stats.trim_mean(x, 0.25, axis=axis)


def interval(x, y=None, paired=False):
    """Return the interval of the IQM of x (seeds first), or of its difference to that of y."""
    samples = [np.asarray(x)] if y is None else [np.asarray(x), np.asarray(y)]
    if min(map(len, samples)) < 3:  # of two it would hold the truth half of the time
        return np.nan, np.nan

    def difference(x, y=0, axis=0):
        return iqm(x, axis) - (iqm(y, axis) if len(samples) == 2 else 0)

    options = {"axis": 0, "paired": paired, "n_resamples": DRAWS, "method": "percentile"}
    return tuple(stats.bootstrap(samples, difference, rng=0, **options).confidence_interval)


def improvement(x, y, paired=False):
    """Return P(x > y) over all pairs of seeds, or over the same runs; a tie counts half."""
    x, y = np.asarray(x), np.asarray(y)
    difference = x - y if paired else np.subtract.outer(x, y)
    return np.heaviside(difference, 0.5).mean()


def p_value(x, y, paired=False):
    """Return the exact p of the Mann-Whitney test, for the same runs that of Wilcoxon's."""
    x, y = np.asarray(x), np.asarray(y)
    if paired:
        return stats.wilcoxon(x, y).pvalue if (x != y).any() else 1.0
    has_ties = len(np.unique([*x, *y])) < len(x) + len(y)
    every = stats.PermutationMethod(n_resamples=200_000)  # all 184756 of ten seeds and ten
    return stats.mannwhitneyu(x, y, method=every if has_ties else "exact").pvalue


def holm(p):
    """Return p-values corrected by Holm for their number."""
    order = np.argsort(p)
    corrected = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1))
    return np.minimum(corrected, 1.0)[np.argsort(order)]


# ----------------------------------------------------------------------------------- Verdicts


@dataclass
class Comparison:
    """Two cells, or a cell and a number, in one environment."""

    words: str  # of the rule
    rule: cells.Rule
    env: str
    metrics: tuple[str, str]
    x: pd.Series  # of the left, a value a seed
    y: pd.Series
    p: float = np.nan  # corrected; where there is a test
    found: str = "open"  # or no difference, or where the left is: ahead, behind
    decides: bool = True  # else it stands in `also`

    @property
    def paired(self):
        """Return whether the same runs stand on both sides."""
        return self.rule.left == self.rule.right

    def ends(self):
        """Return the interval of the difference."""
        return interval(self.x, self.y, self.paired)

    def chance(self):
        """Return P(left > right)."""
        return improvement(self.x, self.y, self.paired)

    def verdict(self):
        """Return whether the rule holds, is refuted, or neither."""
        if self.found in HOLDS[self.rule.relation]:
            return "holds"
        neither = {"open": "open", "no difference": "no difference found"}
        return neither.get(self.found, "refuted")


def compare(data, known, claim, words):
    """Return the comparisons of one rule, one for each environment; p is not corrected yet."""
    rule, found = cells.parse(words), []
    metrics = rule.metrics or claim.get("metric", RETURN).split(", ")
    sides = [known[name] for name in (rule.left, rule.right) if name in known]
    for env in rule.envs or [env for env in sides[0].envs if env in sides[-1].envs]:
        x = values(data, rule.left, env, metrics[0])
        y = rule.factor * values(data, rule.right, env, metrics[-1])
        if rule.right not in known:
            y = pd.Series(float(rule.right), x.index)
        c = Comparison(words, rule, env, (metrics[0], metrics[-1]), x, y)
        if c.paired:
            c.x, c.y = x.align(y, join="inner")
        found.append(c)
        has_test = rule.relation != "same" and rule.right in known
        c.p = 1.0 if has_test else np.nan  # an open one counts in the correction
        if min(len(c.x), len(c.y)) < 3:  # too few to say anything
            continue
        if rule.relation == "same":
            left, right, scalar = data[rule.left, env], data[rule.right, env], metrics[0].split()[0]
            same = all(left[k][scalar].equals(right[k][scalar]) for k in left if k in right)
            c.found = "same" if same else "not the same"
        elif has_test:
            c.p = p_value(c.x, c.y, c.paired)
            c.found = "ahead" if c.chance() > 0.5 else "behind"
        else:  # each seed against a number
            c.found = {1.0: "ahead", 0.0: "behind"}.get(c.chance(), "no difference")
    return found


def tested(comparisons):
    """Correct the p-values of comparisons, and take back what they do not bear."""
    some = [c for c in comparisons if not np.isnan(c.p)]
    for c, p in zip(some, holm([c.p for c in some]), strict=True):
        c.p = p
        if c.found != "open" and p >= 0.05:
            c.found = "no difference"
    return comparisons


def judge(data, known, claim):
    """Return the verdict of a claim, the comparison that decides it, and all comparisons."""
    found = {}
    for side in ("compare", "also"):
        rules = claim.get(side, [])
        found[side] = tested([c for words in rules for c in compare(data, known, claim, words)])
    for c in found["also"]:
        c.decides = False
    order = "refuted", "no difference found", "open", "holds"
    first = min(found["compare"], key=lambda c: order.index(c.verdict()))
    asked = cells.cells_of({"compare": claim["compare"]}, known).values()
    n, gone = sum(len(cell.runs()) for cell in asked), missing(data, asked)
    verdict = first.verdict()
    if verdict == "no difference found":
        like = [c for c in found["compare"] if c.metrics == first.metrics]
        largest = max(np.abs(c.ends()).max() for c in like if c.verdict() == verdict)
        verdict += f", smaller than {number(largest)}{unit(first.metrics[0])}"
    if gone:
        decided = verdict in ("holds", "refuted") and "open" not in [
            c.found for c in found["compare"]
        ]
        verdict = f"open, {n - gone} of {n} runs" + f", so far: {verdict}" * decided
    return verdict, first, found["compare"] + found["also"]


def unit(metric):
    """Return the unit of a metric in words, nothing for a return."""
    if metric.startswith("onset"):
        return " steps"
    scalar = metric.strip("|").split()[0]
    return "" if "return" in scalar else f" of `{scalar}`"


def number(x):
    """Return a number as short as it may be told; nothing if it is not known."""
    if not np.isfinite(x):
        return ""
    return f"{x:.0f}" if abs(x) >= 100 or x == int(x) else f"{x:.3g}"


def told(x):
    """Return the IQM of values and its interval in words; nothing of no values."""
    return with_ends(iqm(x), interval(x)) if len(x) else ""


def with_ends(x, ends):
    """Return a number and its interval in words."""
    low, high = map(number, ends)
    return f"{number(x)} ({low} to {high})" if low != high else number(x)


def span(counts):
    """Return the smallest and the largest of some counts, in words."""
    return " to ".join(str(n) for n in dict.fromkeys((min(counts), max(counts)))) if counts else "0"
