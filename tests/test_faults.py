"""Kills, a full disk, many runs at once: nothing is lost, and what is resumed is the same run."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import all_scalars, checkpoint, same, unmeasured

ROOT = Path(__file__).parent.parent
SCRIPTS = ["reinforce_bn", "ppo_bn", "ddpg_bn", "sac_bn"]
KILLS = int(os.environ.get("KILLS", 12))  # of each of the long tests; there are two to a script
PHASES = "starting", "acting", "learning", "evaluating", "saving"

context = multiprocessing.get_context("forkserver")  # torch is imported once for all children,
context.set_forkserver_preload(["test_faults", *SCRIPTS, "torch._dynamo"])  # and what Adam needs


def options(script, norm):
    """Return options of a run that takes a second or two and does everything several times."""
    common = {"eval_every": 150, "eval_episodes": 1, "hidden_sizes": (16, 16), "norm": norm}
    common["device"] = "cpu"
    common |= {"bn_warmup": 60, "norm_position": ("post",)} if norm == "batchrenorm" else {}
    if script in ("ddpg_bn", "sac_bn"):
        rest = {"learning_starts": 100, "batch_size": 32, "buffer_size": 400, "total_steps": 460}
        return common | rest | {"env": "conftest:ShortPendulum-v0", "save_every": 30}
    common |= {"num_envs": 4, "total_steps": 2000, "save_every": 200}
    common |= {"bn_recalibrate": 3} if norm == "batchrenorm" else {"reward_norm": True}
    if script == "reinforce_bn":
        return common | {"env": "CartPole-v1", "critic_steps": 5}
    rest = {"num_steps": 25, "minibatches": 4, "epochs": 3, "env": "conftest:ShortPendulum-v0"}
    return common | rest


def live(script, options, run_dir, phase):
    """In a child: begin the run or go on with it, and say in phase what it is doing."""
    torch.set_num_threads(1)
    module = importlib.import_module(script)
    write = module.write

    def during(name, function):
        def wrapped(*inputs):
            before, phase.value = phase.value, PHASES.index(name)
            try:
                return function(*inputs)
            finally:
                phase.value = before

        return wrapped

    def write_slowly(path, save):
        def in_halves(file):
            whole = io.BytesIO()
            save(whole)
            whole = whole.getvalue()
            file.write(whole[: len(whole) // 2])
            file.flush()
            time.sleep(0.01)  # long enough to be killed within
            file.write(whole[len(whole) // 2 :])

        write(path, in_halves)

    module.explore = during("acting", module.explore)
    module.update = during("learning", module.update)
    module.evaluate = during("evaluating", module.evaluate)
    module.write = during("saving", write_slowly)
    module.LOG_EVERY = 50
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        if (run_dir / "checkpoint.pt").exists():
            module.train(module.saved_args(run_dir))
        else:
            module.train(module.Args(**options, run_dir=str(run_dir)))


def finish(script, options, run_dir, kills=0, rng=None):
    """Run to the end in spite of so many kills; return the phases that they came in."""
    found, phase = [], context.Value("i", 0, lock=False)
    while not (run_dir / "result.json").exists():
        if not (run_dir / "checkpoint.pt").exists():  # killed before it said "run: ..."
            shutil.rmtree(run_dir, ignore_errors=True)
        phase.value, begun = 0, time.time()
        process = context.Process(target=live, args=(script, options, run_dir, phase))
        process.start()
        if len(found) < kills:
            while process.is_alive() and phase.value == 0:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.5))
            wanted, deadline = rng.randrange(2 * len(PHASES)), time.time() + 2.0
            while process.is_alive() and phase.value != wanted < len(PHASES):
                if time.time() > deadline:
                    break
            process.kill()
            process.join()
            if process.exitcode == -9 and not (run_dir / "result.json").exists():
                found.append(PHASES[phase.value])
        process.join()
        assert process.exitcode in ((0, -9) if kills else (0,))
        time.sleep(
            max(0.0, 1.05 - (time.time() - begun))
        )  # events sort by the second of their name
    return found


def learnt(run_dir):
    """Return everything that two equal runs have in common."""
    result = json.loads((run_dir / "result.json").read_text())
    result.pop("run_dir")
    with np.load(run_dir / "obs_stats.npz") as stats:
        stats = {key: torch.tensor(stats[key]) for key in ("count", "mean", "m2")}
    scalars = all_scalars(run_dir)
    scalars.pop("charts/SPS", None)
    for tag, points in scalars.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), f"{tag} has a point twice"
    return checkpoint(run_dir), result, stats, scalars


def compare_with_never_killed(script, norm, kills, folder, seed=None):
    seed = random.randrange(10**6) if seed is None else seed
    rng, chosen, count = random.Random(seed), options(script, norm), Counter()
    finish(script, chosen, folder / "whole")
    whole, runs = learnt(folder / "whole"), 0
    while count.total() < kills:
        run_dir = folder / f"killed{runs}"
        count += Counter(finish(script, chosen, run_dir, min(kills - count.total(), 6), rng))
        runs += 1
        names = ("checkpoint", "result", "statistics", "scalars")
        for name, a, b in zip(names, whole, learnt(run_dir), strict=True):
            assert same(a, b), f"{name} of a run killed with seed {seed} differ: {run_dir}"
        assert not list(run_dir.glob("*.tmp"))
        shutil.rmtree(run_dir)
    print(f"{script} {norm}: {count.total()} kills in {runs} runs, seed {seed}: {dict(count)}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_anywhere_and_resumed_equals_never_killed(script, tmp_path):
    norm = "batchrenorm" if script in ("reinforce_bn", "ddpg_bn") else "zfilter"
    compare_with_never_killed(script, norm, 3, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batchrenorm", "zfilter"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_many_times_equals_never_killed(script, norm, tmp_path):
    """KILLS=1000 python -m pytest -m slow -s -k many_times: for as long as one likes."""
    compare_with_never_killed(script, norm, KILLS, tmp_path)


class Killed(BaseException):
    """Ends a run at once, in this process, as nothing in a script expects it."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_goes_on_from_each_of_its_checkpoints(script, tmp_path, monkeypatch):
    module, chosen = importlib.import_module(script), options(script, "zfilter")
    monkeypatch.setattr(module, "LOG_EVERY", 50, raising=False)
    module.train(module.Args(**chosen, run_dir=str(tmp_path / "whole")))
    whole, save_run = learnt(tmp_path / "whole"), module.save_run
    for number in (1, 2, 8):
        run_dir, saved = tmp_path / f"killed{number}", []

        def save_and_die(*inputs, number=number, saved=saved):
            save_run(*inputs)
            saved.append(inputs)
            if len(saved) == number:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, "save_run", save_and_die)
            module.train(module.Args(**chosen, run_dir=str(run_dir)))
        time.sleep(1.05)  # names of events hold seconds
        module.train(module.saved_args(run_dir))
        assert same(whole, learnt(run_dir)), number


