"""The report: verdicts follow from numbers by the rules, and the texts from the results."""

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import ddpg_bn
from study import cells, collect, landscape

pd = pytest.importorskip("pandas")
stats = pytest.importorskip("scipy.stats")
report = pytest.importorskip("study.report")
verdicts = pytest.importorskip("study.verdicts")
CLAIMS, KNOWN = cells.load()
TEN = np.arange(10.0)


def rows(returns, cell="ddpg-none", env="Hopper-v4", seed=1):
    """Return the rows of a run with these returns, as they stand in a file."""
    about = {"cell": cell, "env": env, "seed": seed, "commit": "1e5", "norm/q_bias": -3.0}
    evals = enumerate(returns, 1)
    return [about | {"step": 10 * k, "eval/return": x, "wall_s": x + 1} for k, x in evals]


def run(returns):
    """Return the same as it is read from a file."""
    return pd.DataFrame(rows(returns)).reindex(columns=collect.COLUMNS).assign(earlier=False)


@pytest.fixture
def root(tmp_path):
    """Return a repository in which some runs were made, some of them by an earlier commit."""
    shutil.copytree(cells.ROOT / "study/speed", tmp_path / "study/speed")
    files = "study/claims.toml", "study/landscape.csv", "study/published.csv", *report.TEXTS
    for name in files:
        shutil.copy(cells.ROOT / name, tmp_path / name)
    for cell, env in itertools.product(("ddpg-none", "ddpg-naive"), KNOWN["ddpg-none"].envs):
        for seed, folder, level in ((1, "", 0), (1, "earlier", 7), (2, "earlier", 7)):
            file = tmp_path / "study/results" / folder / cell / f"{env}-seed{seed}.csv"
            collect.write(file, rows([0, 100 * len(cell) + level], cell, env, seed))
    return tmp_path


@pytest.mark.slow
def test_texts_and_figures_tell_the_committed_results():
    report.main(report.Args(check=True))


def test_what_is_out_of_date_is_told_and_figures_are_the_same_to_the_byte(root):
    report.main(report.Args(root=root))
    report.main(report.Args(check=True, root=root))  # draws them anew
    text = (root / "study/CLAIMS.md").read_text()
    assert len(text.splitlines()) < 300 and len(list((root / "study/figures").iterdir())) <= 12
    row = "| Z2 | `ddpg-naive < ddpg-none` | Hopper-v4 | 1 + 1e | 1 + 1e | 502 | 452 | 50 |"
    assert f"{row} 1 |  | open |" in text
    assert report.standing() == pytest.approx(1000, abs=5)  # an ant gets 1 a step for its health
    (root / "study/figures/first.svg").write_text("another")
    with pytest.raises(SystemExit, match=r"first\.svg is out of date: run python -m study.report"):
        report.main(report.Args(check=True, root=root))


def test_blocks_stand_between_their_markers():
    text = "a\n<!-- x begin -->\nold\n<!-- x end -->\nb"
    new = report.place(text, {"x": "![y](study/figures/x.svg)", "z": ""}, "study/FINDINGS.md")
    assert new == text.replace("old", "![y](figures/x.svg)")
    with pytest.raises(SystemExit, match=r"R asks for <!-- x begin -->, which is unknown"):
        report.place(text, {}, "R")
    with pytest.raises(SystemExit, match="a marker in R has no end"):
        report.place(text.replace("x end", "y end"), {"x": ""}, "R")


def test_a_critic_in_train_mode_is_flat_to_its_actor(small, tmp_path):
    """Whatever the action: with batch norm last, and not with batch norm before the activation."""
    options = {"norm": "batchnorm", "total_steps": 200, "env": "ShortPendulum-v0"}
    args = small(ddpg_bn, **options), small(ddpg_bn, norm_position=("pre",), **options)
    made = tuple(Path(ddpg_bn.train(x)["run_dir"]) for x in args)
    landscape.main(landscape.Args("abc", made, tmp_path / "landscape.csv"))
    seen = pd.read_csv(tmp_path / "landscape.csv")
    assert len(seen.groupby(["env", "seed", "commit"])) == 1 and len(seen) == 4 * 41
    spans = seen.groupby([seen["options"].str.contains("pre"), "mode"])["q"].agg(np.ptp)
    assert spans[False, "train"] < 1e-4 * spans[False, "eval"]
    assert spans[True, "train"] > 1e-3 * spans[True, "eval"]


def test_statistics_by_hand_and_by_scipy():
    assert verdicts.iqm([0, 1, 2, 6, 100]) == 3
    assert verdicts.iqm([9, 0, 1, 2, 3, 4, 5, 6, 7, 100]) == (2 + 3 + 4 + 5 + 6 + 7) / 6
    x, y = [1.0, 2, 3, 4, 5], [3.5, 6, 7, 8, 9, 2.5]
    assert verdicts.improvement(x, y) == (0 + 0 + 1 + 2 + 2) / 30
    assert verdicts.p_value(x, y) == stats.mannwhitneyu(x, y, method="exact").pvalue
    assert verdicts.p_value([1, 1, 2], [3, 3, 4]) == pytest.approx(2 / 20)  # of 20 splits, ties too
    assert verdicts.p_value(TEN, TEN**2 + 1, paired=True) == pytest.approx(2 / 2**10)
    assert verdicts.p_value(TEN, TEN, paired=True) == 1
    corrected = verdicts.holm([0.01, 0.04, 0.03, 0.005])  # times 3, 1, 2, 4, and never falling
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_an_interval_is_that_of_all_resamples():
    """All 27 x 27 resamples of three seeds and three, the means of each."""
    x, y = [1.0, 20.0, 300.0], [7.0, 40.0, 90.0]
    means = [[np.mean(draw) for draw in itertools.product(z, repeat=3)] for z in (x, y)]
    every = np.sort(np.subtract.outer(*means).ravel())
    low, high = verdicts.interval(x, y)
    assert every[int(0.021 * 729)] <= low <= every[int(0.029 * 729)]
    assert every[int(0.971 * 729)] <= high <= every[int(0.979 * 729)]
    assert verdicts.interval(x, np.subtract(x, 5), paired=True) == (5, 5)


