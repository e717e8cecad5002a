"""Kills and signals: nothing is lost, and what resumes is the same."""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, all_scalars, checkpoint, same, unmeasured

KILLS = int(os.environ.get("KILLS", 12))  # of each of the long tests
MANY = pytest.param(KILLS, marks=pytest.mark.slow, id="many_times")

context = multiprocessing.get_context("forkserver")  # torch is imported once for all children,
context.set_forkserver_preload(["test_faults", *SCRIPTS, "torch._dynamo"])  # and what Adam needs


class Endless(gym.Env):
    """Never ends where the folder holds a file "endless"; says by a file that it plays on."""

    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        if self.t == 50:
            Path("evaluating" if self.np_random_seed == 1_000_000 else "training").touch()
        ends = not Path("endless").exists() and self.t == 7
        return self.observation_space.sample(), 1.0, ends, False, {}


gym.register("Endless-v0", Endless, max_episode_steps=10**12)


def options(script, **more):
    """Return options of a run that takes a second or two and does everything several times."""
    common = {"eval_every": 150, "eval_episodes": 1, "hidden_sizes": (16, 16), "device": "cpu"}
    common |= {"norm": ("batchrenorm", "zfilter"), "bn_warmup": 60, "reward_norm": True}
    common |= {"env": "conftest:ShortPendulum-v0", "save_every": 30, "total_steps": 360}
    if script in ("ddpg_bn", "sac_bn"):
        return common | {"learning_starts": 100, "batch_size": 32, "buffer_size": 400} | more
    common |= {"num_envs": 4, "total_steps": 1200, "save_every": 200}
    if script == "reinforce_bn":
        return common | {"env": "CartPole-v1", "critic_steps": 5, "bn_recalibrate": 3} | more
    return common | {"num_steps": 25, "minibatches": 4, "epochs": 3} | more


def live(script, options, run_dir, count, kill_at):
    """In a child: begin the run or go on with it, and die at a moment of this number."""
    torch.set_num_threads(1)
    module = importlib.import_module(script)

    def moment():
        count.value += 1
        if count.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def add_moments(owner, name, function):
        def wrapped(*inputs, **options):
            moment()
            result = function(*inputs, **options)
            moment()
            return result

        setattr(owner, name, wrapped)

    def write(path, save, write=module.write):
        def in_halves(file):
            save(file)
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            moment()
            file.write_bytes(whole)

        write(path, in_halves)

    add_moments(module, "write", write)
    for name in ("act", "update", "evaluate"):
        add_moments(module, name, getattr(module, name))
    for name in ("log", "save", "load"):
        add_moments(module.Run, name, getattr(module.Run, name))
    begun = (run_dir / "checkpoint.pt").exists()
    new = module.Args(**options, run_dir=str(run_dir))
    module.train(module.saved_args(run_dir) if begun else new)


def finish(script, run_dir, kills=()):
    """Run to the end in spite of kills (moments or seconds); return the last life's moments."""
    for life in range(1000):
        if not (run_dir / "checkpoint.pt").exists():  # killed before it could save anything
            shutil.rmtree(run_dir, ignore_errors=True)
        kill, count = kills[life] if life < len(kills) else 0, context.Value("i", 0, lock=False)
        inputs = script, options(script), run_dir, count, kill
        process = context.Process(target=live, args=inputs)
        process.start()
        process.join(kill if isinstance(kill, float) else None)
        process.kill()
        process.join()
        assert process.exitcode in ((0, -9) if kill else (0,))
        for file in run_dir.glob("*tfevents*.*.*"):  # TensorBoard sorts by the second of the name
            file.rename(run_dir / f"tfevents{life:04}")
        if (run_dir / "result.json").exists():
            return count.value


def learnt(run_dir):
    """Return everything that two equal runs have in common."""
    result, state = json.loads((run_dir / "result.json").read_text()), checkpoint(run_dir)
    result.pop("run_dir"), state.pop("args")
    with np.load(run_dir / "obs_stats.npz") as stats:
        stats = {key: torch.tensor(stats[key]) for key in ("count", "mean", "m2")}
    # a run that is killed after its last save evaluates once more, to the same numbers
    scalars = {tag: list(dict.fromkeys(points)) for tag, points in all_scalars(run_dir).items()}
    for tag, points in scalars.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), f"{tag} has a point twice"
    assert len(scalars) >= 3
    return {"state": state, "result": result, "statistics": stats, "scalars": scalars}


@pytest.mark.parametrize("kills", [2, MANY])
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_anywhere_and_resumed_equals_never_killed(script, kills, tmp_path):
    """KILLS=1000 python -m pytest -m slow -k many_times: for as long as one likes."""
    rng = random.Random(None if kills > 4 else 1)
    begun = time.monotonic()
    moments, seconds = finish(script, tmp_path / "whole"), time.monotonic() - begun
    whole = learnt(tmp_path / "whole")
    for k in range(0, kills, 4):
        lives = [rng.choice((rng.randrange(1, moments), rng.uniform(0, seconds))) for _ in range(4)]
        lives = lives[: kills - k] if kills > 4 else [rng.randrange(1, moments // 2), moments // 2]
        finish(script, tmp_path / f"killed{k}", lives)
        for name, value in learnt(tmp_path / f"killed{k}").items():
            assert same(value, whole[name]), f"{name} differs after {lives} of {moments} moments"


# --------------------------------------------------------------------------------------- Signals
SIGNALS = [("ppo_bn", signal.SIGTERM, "evaluating"), ("sac_bn", signal.SIGINT, "training")]


@pytest.mark.parametrize("script, number, where", SIGNALS)
def test_a_signal_ends_an_endless_episode_and_the_run_resumes(
    script, number, where, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("endless").touch()
    steps = 64 if where == "evaluating" else 10**12
    words = f"--env test_faults:Endless-v0 --run-dir run --total-steps {steps} --device cpu"
    words += " --num-steps 8 --minibatches 4" if script == "ppo_bn" else ""
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py", *words.split()],
        env=unmeasured(PYTHONPATH=f"{ROOT}/tests"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not Path(where).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in err
    assert not Path("run/result.json").exists()
    assert err.strip().splitlines()[-1] == "stopped: --resume goes on from the last checkpoint"
    Path("endless").unlink()
    module = importlib.import_module(script)
    result = module.train(replace(module.saved_args("run"), total_steps=100))
    assert result["eval"][-1][1] == 7 and 100 <= result["steps"] < 300


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    path.touch()
    before = path.stat().st_ino
    importlib.import_module("ddpg_bn").write(path, Path.touch)
    assert path.stat().st_ino != before
