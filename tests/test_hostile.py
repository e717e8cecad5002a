"""Environments as users write them: each trains, or ends with words about it."""

import importlib
import json
import random
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, Picture, checkpoint, same
from gymnasium import spaces

import reinforce_bn

NAN, BOX = float("nan"), spaces.Box(-9, 9, (2,), np.float32)
ROOMS = []  # that were made since a test began


class Room(gym.Env):
    """Seven steps that pay 1 each and observe noise; `about` says what is odd, and when."""

    def __init__(self, **about):
        self.about, self.life, self.closed, self.array = about, 0, False, np.zeros(3, np.float32)
        self.observation_space = about.get("observes", spaces.Box(-9, 9, (3,), np.float32))
        self.action_space = about.get("acts", spaces.Box(-1, 1, (2,), np.float32))
        self.place = np.random.normal() if "draws" in about else 0
        ROOMS.append(self)

    def close(self):
        self.closed = True

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None and "generator" in self.about:
            self.np_random = self.about["generator"](seed % 2**32)
        if seed is not None and "seeds" in self.about:
            random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)
        self.t, self.in_evaluation = 0, self.np_random_seed == 1_000_000
        return self.observe(), {}

    def odd(self, name, usual=None):
        is_now = self.life >= self.about.get("since", 50) and self.about.get("when", bool)(self)
        return self.about.get(name, usual) if is_now else usual

    def observe(self):
        if "observes" in self.about:
            self.observation_space.seed(int(self.np_random.integers(99)))
            return self.observation_space.sample()
        self.array[:] = self.np_random.normal(size=3)
        if "draws" in self.about:
            self.array[:] = self.place, np.random.normal(), random.random()
        if "seeds" in self.about:
            self.array[:] = random.random(), np.random.normal(), torch.rand(())
        self.array[2] = self.odd("obs", self.array[2])
        return self.array if "reuses" in self.about else self.array.copy()

    def step(self, action):
        assert self.action_space.contains(action), action
        self.action, self.t, self.life = action, self.t + 1, self.life + 1
        info, done = self.about.get("info", dict)(), self.t >= 7 and "endless" not in self.about
        end = self.about.get("ends", bool)
        return self.observe(), self.odd("reward", 1.0), end(done), end(False), info


@pytest.fixture
def play(small):
    """Return a function that trains in a room about which something is odd: (result, Args)."""

    def train(script, about, **options):
        ROOMS.clear()
        gym.registry.pop("Room-v0", None)
        gym.register("Room-v0", lambda **more: Room(**about | more), disable_env_checker=True)
        module = importlib.import_module(script)
        args = small(module, **{"env": "Room-v0", "total_steps": 160} | options)
        return module.train(args), args

    return train


def ragged():
    """Return an info of all that an environment may have to say."""
    path = np.zeros(np.random.default_rng().integers(1, 5))
    return {"path": path, "none": None, "text": "x", "more": {"deep": [path]}, "episode": {"r": 1}}


GOES_ON = {
    "any info": {"info": ragged},
    "a dictionary": {"observes": spaces.Dict(place=BOX, goal=spaces.Discrete(3))},
    "a tuple": {"observes": spaces.Tuple([BOX, spaces.MultiBinary(2)])},
    "a number": {"observes": spaces.Discrete(5, start=2)},
    "a matrix of float64": {"observes": spaces.Box(-9, 9, (2, 3), np.float64)},
    "numbers end it": {"ends": int},
    "a matrix acts": {"acts": spaces.Box(-3, 1, (2, 3), np.float32)},
    "float64 acts": {"acts": spaces.Box(np.array([-0.1, 3.0]), np.array([9, 3.3]), dtype=float)},
}


@pytest.mark.parametrize("about", GOES_ON)
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_odd_but_usable_trains(script, about, play):
    result, args = play(script, GOES_ON[about], norm=("batchnorm", "zfilter"))
    assert not result["diverged"] and result["eval"] == [(result["steps"], 7.0, 0.0)]
    policy = importlib.import_module(script).load_policy(args.run_dir)
    room = gym.make("Room-v0")
    assert room.action_space.contains(policy(room.reset(seed=0)[0]))


def test_an_environment_may_write_into_the_array_it_gave_before(script, play):
    _, args = play(script.__name__, {"reuses": True})
    obs, _, _, next_obs, terminated = checkpoint(args.run_dir)["agent"]["buffer"]["data"]
    assert (obs != next_obs).any(1).all() and torch.equal(next_obs[:6], obs[1:7])
    assert terminated[:14].tolist() == [0, 0, 0, 0, 0, 0, 1] * 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_never_ends_is_cut(script, play, capsys):
    """After --max-episode-steps, or 10000 steps where the environment sets no limit."""
    assert play(script, {"endless": True}, max_episode_steps=20)[0]["eval"][-1][1] == 20
    assert "time limit" not in capsys.readouterr().out
    _, args = play(script, {}, norm="batchnorm", total_steps=1)
    assert ROOMS and all(room.closed for room in ROOMS)
    said = "Room-v0 sets no time limit: episodes end after 10000 steps"
    assert capsys.readouterr().out.count(said) == 1
    env = importlib.import_module(script).make_env(args)
    assert env.get_wrapper_attr("_max_episode_steps") == 10_000


