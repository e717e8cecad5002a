"""The study: what a run becomes in study/results, and that missing runs are made, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import scalars

import reinforce_bn
import study.run
from study import cells, collect

SLOW = pytest.mark.slow
CLAIMS = """
[family.tiny]
script = "reinforce_bn"
envs = ["CartPole-v1"]
steps = 1_500
seeds = 1
options = "--eval-every 500 --eval-episodes 2 --save-every 250"

[family.tiny.cells]
none = ""
filter = "--norm zfilter"
fixed = "--norm fixed --norm-stats {filter}"
"""
GATE = """
import os, pathlib, time, gymnasium
from gymnasium.envs.classic_control import CartPoleEnv
class Gate(CartPoleEnv):
    steps, file = 0, pathlib.Path(__file__).with_name("reached")
    def step(self, action):
        Gate.steps += 1
        if Gate.steps == 1300 and not self.file.exists():
            self.file.write_text(str(os.getpid()))
            time.sleep(600)  # or until it is stopped
        return super().step(action)
gymnasium.register("Gate-v0", Gate, max_episode_steps=40)
"""


@pytest.fixture
def known(tmp_path):
    (tmp_path / "claims.toml").write_text(CLAIMS)
    return cells.load(tmp_path / "claims.toml")[1]


@pytest.fixture
def gated(tmp_path, monkeypatch):
    """Return cells whose first script to come to step 1300, after an evaluation, waits there."""
    (tmp_path / "claims.toml").write_text(CLAIMS.replace("CartPole-v1", "gate:Gate-v0"))
    (tmp_path / "gate.py").write_text(GATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(cells.ROOT)
    return cells.load(tmp_path / "claims.toml")[1]


def gate_pid(tmp_path):
    """Wait until a script is at the gate; return its id."""
    for _ in range(12_000):  # fail some time
        if (tmp_path / "reached").exists() and (pid := (tmp_path / "reached").read_text()):
            return int(pid)
        time.sleep(0.05)
    raise AssertionError("no script came to the gate")


@pytest.mark.parametrize("rule", ["tiny-none > tiny-typo", "tiny-none >"])
def test_a_claim_about_what_is_no_cell_is_refused(tmp_path, rule):
    (tmp_path / "claims.toml").write_text(f"{CLAIMS}\n[claim.T1]\ncompare = ['{rule}']")
    with pytest.raises(ValueError, match=r"tiny-typo|not enough values"):
        cells.load(tmp_path / "claims.toml")


def make(folder, **options):
    """Make a run by hand; return its folder."""
    options = {"total_steps": 1500, "eval_every": 500, "eval_episodes": 2} | options
    reinforce_bn.train(reinforce_bn.Args(env="CartPole-v1", run_dir=str(folder), **options))
    return folder


def test_a_run_becomes_a_row_for_each_evaluation_with_means_since_the_one_before(known, tmp_path):
    folder = make(tmp_path / "run", total_steps=4000, eval_every=2000)
    rows = collect.rows(known["tiny-none"].runs()[0], folder, "abc")
    evals = json.loads((folder / "result.json").read_text())["eval"]
    assert [row["step"] for row in rows] == [x[0] for x in evals]
    means = [float(row["eval/return"]) for row in rows]
    assert means == pytest.approx([x[1] for x in evals], rel=1e-4)
    about = ["--total-steps 4000 --eval-every 2000 --eval-episodes 2", "abc"]
    about = ["tiny-none", "reinforce_bn", "CartPole-v1", 1, *about]
    assert all(list(row.values())[:6] == about and row["diverged"] == 0 for row in rows)
    points, (first, last) = scalars(folder, "charts/episodic_return"), [x["step"] for x in rows]
    expected = [value for step, value in points if first < step <= last]
    mean = float(rows[-1]["charts/episodic_return"])
    assert len(expected) > 1 and mean == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_run_that_diverged_says_so_and_ends_with_a_row_where_it_stopped(
    known, tmp_path, monkeypatch, capsys, value
):
    bad, log = {"losses/policy": torch.tensor(float(value))}, reinforce_bn.Run.log
    monkeypatch.setattr(reinforce_bn.Run, "log", lambda run, scalars: log(run, scalars | bad))
    (row,) = collect.rows(known["tiny-none"].runs()[0], make(tmp_path / "run"), "abc")
    assert row["diverged"] == 1 and 0 < row["step"] < 1500 and "eval/return" not in row
    said = f"diverged at step {row['step']}: losses/policy is {value}"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("end", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=SLOW)])
def test_a_script_that_is_stopped_or_killed_is_resumed(gated, tmp_path, end):
    steps = []

    def report(step):
        if step and not any(steps):
            os.kill(gate_pid(tmp_path), end)
        steps.append(step)

    with open(tmp_path / "log", "a+") as log:
        study.run.finish(gated["tiny-none"].runs()[0], tmp_path / "run", tmp_path, log, report)
    assert steps[0] == 0 and None in steps and len(list(tmp_path.glob("run/events*"))) == 2


def descendants(pid):
    """Return the ids of a process, and of all that it started, directly or not."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs, found = [tuple(map(int, line.split())) for line in lines.splitlines()], [pid]
    for parent in found:
        found += [child for child, of in pairs if of == parent]
    return found


@SLOW
def test_all_runs_are_made_though_a_machine_goes_away_and_the_driver_is_stopped(gated, tmp_path):
    ray = pytest.importorskip("ray.cluster_utils")
    cluster = ray.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    args = f"--file {tmp_path}/claims.toml --results {tmp_path}/out --runs {tmp_path}/runs"
    args += f" --address {cluster.address} tiny-none tiny-fixed"
    command = [sys.executable, "-m", "study.run", *args.split()]
    try:
        raylet = cluster.add_node(num_cpus=1).all_processes["raylet"][0].process.pid
        # as a shell's job in the background, which ignores Ctrl-C
        driver = subprocess.Popen(["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command])
        gate_pid(tmp_path)
        for pid in descendants(raylet):  # all at once, as if somebody had pulled the plug
            os.kill(pid, signal.SIGKILL)
        (tmp_path / "reached").unlink()  # the next script that has so far to go waits, too
        cluster.add_node(num_cpus=1)
        gate_pid(tmp_path)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait() == 1
        subprocess.run(command, check=True)
    finally:
        cluster.shutdown()
    made = {file.parent.name for file in (tmp_path / "out").glob("*/Gate-v0-seed1.csv")}
    assert made == {"tiny-none", "tiny-filter", "tiny-fixed"}
    assert len(list((tmp_path / "runs").glob("*/*/events*"))) == 5  # two were resumed
