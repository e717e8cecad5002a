"""The study: what a run becomes in study/results, and that missing runs are made, whatever dies."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import scalars

import reinforce_bn
import study.run
from study import cells, collect

CLAIMS = """
[family.tiny]
script = "reinforce_bn.py"
envs = ["CartPole-v1"]
steps = 10_000
seeds = 1
options = "--eval-every 2000 --eval-episodes 2 --save-every 500"

[family.tiny.cells]
none = ""
filter = "--norm zfilter"
fixed = "--norm fixed --norm-stats {filter}"
fixed-2 = "--norm fixed --norm-stats {fixed}"
"""


@pytest.fixture
def tiny(tmp_path):
    """Return the words that start the study of these cells in folders of its own."""
    file = tmp_path / "claims.toml"
    file.write_text(CLAIMS)

    def words(name, *more):
        folders = ["--results", str(tmp_path / name), "--runs", str(tmp_path / f"runs-{name}")]
        return [sys.executable, "-m", "study.run", "--file", str(file), *folders, *more]

    return words


def table(file):
    with open(file) as lines:
        return list(csv.DictReader(lines))


def make(run, folder, **options):
    """Make a run by hand; return its folder."""
    args = reinforce_bn.Args(env=run.env, seed=run.seed, run_dir=str(folder), **options)
    reinforce_bn.train(args)
    return folder


@pytest.fixture
def run(tmp_path):
    file = tmp_path / "claims.toml"
    file.write_text(CLAIMS.replace("10_000", "2_000"))
    return cells.load(file)[1]["tiny-none"].runs()[0]


def test_a_run_becomes_a_row_for_each_evaluation(run, tmp_path):
    folder = make(run, tmp_path / "run", total_steps=2000, eval_every=500, eval_episodes=2)
    result = json.loads((folder / "result.json").read_text())
    rows = collect.rows(run, folder, "abc")
    assert [row["step"] for row in rows] == [step for step, _, _ in result["eval"]]
    assert [float(row["eval/return"]) for row in rows] == pytest.approx(
        [mean for _, mean, _ in result["eval"]], rel=1e-4
    )
    assert all(float(row["norm/first_ratio"]) < 1e-3 for row in rows)
    about = "tiny-none", "reinforce_bn", "CartPole-v1", 1, "abc", 0
    keys = "cell", "script", "env", "seed", "commit", "diverged"
    assert all(tuple(row[key] for key in keys) == about for row in rows)
    assert rows[0]["options"] == "--total-steps 2000 --eval-every 500 --eval-episodes 2"


def test_a_scalar_is_the_mean_since_the_evaluation_before(run, tmp_path):
    folder = make(run, tmp_path / "run", total_steps=2000, eval_every=1000, eval_episodes=2)
    first, last = (row["step"] for row in collect.rows(run, folder, "abc"))
    points = scalars(str(folder), "charts/episodic_return")
    expected = [v for step, v in points if first < step <= last]
    mean = float(collect.rows(run, folder, "abc")[-1]["charts/episodic_return"])
    assert mean == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_a_run_that_diverged_ends_with_a_row_where_it_stopped(run, tmp_path, monkeypatch):
    real = reinforce_bn.update
    calls = []

    def update(agent, batch, args):
        calls.append(0)
        losses, taken = real(agent, batch, args)
        return losses | (
            {"policy": losses["policy"] * float("nan")} if len(calls) > 3 else {}
        ), taken

    monkeypatch.setattr(reinforce_bn, "update", update)
    folder = make(run, tmp_path / "run", total_steps=9000, eval_every=0)
    (row,) = collect.rows(run, folder, "abc")
    assert row["diverged"] == 1 and row["step"] < 9000 and "eval/return" not in row


def test_a_file_of_results_is_whole_or_not_there(run, tmp_path):
    file = tmp_path / "results" / "cell" / "run.csv"
    collect.write(file, [{"step": 1, "cell": "x"}])
    assert [row["step"] for row in table(file)] == ["1"]
    assert [x.name for x in file.parent.iterdir()] == ["run.csv"]
    with pytest.raises(ValueError, match="fields not in"):
        collect.write(file, [{"what": 1}])
    assert [row["step"] for row in table(file)] == ["1"]


def test_a_run_by_hand_finds_its_cell(run, tmp_path):
    known = cells.load(tmp_path / "claims.toml")[1]
    options = {"total_steps": 2000, "eval_every": 2000, "eval_episodes": 2}
    source = make(run, tmp_path / "a", norm="zfilter", **options)
    fixed = {"norm": "fixed", "norm_stats": str(source / "obs_stats.npz"), **options}
    once = make(run, tmp_path / "b", **fixed)
    twice = make(run, tmp_path / "c", **fixed | {"norm_stats": str(once / "obs_stats.npz")})
    found = [collect.find(folder, known).cell.name for folder in (source, once, twice)]
    assert found == ["tiny-filter", "tiny-fixed", "tiny-fixed-2"]
    with pytest.raises(ValueError, match="no cell"):
        collect.find(make(run, tmp_path / "d", norm="layernorm", **options), known)
    with pytest.raises(ValueError, match="no cell"):
        collect.find(make(run, tmp_path / "e", **options | {"eval_episodes": 1}), known)
    with pytest.raises(ValueError, match="no folder of a run"):
        collect.find(tmp_path, known)


def test_a_run_is_chosen_once_whoever_needs_it():
    names = "B8", "Z7", "ddpg-none"  # both claims compare the third
    todo, known = study.run.choose(study.run.Args(names, results=Path("none")))
    assert all(run.cell == known[run.cell.name] for run in todo)
    paths = [run.path() for run in todo]
    assert len(set(paths)) == len(paths) and Path("ddpg-none/Hopper-v4-seed3") in paths


def test_the_name_of_a_file_has_no_namespace():
    cell = cells.load()[1]["reinforce-cnn-none"]
    assert cell.runs()[1].path() == Path("reinforce-cnn-none/Breakout-v1-seed2")


def test_a_dry_run_prints_the_missing_commands(tiny, tmp_path):
    done = tmp_path / "out" / "tiny-none" / "CartPole-v1-seed1.csv"
    collect.write(done, [])
    words = tiny("out", "--dry-run", "tiny-none", "tiny-fixed")
    lines = subprocess.run(words, capture_output=True, text=True, cwd=cells.ROOT).stdout.split("\n")
    assert lines[0].startswith("python reinforce_bn.py --eval-every 2000")
    assert lines[1:] == ["1 runs are missing", ""]
    stats = tmp_path / "runs-out" / "tiny-filter" / "CartPole-v1-seed1" / "obs_stats.npz"
    assert f"--norm-stats {stats}" in lines[0]


@pytest.mark.parametrize(
    "words",
    [("Z99",), ("--cpus", "0"), ("--file", "no.toml"), ("--file", __file__), ("--address", "x:1")],
    ids=" ".join,
)
def test_a_mistake_gets_one_line(tiny, words):
    if "--address" in words:
        pytest.importorskip("ray")
    result = subprocess.run(tiny("out", *words), capture_output=True, text=True, cwd=cells.ROOT)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert " ".join(words) in result.stderr


def test_progress_is_told_now_and_then_where_there_is_no_terminal(run, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    screen = study.run.Screen([run])
    for step in range(0, 1000, 10):  # a run of 2000 steps
        screen.draw({run: step})
        now[0] += 10
    whole, each = capsys.readouterr().out.splitlines()
    assert whole == "0 of 1 runs, 23 min left"
    assert each == "  tiny-none/CartPole-v1-seed1   step 600 of 2000, 23 min left"
    screen.done(run, "return 7", {run: 2000})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["tiny-none/CartPole-v1-seed1: return 7", "1 of 1 runs, 0 s left"]


@pytest.fixture
def script(run, tmp_path, monkeypatch):
    """Return a function that brings a run to its end, by a script with a given text."""
    folder = tmp_path / "folder"
    folder.mkdir()

    def finish(text):
        words = [sys.executable, "-c", text.replace("FOLDER", repr(str(folder)))]
        monkeypatch.setattr(study.run, "command", lambda *_: words)
        steps = []
        with open(tmp_path / "log", "a+") as log:
            study.run.finish(run, folder, tmp_path, log, steps.append)
        return steps

    return finish


def test_a_script_that_is_killed_is_started_again(script):
    text = "import os, pathlib, time; print('step 7 of 9', flush=True); time.sleep(1)\n"
    text += (
        "folder = pathlib.Path(FOLDER); again = (folder / 'x').exists(); (folder / 'x').touch()\n"
    )
    text += "(folder / 'result.json').touch() if again else os.kill(os.getpid(), 9)"
    assert script(text).count(0) == 2


def test_a_mistake_ends_with_the_line_of_the_script(script):
    with pytest.raises(RuntimeError, match=r"exit code 2, see .*log: no such option"):
        script("print('no such option'); exit(2)")


def descendants(pid):
    """Return the ids of all processes that a process started, directly or not."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in lines.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, of in pairs if of == parent]
    return found[1:]


