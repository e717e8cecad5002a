"""Time the scripts at equal work, side by side in one process: python -m study.bench

Off-policy: 256 x 256, batch 256, one update a step. PPO: 64 x 64, 16 environments of 128 steps,
10 epochs of 32 minibatches. REINFORCE is left out, since the work of its update is that of the
episodes. Each cell is a short run of a script's own train(), timed between updates, so acting,
environment, replay and learning are in it, start and evaluation are not, and logging is in PPO's
only (off-policy it comes every thousand steps). Cells alternate and repeat, and study/speed keeps
each repetition. On Linux the process keeps to one core, as the scripts keep to one thread, which
JAX would not do by itself.

The floor is the time of the environment's steps and of the bare matrix products of the updates, of
the same shapes, one after the other in the same process.

Stable-Baselines3 (of study/requirements.txt) and SBX (pip install sbx-rl==0.28.0) are timed too, if
they are installed.
"""

import contextlib
import csv
import importlib
import importlib.metadata
import io
import itertools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro

from study.collect import processor, write
from study.run import version

NORMS = "none", "batchnorm", "batchrenorm", "layernorm", "zfilter"
LIBRARIES = "stable_baselines3", "sbx"
PACKAGES = "torch", "gymnasium", "mujoco", "numpy", "stable-baselines3", "sbx-rl", "jax"
SPEED = Path(__file__).parent / "speed"  # what was measured
A_ROLLOUT = 16 * 128  # PPO's steps between two updates
GRADIENT_STEPS = 10 * 32  # PPO's in an update


@dataclass
class Args:
    # see the functions of these names
    what: tuple[Literal["speed", "shares", "growth", "pair"], ...] = ("speed",)
    env: tuple[str, ...] = ("HalfCheetah-v4", "Ant-v4")  # Gymnasium ids
    script: tuple[Literal["ddpg_bn", "sac_bn", "ppo_bn"], ...] = ("ddpg_bn", "sac_bn", "ppo_bn")
    repeat: int = 5  # repetitions of each cell
    updates: int = 300  # updates in a repetition; PPO: three rollouts


@contextlib.contextmanager
def stopwatch(module, *names, clock=time.perf_counter):
    """Let functions of a module note their (start, end), in a dictionary that is yielded."""
    times, original = {name: [] for name in names}, {name: getattr(module, name) for name in names}

    def timed(name, *inputs, **options):
        start = clock()
        result = original[name](*inputs, **options)
        times[name].append((start, clock()))
        return result

    for name in names:
        setattr(module, name, lambda *x, name=name, **y: timed(name, *x, **y))
    try:
        yield times
    finally:
        for name in names:
            setattr(module, name, original[name])