@pytest.mark.parametrize("script", SCRIPTS)
def test_events_reach_the_disk_before_the_checkpoint(script, small, monkeypatch):
    """Those in the queue of the writer would be lost in a kill, and never written again."""
    module = importlib.import_module(script)
    args = small(module, save_every=100)
    flushed, save_run = [], module.save_run

    class Spy(module.SummaryWriter):
        def flush(self):
            flushed.append(Path(args.run_dir, "checkpoint.pt.tmp").exists())
            super().flush()

    def save(*inputs):
        before = len(flushed)
        save_run(*inputs)
        assert flushed[before:] == [True]

    monkeypatch.setattr(module, "SummaryWriter", Spy)
    monkeypatch.setattr(module, "save_run", save)
    module.train(args)
    assert len(flushed) >= 3


class Late(list):
    """A list of signals that is empty until it is looked at for the n-th time."""

    def __init__(self, n):
        self.looks = n

    def __bool__(self):
        self.looks -= 1
        return self.looks <= 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_is_stopped_is_saved_whenever_the_signal_comes(script, tmp_path, capsys):
    module = importlib.import_module(script)
    chosen = options(script, "zfilter") | {"save_every": 10**6}
    for n in (1, 2, 3):
        run_dir = tmp_path / str(n)
        steps = module.train(module.Args(**chosen, run_dir=str(run_dir)), Late(n))["steps"]
        assert f"stopped at step {steps}:" in capsys.readouterr().out
        assert checkpoint(run_dir)["progress"][0] == steps


# ---------------------------------------------------------------------------- A disk that fills up


@pytest.mark.parametrize("script", ["ppo_bn", "ddpg_bn"])  # what writes is the same in all four
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(script, tmp_path):
    """No file may grow beyond 8 kB, which a checkpoint does: its write ends in the middle."""
    module, chosen = importlib.import_module(script), options(script, "zfilter")
    module.train(module.Args(**chosen, run_dir=str(tmp_path / "run")))
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    steps = chosen["total_steps"] + 200
    command = (
        f"ulimit -f 8; exec {sys.executable} {ROOT}/{script}.py --resume run --total-steps {steps}"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=unmeasured(PYTHONPATH=f"{ROOT}/tests"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("run/checkpoint.pt is not written, what stood there stands: ")
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("run/*.tmp"))
    module.train(replace(module.saved_args(tmp_path / "run"), total_steps=steps))  # room again
    assert (tmp_path / "run/checkpoint.pt").read_bytes() != before


# ------------------------------------------------------------------------------------ Side by side


@pytest.mark.parametrize("script", SCRIPTS)
def test_fifty_runs_of_one_second_get_fifty_folders(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    module, made, start = importlib.import_module(script), [], threading.Barrier(50)

    def make():
        start.wait()
        made.append(module.make_run_dir(module.Args()))

    threads = [threading.Thread(target=make) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 50 and all(folder.is_dir() for folder in made)


def start_together(script, options, folder, start):
    """In a child: run when all are ready, all with the clock at one second."""
    os.chdir(folder)
    torch.set_num_threads(1)
    time.strftime = lambda form: "20260101-000000"
    start.wait()
    module = importlib.import_module(script)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        module.train(module.Args(**options))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_fifty_runs_of_one_second_do_not_touch_each_other(script, tmp_path):
    chosen = options(script, "zfilter") | {"total_steps": 200}
    start = context.Barrier(50)
    inputs = script, chosen, tmp_path, start
    processes = [context.Process(target=start_together, args=inputs) for _ in range(50)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 50
    runs = sorted((tmp_path / "runs" / chosen["env"] / script).iterdir())
    first, files = learnt(runs[0]), 5
    assert len(runs) == 50
    for run_dir in runs:
        assert len(list(run_dir.iterdir())) == files and same(first, learnt(run_dir))
        assert json.loads((run_dir / "result.json").read_text())["run_dir"] == str(
            run_dir.relative_to(tmp_path)
        )