def test_all_runs_are_made_though_a_machine_goes_away(tiny, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    which = "tiny-none", "tiny-fixed"
    subprocess.run(tiny("calm", "--cpus", "2", *which), check=True, cwd=cells.ROOT)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        words = tiny("storm", "--address", cluster.address, *which)
        driver = subprocess.Popen(words, cwd=cells.ROOT)
        raylet = node.all_processes["raylet"][0].process.pid
        script, folder = saved_script(raylet, tmp_path / "runs-storm")
        killed = [*descendants(raylet), raylet]
        for pid in killed:  # all at once, as if somebody had pulled the plug
            os.kill(pid, signal.SIGKILL)
        assert driver.wait(120) == 0
    finally:
        cluster.shutdown()
    assert script in killed and len(list(folder.glob("events*"))) == 2  # resumed, not begun anew
    names = sorted(str(x.relative_to(tmp_path / "calm")) for x in (tmp_path / "calm").glob("*/*"))
    assert len(names) == 3
    for name in names:
        calm, storm = (table(tmp_path / folder / name) for folder in ("calm", "storm"))
        for row in calm + storm:
            row |= {"wall_s": "", "options": row["options"].replace("runs-storm", "runs-calm")}
        assert calm == storm, name
    again = subprocess.run(tiny("storm", *which), capture_output=True, text=True, cwd=cells.ROOT)
    assert again.stdout == "0 runs are missing\n"


def test_a_stop_lets_runs_save_themselves_even_in_the_background(tiny, tmp_path):
    pytest.importorskip("ray")
    file = tmp_path / "claims.toml"  # a run that no machine ends before it is stopped
    file.write_text(file.read_text().replace("10_000", "1_000_000"))
    words = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *tiny("out", "tiny-none")]
    driver = subprocess.Popen(words, cwd=cells.ROOT)  # a shell's background jobs ignore Ctrl-C
    _, folder = saved_script(driver.pid, tmp_path / "runs-out")
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 1
    assert "stopped at step" in Path(f"{folder}.log").read_text()
    assert not (folder / "result.json").exists()


def saved_script(raylet, runs):
    """Wait until a script under this process has saved itself; return its id and folder."""
    for _ in range(1200):
        time.sleep(0.05)
        for pid in descendants(raylet):
            command = Path(f"/proc/{pid}/cmdline")
            words = command.read_text().split("\0") if command.exists() else []
            folders = [Path(x) for x in words if x.startswith(str(runs))]
            if any((folder / "checkpoint.pt").exists() for folder in folders):
                return pid, folders[0]
    raise AssertionError("no script saved itself")