def run(script, **options):
    """Run a script's train() in a folder that is thrown away, without its words."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        return script.train(script.Args(**options, device="cpu", run_dir=f"{folder}/run"))


def time_script(name, env, norm, updates):
    """Return (environment steps a second, milliseconds an update) of a short run."""
    script = importlib.import_module(name)
    options = {"env": env, "norm": norm, "eval_every": 0, "eval_episodes": 1}
    if name == "ppo_bn":
        options |= {"total_steps": 4 * A_ROLLOUT}
        warm, steps, gradient_steps = 1, A_ROLLOUT, GRADIENT_STEPS
    else:
        options |= {"total_steps": 320 + updates, "learning_starts": 300, "buffer_size": 10_000}
        warm, steps, gradient_steps = 20, 1, 1
    with stopwatch(script, "update") as times:
        run(script, **options)
    times = times["update"][warm:]
    wall = times[-1][0] - times[0][0]
    learning = sum(end - start for start, end in times) / len(times) / gradient_steps
    return (len(times) - 1) * steps / wall, learning * 1e3


def products(name, obs_dim, action_dim):
    """Return [(m, k, n), ...], the matrix products of an update (for PPO, of a minibatch)."""

    def net(batch, *sizes, learns=True, to_input=False):
        pairs = list(itertools.pairwise(sizes))
        forward = [(batch, i, o) for i, o in pairs]
        weights = [(i, batch, o) for i, o in pairs] if learns else []
        # gradients with respect to inputs: of all layers but the first, unless it is asked for
        inputs = [(batch, o, i) for i, o in pairs[0 if to_input else 1 :]]
        return forward + weights + (inputs if learns or to_input else [])

    hidden, batch = (256, 256), 256
    if name == "ppo_bn":
        hidden, batch = (64, 64), 64
        return net(batch, obs_dim, *hidden, action_dim) + net(batch, obs_dim, *hidden, 1)
    critics, outputs = (1, action_dim) if name == "ddpg_bn" else (2, 2 * action_dim)
    actor, critic = (obs_dim, *hidden, outputs), (obs_dim + action_dim, *hidden, 1)
    target = net(batch, *actor, learns=False) + critics * net(batch, *critic, learns=False)
    learn = critics * net(batch, *critic) + net(batch, *actor)
    return target + learn + critics * net(batch, *critic, learns=False, to_input=True)


def time_floor(name, env, updates):
    """Return (steps a second, milliseconds an update) of environment and bare products alone."""
    world = gym.make(env)
    world.reset(seed=0)
    world.action_space.seed(0)
    actions = [world.action_space.sample() for _ in range(updates)]
    start = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = world.step(action)
        if terminated or truncated:
            world.reset()
    a_step = (time.perf_counter() - start) / updates
    shapes = products(name, world.observation_space.shape[0], world.action_space.shape[0])
    pairs = [(torch.randn(m, k), torch.randn(k, n)) for m, k, n in shapes]
    repeats = updates if name != "ppo_bn" else 10 * updates
    start = time.perf_counter()
    for _ in range(repeats):
        for a, b in pairs:
            torch.mm(a, b)
    an_update = (time.perf_counter() - start) / repeats
    share = GRADIENT_STEPS / A_ROLLOUT if name == "ppo_bn" else 1
    return 1 / (a_step + share * an_update), an_update * 1e3


def time_library(library, name, env, updates):
    """Return (steps a second, nan) of another library at equal work; None if it is missing."""
    try:
        module = importlib.import_module(library)
    except ImportError:
        return None
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Clock(BaseCallback):
        times = ()

        def _on_step(self):
            self.times = [*self.times, time.perf_counter()]
            return True

    clock, device = Clock(), {} if library == "sbx" else {"device": "cpu"}
    if name == "ppo_bn":
        options = {"n_steps": 128, "batch_size": 64, "n_epochs": 10, "seed": 1}
        model = module.PPO("MlpPolicy", make_vec_env(env, 16), **options, **device)
        model.learn(4 * A_ROLLOUT, callback=clock)
        times = clock.times[128::128]  # a point a rollout, after the first
        return (len(times) - 1) * A_ROLLOUT / (times[-1] - times[0]), float("nan")
    options = {"batch_size": 256, "learning_starts": 300, "buffer_size": 10_000, "train_freq": 1}
    options |= {"gradient_steps": 1, "policy_kwargs": {"net_arch": [256, 256]}, "seed": 1}
    kind = module.DDPG if name == "ddpg_bn" else module.SAC
    model = kind("MlpPolicy", env, **options, **device)
    model.learn(320 + updates, callback=clock)
    times = clock.times[320:]
    return (len(times) - 1) / (times[-1] - times[0]), float("nan")


def installed(package):
    """Return the version of a package; none if it is missing."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def speed(args):
    """Measure steps a second and milliseconds an update of everything, and the floor; keep both."""
    cells = {}
    for env, name in itertools.product(args.env, args.script):
        cells[env, name, "floor"] = lambda n=name, e=env: time_floor(n, e, args.updates)
        for norm in NORMS:
            key = env, name, norm
            cells[key] = lambda n=name, e=env, x=norm: time_script(n, e, x, args.updates)
        for library in LIBRARIES:
            key = env, name, library
            cells[key] = lambda n=name, e=env, x=library: time_library(x, n, e, args.updates)
    about = {"date": time.strftime("%Y-%m-%d"), "commit": version(), "cpu": processor()}
    about |= {"versions": " ".join(f"{x}=={installed(x)}" for x in PACKAGES if installed(x))}
    rows = []
    for k in range(args.repeat):
        for key, measure in cells.items():
            words = f"\r{k + 1}/{args.repeat} {' '.join(key):60}"
            print(words, end="", file=sys.stderr, flush=True)
            result = measure()
            if result:
                what = dict(zip(("env", "script", "what"), key, strict=True))
                what["repetition"] = k + 1
                sps, ms = (f"{x:.5g}" for x in result)
                rows.append(about | what | {"steps_per_s": sps, "ms_per_update": ms})
    print(file=sys.stderr)
    for env in args.env:
        file = SPEED / f"{env}.csv"
        old = csv.DictReader(file.read_text().splitlines()) if file.exists() else []
        kept = [row for row in old if row["script"] not in args.script]
        write(file, kept + [row for row in rows if row["env"] == env], tuple(rows[0]))
    print(table(rows))


