"""Time the scripts at equal work, side by side in one process: python -m study.bench

Off-policy: 256 x 256, batch 256, one update a step. PPO: 64 x 64, 16 environments of 128 steps,
10 epochs of 32 minibatches. REINFORCE is left out, since the work of its update is that of the
episodes. Each cell is a short run of a script's own train(), timed between updates, so acting,
environment, replay, learning and logging are in it, start and evaluation are not. Cells alternate
and repeat; the table gives medians with the lowest and highest repetition.

The floor is the time of the environment's steps and of the bare matrix products of the updates, of
the same shapes, one after the other in the same process.

With Stable-Baselines3 and SBX installed (pip install stable-baselines3 sbx-rl) they are timed too.
"""

import contextlib
import importlib
import io
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import torch
import tyro

NORMS = "none", "batchnorm", "batchrenorm", "layernorm", "zfilter"


@dataclass
class Args:
    env: tuple[str, ...] = ("HalfCheetah-v4", "Ant-v4")  # Gymnasium ids
    script: tuple[Literal["ddpg_bn", "sac_bn", "ppo_bn"], ...] = ("ddpg_bn", "sac_bn", "ppo_bn")
    norm: tuple[str, ...] = NORMS  # values of --norm
    repeat: int = 5  # repetitions of each cell
    updates: int = 300  # updates in a repetition; PPO: three rollouts
    threads: int = 1  # of torch


def time_script(name, env, norm, updates):
    """Return (environment steps a second, milliseconds an update) of a short run."""
    script = importlib.import_module(name)
    times, original = [], script.update

    def timed(*inputs):
        start = time.perf_counter()
        result = original(*inputs)
        times.append((start, time.perf_counter()))
        return result

    options = {"env": env, "norm": norm, "eval_every": 0, "eval_episodes": 1}
    if name == "ppo_bn":
        steps, a_step, an_update = 4 * 2048, 2048, 320
        options |= {"total_steps": steps}
    else:
        steps, a_step, an_update = 300 + updates + 20, 1, 1
        options |= {"total_steps": steps, "learning_starts": 300, "buffer_size": 10_000}
    script.update = timed
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            script.train(script.Args(**options, run_dir=f"{folder}/run"))
    finally:
        script.update = original
    times = times[1:] if name == "ppo_bn" else times[20:]  # the first ones warm up
    wall = times[-1][0] - times[0][0]
    learning = sum(end - start for start, end in times) / len(times) / an_update
    return (len(times) - 1) * a_step / wall, learning * 1e3


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
    share = 320 / 2048 if name == "ppo_bn" else 1
    return 1 / (a_step + share * an_update), an_update * 1e3


def time_library(library, name, env, updates):
    """Return (steps a second, nan) of another library at equal work; None if it is missing."""
    try:
        module = importlib.import_module(library)
    except ImportError:
        return None
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        times = ()

        def _on_step(self):
            self.times = [*self.times, time.perf_counter()]
            return True

    clock = Clock()
    if name == "ppo_bn":
        envs = gym.vector  # equal work: 16 environments in one process
        from stable_baselines3.common.env_util import make_vec_env

        envs = make_vec_env(env, 16)
        options = {"n_steps": 128, "batch_size": 64, "n_epochs": 10}
        model = module.PPO("MlpPolicy", envs, **options, device="cpu", seed=1)
        model.learn(4 * 2048, callback=clock)
        times = clock.times[128::128]  # a point a rollout, after the first
        return (len(times) - 1) * 2048 / (times[-1] - times[0]), float("nan")
    options = {"batch_size": 256, "learning_starts": 300, "buffer_size": 10_000, "train_freq": 1}
    options |= {"gradient_steps": 1, "policy_kwargs": {"net_arch": [256, 256]}, "seed": 1}
    kind = module.DDPG if name == "ddpg_bn" else module.SAC
    model = kind("MlpPolicy", env, **options, **({"device": "cpu"} if library != "sbx" else {}))
    model.learn(300 + updates + 20, callback=clock)
    times = clock.times[320:]
    return (len(times) - 1) / (times[-1] - times[0]), float("nan")


def main(args):
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    cells = {}
    for env in args.env:
        for name in args.script:
            cells[env, name, "floor"] = lambda n=name, e=env: time_floor(n, e, args.updates)
            for norm in args.norm:
                key = env, name, f"--norm {norm}"
                cells[key] = lambda n=name, e=env, x=norm: time_script(n, e, x, args.updates)
            for library in ("stable_baselines3", "sbx"):
                cells[env, name, library] = lambda n=name, e=env, x=library: time_library(
                    x, n, e, args.updates
                )
    found = {key: [] for key in cells}
    for k in range(args.repeat):
        for key, measure in cells.items():
            print(f"\r{k + 1}/{args.repeat} {' '.join(key):60}", end="", file=sys.stderr)
            result = measure()
            if result:
                found[key].append(result)
    print(file=sys.stderr)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.repeat} repetitions\n")
    print("| environment | script | | steps a second | ms an update |\n|---|---|---|---|---|")
    for (env, name, what), results in found.items():
        if results:
            sps, ms = zip(*results, strict=True)
            learning = f"{statistics.median(ms):.2f}" if ms[0] == ms[0] else ""
            speed = f"{statistics.median(sps):.0f} ({min(sps):.0f} to {max(sps):.0f})"
            print(f"| {env} | `{name}.py` | {what} | {speed} | {learning} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
