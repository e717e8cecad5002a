"""The report: verdicts follow from numbers by the rules, and the README from the results."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

import ddpg_bn
from study import cells, collect, landscape

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
report = pytest.importorskip("study.report")

CLAIM = {"id": "T1", "source": "nobody", "says": "Something.", "metric": "eval/return last 1"}
LEVELS = {"ddpg-none": 100, "ddpg-batchnorm": 50, "ddpg-zfilter": 101}


@pytest.fixture
def root(tmp_path):
    """Return a repository in which some runs were made, one of which diverged."""
    (tmp_path / "study").mkdir()
    for name in report.TEXTS:
        shutil.copy(cells.ROOT / name, tmp_path / name)
    shutil.copy(cells.CLAIMS, tmp_path / "study")
    for name, level in LEVELS.items():
        for run in cells.load()[1][name].runs():
            about = {"cell": name, "env": run.env, "seed": run.seed, "diverged": 0}
            rows = [about | {"step": k, "eval/return": level + run.seed + k} for k in (1, 2)]
            if name == "ddpg-none" and run.seed == 1:
                rows.append(about | {"step": 3, "diverged": 1})
            collect.write(tmp_path / "study" / "results" / f"{run.path()}.csv", rows)
    return tmp_path


@pytest.mark.slow
def test_texts_and_figures_tell_the_committed_results():
    report.main(report.Args(check=True))


def test_what_is_out_of_date_is_told_and_mended_and_figures_are_the_same_to_the_byte(root):
    for name in ("ddpg-crossnorm", "ddpg-joint", "ddpg-eval-policy-critic"):
        shutil.copytree(root / "study/results/ddpg-none", root / "study/results" / name)
    for file in (root / "study/results").glob("*/*"):
        file.write_text(file.read_text().replace("ddpg-none", file.parent.name))
    report.main(report.Args(root=root))
    report.main(report.Args(check=True, root=root))  # draws it anew
    assert "| holds | [figure](study/figures/Z6.svg) |" in (root / "README.md").read_text()
    (root / "study" / "figures" / "Z6.svg").write_text("another")
    with pytest.raises(SystemExit, match=r"Z6\.svg is out of date: run python -m study.report"):
        report.main(report.Args(check=True, root=root))


def test_a_critic_in_train_mode_is_flat_to_its_actor(small, tmp_path):
    """Whatever the action: with batch norm last, and not with batch norm before the activation."""
    options = {"norm": "batchnorm", "total_steps": 200, "env": "ShortPendulum-v0"}
    args = small(ddpg_bn, **options), small(ddpg_bn, norm_position=("pre",), **options)
    runs = tuple(Path(ddpg_bn.train(x)["run_dir"]) for x in args)
    landscape.main(landscape.Args("abc", runs, tmp_path / "landscape.csv"))
    spans = {}
    for row in report.read_rows(tmp_path / "landscape.csv"):
        assert (row["env"], row["seed"], row["commit"]) == ("ShortPendulum-v0", "1", "abc")
        spans.setdefault(("pre" in row["options"], row["mode"]), []).append(float(row["q"]))
    assert {len(q) for q in spans.values()} == {41}
    spans = {what: np.ptp(q) for what, q in spans.items()}
    assert spans[False, "train"] < 1e-4 * spans[False, "eval"]
    assert spans[True, "train"] > 1e-3 * spans[True, "eval"]
    words = report.landscape(tmp_path / "landscape.csv", tmp_path)
    assert (tmp_path / "landscape.svg").exists() and "](study/figures/landscape.svg)" in words


@pytest.mark.parametrize(
    "relation, below, around, above",
    [
        ("<", "holds", "not decided", "refuted"),
        ("<=", "holds", "holds", "refuted"),
        ("=", "refuted", "holds", "refuted"),
        (">=", "refuted", "holds", "holds"),
        (">", "refuted", "not decided", "holds"),
    ],
)
def test_verdicts_follow_the_rules(relation, below, around, above):
    intervals = (-2, -1), (-1, 1), (1, 2)
    assert [report.judge(relation, *x) for x in intervals] == [below, around, above]
    assert [report.judge(relation, *x) for x in ((-1, 0), (0, 1))] == [around, around]  # they touch
    assert report.judge(relation, np.nan, np.nan) == "not decided"


@pytest.mark.parametrize(
    "rule, verdict",
    [
        ("ddpg-batchnorm < ddpg-none", "holds"),
        ("ddpg-batchnorm > ddpg-none", "refuted"),
        ("ddpg-zfilter > ddpg-none in Hopper-v4", "not decided"),
        ("ddpg-none > 90", "holds"),
        ("ddpg-none same ddpg-none", "holds"),
        ("ddpg-none same ddpg-zfilter", "refuted"),
    ],
)
def test_comparisons_of_runs(root, rule, verdict):
    data = report.read(root / "study/results")
    found = report.compare(data, cells.load()[1], CLAIM, rule)
    assert [c.verdict for c in found] == [verdict] * len(found)
    assert [c.env for c in found] == (rule.split()[4:] or ["HalfCheetah-v4", "Hopper-v4"])


def test_a_run_that_diverged_counts_with_its_last_evaluation(root):
    data = report.read(root / "study/results")
    values = report.values(data, "ddpg-none", "Hopper-v4", "eval/return last 1")
    assert values == [103, 104, 105]
    assert report.values(data, "ddpg-none", "Hopper-v4", "eval/return mean")[0] == 102.5
    claim = CLAIM | {"compare": ["ddpg-none > 90"]}
    page, _ = report.claim_page(data, cells.load()[1], claim, root)
    assert "| `ddpg-none` | Hopper-v4 | 104 (103 to 105) | 103, 104, 105 | 1 |" in page
    data["ddpg-none", "Hopper-v4"][1][-1]["eval/return"] = "nan"  # it is what diverged
    assert report.values(data, "ddpg-none", "Hopper-v4", "eval/return last 1") == values


def test_the_onset_is_past_half_of_the_change_since_all_are_known():
    x = ["100", "1", "1", "0", "-1", "-3", "-2"]
    rows = [{"step": 10 * k, "x": v, "y": "1" if k else ""} for k, v in enumerate(x)]
    assert report.onset(rows, "x", ("x", "y")) == 40
    assert report.onset(rows, "x", ("x",)) == 10


def test_a_curve_is_the_interquartile_mean_and_stays_at_the_last_value_of_a_run_that_diverged():
    """Of 0, 1, 2, 6 and 100 it is 3, the median 2, the mean 21.8."""
    returns = np.array([0.0, 1.0, 2.0, 6.0, 100.0])
    rows = [{"step": "1000"}, {"step": "2000"}]
    seeds = {k: [row | {"eval/return": str(x)} for row in rows] for k, x in enumerate(returns)}
    seeds[3].pop()
    data = {("ppo-none", "Hopper-v4"): seeds}
    _, ax = report.plt.subplots()
    report.curves(ax, data, {"ppo-none": "none"}, cells.load()[1], "Hopper-v4", "eval/return")
    (line,), (shade,) = ax.lines, ax.collections
    assert line.get_xydata().tolist() == [[1, 3], [2, 3]]
    assert tuple(shade.get_paths()[0].get_extents().intervaly) == report.interval(returns)


def test_a_verdict_waits_for_what_decides_it_only(root):
    data, known = report.read(root / "study/results"), cells.load()[1]
    claim = CLAIM | {"compare": ["ddpg-none > 90"], "also": ["ddpg-none > ddpg-pre"]}
    page, row = report.claim_page(data, known, claim, root)
    assert row[2] == "holds" and "6 of 12 runs are missing, which cannot change that" in page
    assert "also:" not in page
    claim["compare"], claim["also"] = ["ddpg-none > ddpg-pre"], ["ddpg-none > 90"]
    page, row = report.claim_page(data, known, claim, root)
    assert row[2] == "no verdict yet" and "**6 of 12 runs are missing**: `ddpg-pre` (6)." in page
    claim["compare"].append("ddpg-batchnorm > ddpg-none")
    page, row = report.claim_page(data, known, claim, root)
    assert row[2] == "refuted" and "6 of 18 runs are missing, which cannot change that" in page


def test_an_interval_hardly_depends_on_chance():
    """All 27 x 27 resamples of three seeds and three, the means of each."""
    x, y = [1.0, 20.0, 300.0], [7.0, 40.0, 90.0]
    means = [[np.mean(draw) for draw in itertools.product(z, repeat=3)] for z in (x, y)]
    every = np.sort(np.subtract.outer(*means).ravel())
    low, high = report.interval(x, y)
    assert every[int(0.023 * 729)] <= low <= every[int(0.027 * 729)]
    assert every[int(0.973 * 729)] <= high <= every[int(0.977 * 729)]
