"""What the tests share: small runs, and a toy environment whose every number is known."""

import importlib
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
SCRIPTS = ["reinforce_bn", "ppo_bn", "ddpg_bn", "sac_bn"]
torch.set_num_threads(1)  # the networks are tiny, and bits must not depend on the machine


class Countdown(gym.Env):
    """Observes (t, episode, 0.7), pays 1 + t, and every second episode (or k-th) dies at t = 5."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(np.float32([-1.0]), np.float32([3.0]))
    episode = 0

    def __init__(self, every=2):
        self.every = every

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return self.observe(), {}

    def observe(self):
        return np.array([self.t, self.episode, 0.7], np.float64)

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        dies = self.t == 5 and self.episode % self.every == 0
        return self.observe(), 1.0 + self.t, dies, False, {}


class Ragged(Countdown):
    """Episode k lasts as many steps as the environment was the k-th to be made, at most 8."""

    made = 0

    def __init__(self):
        super().__init__()
        self.length = 2 + Ragged.made % 4
        Ragged.made += 1

    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        return obs, reward, self.t == self.length, False, info


class Picture(gym.Env):
    """Observes an image of 10 x 10 x 2 bits; the action that names the lit row pays 1."""

    observation_space = gym.spaces.Box(0, 1, (10, 10, 2), bool)
    action_space = gym.spaces.Discrete(10)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def observe(self):
        self.row = int(self.np_random.integers(10))
        image = np.zeros((10, 10, 2), bool)
        image[self.row, :, 1] = True
        return image

    def step(self, action):
        reward = float(action == self.row)
        return self.observe(), reward, False, False, {}


gym.register("Countdown-v0", Countdown, max_episode_steps=8)
gym.register("RareDeath-v0", Countdown, max_episode_steps=8, kwargs={"every": 4})
gym.register("LastBreath-v0", Countdown, max_episode_steps=5, kwargs={"every": 1})
gym.register("Ragged-v0", Ragged, max_episode_steps=8)
gym.register("Picture-v0", Picture, max_episode_steps=10)
PENDULUM = "gymnasium.envs.classic_control.pendulum:PendulumEnv"
gym.register("ShortPendulum-v0", PENDULUM, max_episode_steps=40)


@pytest.fixture
def small(tmp_path):
    """Return a function that makes the Args of a run which takes seconds."""
    runs = iter(range(1000))

    def make(script, **options):
        tiny = {"env": "Pendulum-v1", "total_steps": 400, "hidden_sizes": (16, 16)}
        tiny |= {"device": "cpu", "eval_every": 0, "eval_episodes": 1}
        tiny |= {"run_dir": str(tmp_path / f"run{next(runs)}")}
        if script.__name__ in ("ddpg_bn", "sac_bn"):
            tiny |= {"learning_starts": 100, "batch_size": 32, "buffer_size": 1000}
        else:
            tiny |= {"env": "CartPole-v1", "num_envs": 4}
        if script.__name__ == "ppo_bn":
            tiny |= {"num_steps": 32, "minibatches": 4, "epochs": 2}
        return script.Args(**tiny | options)

    return make


def same(a, b):
    """Whether two nested states are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(params=["ddpg_bn", "sac_bn"])
def script(request):
    """Each script that learns from a replay buffer, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(params=["reinforce_bn", "ppo_bn"])
def on_policy(request):
    """Each script that learns from what its policy has just met, as a module."""
    return importlib.import_module(request.param)


def all_scalars(run_dir):
    """Return {tag: [(step, value), ...]} as TensorBoard shows them."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    found = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in found}


def scalars(run_dir, tag):
    return all_scalars(run_dir)[tag]


def unmeasured(**more):
    """Return an environment for a program that coverage would disturb, or be disturbed by."""
    return {k: v for k, v in os.environ.items() if "COV" not in k} | {"OMP_NUM_THREADS": "1"} | more


def checkpoint(run_dir):
    return torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True)