GENERATORS = {
    "MT19937": {"generator": lambda seed: np.random.Generator(np.random.MT19937(seed))},
    "RandomState": {"generator": np.random.RandomState},  # whose state cannot be saved alike
    "global": {"draws": True},  # when a room is built, too
}


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_any_generator_trains_and_resumes(script, generator, play, capsys, monkeypatch):
    """To the bit if its state can be saved, else the run says so, once."""
    module, about = importlib.import_module(script), GENERATORS[generator]
    whole = play(script, about, save_every=50)[1].run_dir
    said, save = capsys.readouterr().out.count("cannot be saved"), module.Run.save

    def save_and_stop(self):
        save(self)
        if self.step:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Run, "save", save_and_stop)
    stopped = f"{whole}-stopped"
    with pytest.raises(KeyboardInterrupt):
        module.train(replace(module.saved_args(whole), resume="", run_dir=stopped))
    assert all(room.closed for room in ROOMS)
    monkeypatch.setattr(module.Run, "save", save)
    module.train(module.saved_args(stopped))
    is_same = same(*(checkpoint(run_dir)["agent"] for run_dir in (whole, stopped)))
    assert (said, is_same) == ((1, False) if generator == "RandomState" else (0, True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluation_leaves_global_generators_alone(script, play):
    """Even where the environment seeds them."""
    runs = [play(script, {"seeds": True}, eval_every=every)[1].run_dir for every in (0, 60)]
    ends = [[checkpoint(run_dir)[k] for k in ("agent", "random", "torch")] for run_dir in runs]
    assert same(*ends)


DIVERGES = {
    "NaN observed": {"obs": NAN},
    "infinity observed": {"obs": -np.inf},
    "NaN at the first reset": {"obs": NAN, "since": 0},
    "NaN at a reset": {"obs": NAN, "when": lambda room: room.t == 0},
    "NaN in evaluation": {"obs": NAN, "since": 0, "when": lambda room: room.in_evaluation},
    "reward NaN": {"reward": NAN},
    "reward infinite": {"reward": np.inf},
    "reward beyond float32": {"reward": 1e39},
}


@pytest.mark.parametrize("about", DIVERGES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_cannot_be_computed_with_ends_the_run_as_diverged(script, about, play, capsys):
    options = {"norm": "zfilter", "save_every": 20, "eval_every": 300, "total_steps": 900}
    result, args = play(script, DIVERGES[about], **options)
    assert result["diverged"] and result["steps"] < 500 and result["eval"] == []
    assert f"diverged at step {result['steps']}: " in capsys.readouterr().out
    assert json.loads(Path(args.run_dir, "result.json").read_text())["diverged"]
    assert all(room.closed for room in ROOMS)
    statistics = checkpoint(args.run_dir)["agent"]["obs_stat"]  # what was saved is sound
    assert np.isfinite([*statistics["mean"], *statistics["m2"]]).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_actions_reach_their_bounds_and_never_leave_them(script, play):
    rng, dim, module = np.random.default_rng(0), 2000, importlib.import_module(script)
    low = np.float32(rng.normal(size=dim) * 10.0 ** rng.integers(-9, 30, dim))
    high = low + np.float32(np.abs(low) * rng.exponential(size=dim) + 1e-20)
    play(script, {"acts": spaces.Box(low, high)}, total_steps=1)
    env = module.make_env(module.Args("Room-v0"))
    env.reset()
    for action in (rng.uniform(-1, 1, dim), np.ones(dim), -np.ones(dim), np.full(dim, -7.0)):
        env.step(np.float32(action))  # the room asserts that they are within, to the last bit
        middle, half = (np.float64(low) + high) / 2, (np.float64(high) - low) / 2
        expected = middle + action.clip(-1, 1) * half
        np.testing.assert_allclose(env.unwrapped.action, expected, rtol=1e-5)


class Half(Picture):
    """Action 5 names the upper half as lit, 6 the lower; bits, or bytes with channels first."""

    def __init__(self, first):
        self.first, self.action_space = first, spaces.Discrete(2, start=5)
        if first:
            self.observation_space = spaces.Box(0, 255, (2, 10, 10), np.uint8)

    def observe(self):
        image = super().observe()
        return np.moveaxis(255 * np.uint8(image), 2, 0) if self.first else image

    def step(self, action):
        return super().step(self.row if (action == 5) == (self.row < 5) else -1)


for first in (False, True):
    gym.register(f"Half{first}-v0", Half, max_episode_steps=10, kwargs={"first": first})


def test_images_of_either_layout_are_learnt_alike(small):
    """Chance gets 5 of 10."""
    found, options = [], {"network": "cnn", "hidden_sizes": (32,), "actor_lr": 3e-3}
    options |= {"total_steps": 1600, "critic_steps": 2, "num_envs": 16, "eval_episodes": 8}
    for first in (False, True):
        args = small(reinforce_bn, env=f"Half{first}-v0", **options)
        result = reinforce_bn.train(args)
        found.append((result["eval"], checkpoint(args.run_dir)["agent"]))
    assert same(*found) and found[0][0][-1][1] > 8


def test_discrete_actions_may_begin_anywhere(on_policy, small):
    env = on_policy.make_env(small(on_policy, env="HalfFalse-v0"))
    assert [env.get_wrapper_attr("action")(k) for k in (0, 1)] == [5, 6]


@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_that_are_not_finite_are_noticed_in_the_next_action(script, small, monkeypatch):
    """Discrete actions in PPO and REINFORCE, continuous ones in the others."""

    def broken(agent, *_):
        agent.actor.net[0].weight.data[0, 0] = NAN
        return {} if hasattr(agent, "buffer") else ({}, 1)

    module = importlib.import_module(script)
    monkeypatch.setattr(module, "update", broken)
    result = module.train(small(module))
    assert result["diverged"] and result["updates"] == 1 and result["eval"] == []