def table(rows):
    """Return the table of rows of study/speed: medians over repetitions (lowest to highest).

    Milliseconds are of --norm none, beside the floor's; then the time of a step with a normalizer
    as a multiple of none's, and the speed of none as a multiple of another library's.
    """
    found = {}
    for row in rows:
        place = found.setdefault((row["env"], row["script"]), {})
        numbers = float(row["steps_per_s"]), float(row["ms_per_update"])
        place.setdefault(row["what"], []).append(numbers)
    head = ["environment", "script", "steps a second", "ms an update", "of the floor"]
    head += [f"{norm} takes" for norm in NORMS[1:]] + ["against SB3", "against SBX"]
    lines = [head, ["---"] * len(head)]
    for (env, script), cells in found.items():
        sps, ms = ({what: np.array(x)[:, k] for what, x in cells.items()} for k in (0, 1))
        shown = [f"{x:.4g}" for x in (np.median(sps["none"]), np.median(ms["none"]))]
        ratios = [ms["none"] / ms["floor"]]  # repetition by repetition
        ratios += [sps["none"] / sps[x] if x in sps else [] for x in NORMS[1:] + LIBRARIES]
        for x in ratios:
            shown.append(f"{np.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" if len(x) else "")
        lines.append([env, f"`{script}.py`", *shown])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shares(args):
    """Print which part of a run, evaluated and logged by default, is neither acting nor learning.

    Each is evaluated once, after eval_every steps (the final evaluation does not count), and runs a
    little longer; the share is that of a run without end.
    """
    print("| script | `--norm` | evaluation | diagnostics of the panel |\n|---|---|---|---|")
    for name, norm in itertools.product(args.script, ("none", "batchnorm")):
        script = importlib.import_module(name)
        steps = script.Args.eval_every + 2 * A_ROLLOUT
        options = {"total_steps": steps} if name == "ppo_bn" else {"total_steps": steps + 300}
        options |= {} if name == "ppo_bn" else {"learning_starts": 300, "buffer_size": 20_000}
        names = ["update", "evaluate", "norm_scalars"][: 2 if name == "ppo_bn" else 3]
        with stopwatch(script, *names) as times:
            run(script, env=args.env[0], norm=norm, **options)
        seconds = {key: [end - start for start, end in x] for key, x in times.items()}
        timed = len(times["update"]) * (A_ROLLOUT if name == "ppo_bn" else 1)
        wall, playing = times["update"][-1][1] - times["update"][0][0], seconds["evaluate"][0]
        between = (wall - playing) * script.Args.eval_every / timed  # two evaluations
        panel = sum(seconds.get("norm_scalars", [])) / wall
        evaluation = playing / (between + playing)
        print(f"| `{name}.py` | {norm} | {evaluation:.1%} | {panel:.2%} |")


def growth(args):
    """Print how memory and time of DDPG grow with the transitions that the replay holds.

    Then how many steps it makes in a second of this process, quarter by quarter of 200 thousand,
    with networks so small that what grows would show; checkpoints included.
    """
    script = importlib.import_module("ddpg_bn")
    rng, times = np.random.default_rng(0), {}
    buffers = {n: script.ReplayBuffer(1_000_000, 17, 6) for n in (5_000, 200_000, 1_000_000)}
    for n, buffer in buffers.items():
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for array in buffer.data:
            array[:n] = 1
        buffer.added, times[n] = n, []
        size = sum(array[:n].nbytes for array in buffer.data) / 2**20
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 2**10
        print(f"{n} transitions: {size:.0f} MiB of numbers, the process grew by {grown:.0f} MiB")
    for _ in range(1000):
        for n, buffer in buffers.items():
            start = time.perf_counter()
            buffer.sample(rng, 256)
            times[n].append(time.perf_counter() - start)
    for n, values in times.items():
        print(f"{n} transitions: {statistics.median(values) * 1e6:.0f} us to sample a batch")
    options = {"env": args.env[0], "total_steps": 205_001, "eval_every": 0}
    options |= {"hidden_sizes": (16, 16)}
    with stopwatch(script, "update", clock=time.process_time) as times:
        run(script, **options)
    quarters = [times["update"][k][0] for k in range(0, 200_001, 50_000)]
    for k, (start, end) in enumerate(itertools.pairwise(quarters)):
        print(f"quarter {k + 1} of 200 thousand steps: {50_000 / (end - start):.0f} a second")


def a_process(args, queue):
    """Put the speed of a script, in a process of one thread on any core, into the queue."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count()))
    queue.put(time_script(args.script[0], args.env[0], "none", args.updates)[0])


def pair(args):
    """Print the speed of two runs at a time, added, as a multiple of that of one."""
    context = multiprocessing.get_context("spawn")
    for _ in range(args.repeat):
        sums = []
        for n in (1, 2):
            queue = context.Queue()
            processes = [context.Process(target=a_process, args=(args, queue)) for _ in range(n)]
            for process in processes:
                process.start()
            sums.append(sum(queue.get() for _ in processes))
        print(f"one {sums[0]:.0f} steps a second, two {sums[1]:.0f}: {sums[1] / sums[0]:.2f}")


if __name__ == "__main__":
    args = tyro.cli(Args)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as the scripts do
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    print(f"torch {torch.__version__}, {args.repeat} repetitions\n")
    for what in args.what:
        globals()[what](args)