@pytest.mark.parametrize("side", ["compare", "also"])
@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_enough_seeds_are_asked_to_find_every_difference(claim, side):
    """All seeds of one side above all of the other must give p < 0.05, corrected."""
    smallest = []
    for rule in map(cells.parse, claim.get(side, [])):
        if rule.relation != "same" and rule.right in KNOWN:
            left, right = KNOWN[rule.left], KNOWN[rule.right]
            n, m = len(left.seeds), len(right.seeds)
            p = 2 / 2**n if left == right else 2 / math.comb(n + m, n)
            smallest += [p] * len(rule.envs or set(left.envs) & set(right.envs))
    assert (verdicts.holm(np.array(smallest)) < 0.05).all()


def test_a_new_run_takes_the_place_of_an_earlier_one(root):
    data = verdicts.read(root / "study/results")
    found = verdicts.values(data, "ddpg-none", "Hopper-v4", "eval/return last 1")
    assert found.to_dict() == {1: 900, 2: 907}
    assert verdicts.missing(data, [KNOWN["ddpg-none"]]) == 16
    (root / "study/results/ddpg-none/Hopper-v4-seed1.csv").write_text("")
    with pytest.raises(SystemExit, match=r"Hopper-v4-seed1.csv holds no results"):
        verdicts.read(root / "study/results")


def test_metrics_of_a_run_that_diverged_are_those_before():
    diverged = run([1, 2, 3, 4, 5, 6, np.nan])
    metrics = "eval/return last 5", "|norm/q_bias last 5|", "eval/return mean", "onset eval/return"
    assert [verdicts.value(diverged, metric) for metric in metrics] == [4, 3, 3.5, 40]
    assert np.isnan(verdicts.value(diverged, "norm/stat_lag mean"))
    assert np.isnan(verdicts.onset(run([1, 5, 1]), "eval/return"))  # no change from first to last


def test_a_curve_is_the_iqm_and_stays_at_the_last_value_of_a_run_that_diverged():
    _, ax = report.plt.subplots()
    some = [run([x, x]) for x in (0, 1, 2, 6)] + [run([100])]
    report.curve(ax, some, "eval/return", color="red", marker="")
    assert ax.lines[0].get_xydata().tolist() == [[0.01, 3], [0.02, 3]]
    ends = tuple(ax.collections[0].get_paths()[0].get_extents().intervaly)
    assert ends == verdicts.interval([0, 1, 2, 6, 100])
    for gap in (np.nan, np.inf):  # later values keep their steps
        report.curve(ax, [run([1, gap, 3])], "eval/return", color="red", marker="")
        assert ax.lines[-1].get_xydata().tolist() == [[0.01, 1], [0.02, 1], [0.03, 3]]


LEVELS = {"none": 100, "naive": 50, "repair": 100.5}
DATA = {(x, "Hopper-v4"): {k: run([y + k]) for k in range(10)} for x, y in LEVELS.items()}
CELL = KNOWN["ddpg-none"]._replace(envs=("Hopper-v4",), seeds=range(10))
SHORT = {x: CELL._replace(name=x) for x in (*LEVELS, "recipe")}
PAIRED = "by eval/return last 1, wall_s last 1"  # 1 higher in each run
RULES = {
    "holds": "naive < none; naive <= none; naive > 0.4*none; repair >= none; repair = none;"
    f"none > 99; none same none; none < none {PAIRED}",
    "refuted": "naive > none; naive >= none; naive = none; naive < 0.4*none; none > 109.5;"
    f"none same naive; none > none {PAIRED}",
    "no difference found, smaller than 3": "repair > none; repair < none",
    "no difference found, smaller than 2.83": "none > 105",
    "open, 10 of 20 runs": "recipe > none; recipe = none; none same recipe",
}


@pytest.mark.parametrize("verdict", RULES)
def test_verdicts_follow_the_rules(verdict):
    for rule in RULES[verdict].split(";"):
        assert verdicts.judge(DATA, SHORT, {"compare": [rule]})[0].startswith(verdict), rule


def test_a_claim_tells_its_largest_difference_and_waits_for_what_has_no_numbers():
    some, data = ["none > 105", "repair > none"], DATA | {("recipe", "Hopper-v4"): {}}
    assert verdicts.judge(DATA, SHORT, {"compare": some})[0].endswith("smaller than 3.67")
    for seed in range(10):  # diverged before its first evaluation
        data["recipe", "Hopper-v4"][seed] = run([np.nan])
    some = ["none > naive", "none > recipe"]
    assert verdicts.judge(data, SHORT, {"compare": some})[0] == "open"


def test_p_is_corrected_for_what_decides():
    """Four seeds against four have p 2 / 70, of which two comparisons make 0.057."""
    known = {name: cell._replace(seeds=(0, 1, 2, 3)) for name, cell in SHORT.items()}
    data = {key: {k: made[k] for k in range(4)} for key, made in DATA.items()}
    one, two = ["naive < none"], ["naive <= none"]
    verdict, _, found = verdicts.judge(data, known, {"compare": one, "also": two})
    assert verdict == "holds" and [c.p for c in found] == pytest.approx([2 / 70, 2 / 70])
    verdict, first, _ = verdicts.judge(data, known, {"compare": one + two})
    assert verdict.startswith("no difference found") and first.p == pytest.approx(4 / 70)
