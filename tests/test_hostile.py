"""Environments that give what no network can use, or little of it: a clear line, or a run."""

import contextlib
import importlib
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import all_scalars, checkpoint

SCRIPTS = ["reinforce_bn", "ppo_bn", "ddpg_bn", "sac_bn"]
NAN, INF = float("nan"), float("inf")
BOX = gym.spaces.Box
VECTOR = {"observation_space": BOX(-np.inf, np.inf, (3,), np.float64)}


class Hostile(gym.Env):
    """Dies after `length` steps; from step `since` of its life on, `odd` are in the observation.

    odd: {"obs" or "reward": value}; only_in: the seeds' range that it is hostile in.
    """

    def __init__(self, observation_space=None, action_space=None, length=7, since=150, **odd):
        self.observation_space = observation_space or VECTOR["observation_space"]
        self.action_space = action_space or BOX(np.float32([-1, -0.3]), np.float32([2, 0.7]))
        self.length, self.since, self.odd, self.life = length, since, odd, 0
        self.in_evaluation = False
        self.array = np.zeros(self.observation_space.shape, self.observation_space.dtype)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.in_evaluation = seed >= 1_000_000
        self.t = 0
        return self.observe(), {}

    def is_odd(self):
        where = self.odd.get("where", "everywhere")
        right_place = where != "evaluation" or self.in_evaluation
        return self.life >= self.since and right_place

    def observe(self):
        space = self.observation_space
        values = self.np_random.normal(0, 1, space.shape) * self.odd.get("scale", 1.0)
        values = values + self.odd.get("offset", 0.0)
        if space.dtype.kind in "iub":
            values = np.abs(values * 20)
        if "constant" in self.odd:
            values.flat[0] = self.odd["constant"]
        if "obs" in self.odd and self.is_odd():
            values.flat[-1] = self.odd["obs"]
        if "reuses" in self.odd:
            self.array[:] = values
            return self.array
        return values.astype(space.dtype)

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t, self.life = self.t + 1, self.life + 1
        reward = self.odd["reward"] if "reward" in self.odd and self.is_odd() else 1.0
        return self.observe(), reward, self.t >= self.length, False, {}


gym.register("Hostile-v0", Hostile, disable_env_checker=True)


@pytest.fixture
def hostile(small, monkeypatch):
    """Return a function that runs a script in a hostile environment: (result, Args)."""

    def run(module, about, **options):
        monkeypatch.setattr(gym, "make", lambda name: Hostile(**about))
        args = small(module, **{"env": "Hostile-v0", "total_steps": 260} | options)
        return module.train(args), args

    return run


def numbers(state):
    """Yield all numbers in a nested state."""
    if torch.is_tensor(state):
        yield from state.double().flatten().tolist()
    elif isinstance(state, dict):
        for value in state.values():
            yield from numbers(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from numbers(value)
    elif isinstance(state, float):
        yield state


def assert_nothing_is_nan(run_dir):
    """Whatever the run wrote, infinite running variances of huge observations aside."""
    assert not np.isnan(list(numbers(checkpoint(run_dir)))).any()
    for tag, points in all_scalars(run_dir).items():
        assert not np.isnan([value for _, value in points]).any(), tag
    with np.load(f"{run_dir}/obs_stats.npz") as stats:
        assert np.isfinite(stats["mean"]).all() and np.isfinite(stats["std"]).all()


GOES_ON = {
    "float64": {},
    "float16": {"observation_space": BOX(-9, 9, (3,), np.float16)},
    "int64": {"observation_space": BOX(-1000, 1000, (3,), np.int64)},
    "bytes": {"observation_space": BOX(0, 255, (3,), np.uint8)},
    "bits": {"observation_space": BOX(0, 1, (3,), bool)},
    "one feature": {"observation_space": BOX(-9, 9, (1,), np.float32)},
    "constant features": {"constant": 0.1},
    "large constant": {"constant": 1e6, "offset": 1e6},
    "episodes of one step": {"length": 1},
    "small bounds": {"action_space": BOX(np.float32([-0.1, 0.3]), np.float32([0.03, 0.7]))},
    "float64 bounds": {"action_space": BOX(np.array([-0.1, 3]), np.array([1e3, 3.3]), dtype=float)},
}


@pytest.mark.parametrize("norm", ["batchnorm", "zfilter"])
@pytest.mark.parametrize("about", GOES_ON.values(), ids=GOES_ON)
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_odd_but_usable_goes_on(script, about, norm, hostile):
    module = importlib.import_module(script)
    result, args = hostile(module, about, norm=norm)
    assert not result["diverged"] and np.isfinite(result["eval"]).all() and result["updates"] > 0
    assert_nothing_is_nan(args.run_dir)


def test_an_environment_may_write_into_the_array_it_gave_before(script, hostile):
    about = {"reuses": True, "observation_space": BOX(-9, 9, (3,), np.float32)}
    _, args = hostile(script, about)
    obs, _, _, next_obs, _ = checkpoint(args.run_dir)["buffer"]["data"]
    assert (obs != next_obs).any(1).all()


@pytest.mark.parametrize("norm", ["batchnorm", "batchrenorm", "layernorm", "zfilter"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_huge_observations_go_on_or_diverge(script, norm, hostile):
    module = importlib.import_module(script)
    options = {"norm_position": ("input",)} if "norm" in norm else {}
    result, args = hostile(module, {"scale": 1e15}, norm=norm, **options)
    kept = json.loads(Path(args.run_dir, "result.json").read_text())
    assert kept["diverged"] == result["diverged"]
    if not result["diverged"]:
        assert_nothing_is_nan(args.run_dir)


def test_reinforce_learns_from_a_single_sample(hostile):
    module = importlib.import_module("reinforce_bn")
    result, args = hostile(module, {"length": 1}, num_envs=1, total_steps=20)
    assert result["updates"] == 20 * 21 and not result["diverged"]
    assert_nothing_is_nan(args.run_dir)


@pytest.mark.parametrize("script", ["reinforce_bn", "ppo_bn"])
def test_rewards_of_any_size_can_be_scaled(script, hostile):
    module = importlib.import_module(script)
    result, args = hostile(module, {"reward": 1e30, "since": 0}, reward_norm=True)
    assert not result["diverged"] and result["eval"][-1][1] == pytest.approx(7e30)
    assert_nothing_is_nan(args.run_dir)


DIVERGES = {
    "NaN": {"obs": NAN},
    "infinity": {"obs": INF},
    "minus infinity": {"obs": -INF},
    "beyond float32": {"obs": 1e300},
    "beyond its square": {"obs": -1e18},
    "NaN at the first reset": {"obs": NAN, "since": 0},
    "reward NaN": {"reward": NAN},
    "reward infinite": {"reward": -INF},
    "reward beyond float32": {"reward": 1e39},
    "reward 1e30": {"reward": 1e30},
    "NaN where no update is yet": {"obs": NAN, "since": 5},
    "reward NaN where no update is yet": {"reward": NAN, "since": 5},
}


@pytest.mark.parametrize("about", DIVERGES.values(), ids=DIVERGES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_cannot_be_computed_with_ends_the_run(script, about, hostile, capsys):
    module = importlib.import_module(script)
    norm, off_policy = "zfilter" if "obs" in about else "none", script in ("ddpg_bn", "sac_bn")
    since = about.get("since", 150 if off_policy else 40)  # of each of four environments
    result, args = hostile(module, about | {"since": since}, norm=norm, save_every=20)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "diverged" in x]
    assert line.startswith(f"diverged at step {result['steps']}: ")
    assert result["diverged"] and result["steps"] < 260 + 128 and result["eval"] == []
    assert json.loads(Path(args.run_dir, "result.json").read_text())["diverged"]
    if off_policy and about.get("reward") != 1e30:
        assert result["steps"] == max(since, 1)
    assert_nothing_is_nan(args.run_dir)  # what was saved before is sound


@pytest.mark.parametrize("about", [{"obs": NAN}, {"obs": INF}, {"reward": NAN}], ids=str)
@pytest.mark.parametrize("eval_every", [0, 130])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_evaluation_does_not_pass_over_nan(script, eval_every, about, hostile, capsys):
    module = importlib.import_module(script)
    about = about | {"since": 2, "where": "evaluation"}
    result, args = hostile(module, about, eval_every=eval_every, save_every=20)
    assert result["diverged"] and "diverged" in capsys.readouterr().err
    assert json.loads(Path(args.run_dir, "result.json").read_text())["diverged"]
    assert (result["steps"] >= 260) == (not eval_every)
    assert not np.isnan(list(numbers(checkpoint(args.run_dir)))).any()


@pytest.mark.parametrize("net", ["actor", "critic"])
@pytest.mark.parametrize("script", ["ddpg_bn", "sac_bn"])
def test_weights_that_become_nan_in_the_last_step_do_not_pass(script, net, hostile, monkeypatch):
    module = importlib.import_module(script)
    update, count = module.update, [0]

    def broken(agent, *rest):
        losses = update(agent, *rest)
        count[0] += 1
        if count[0] == 160:
            with torch.no_grad():
                next(getattr(agent, net).parameters()).fill_(NAN)
        return losses

    monkeypatch.setattr(module, "update", broken)
    for steps in (260, 300):  # the last step, or one before the last
        count[0] = 0
        result, _ = hostile(module, {}, total_steps=steps)
        assert result["diverged"] and 260 <= result["steps"] <= 261


def test_the_exit_code_of_a_diverged_run_is_3(tmp_path, monkeypatch):
    from test_mistakes import play

    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:
        words = ["--env", "conftest:HugeReward-v0", "--total-steps", "300", "--eval-episodes", "1"]
        words += ["--learning-starts", "50"] if script in ("ddpg_bn", "sac_bn") else []
        code, _, err = play(script, words)
        assert code == 3 and "diverged at step" in err.strip().splitlines()[-1]


BAD_ACTIONS = {
    "unbounded": BOX(-np.inf, np.inf, (2,)),
    "bounded below": BOX(np.float32([0]), np.float32([np.inf])),
    "without width": BOX(np.float32([1, 0]), np.float32([1, 2])),
    "too wide": BOX(np.float32([-3e38]), np.float32([3e38])),
    "integers": BOX(0, 5, (2,), np.int64),
    "a matrix": BOX(-1, 1, (2, 2)),
    "a number": BOX(-1, 1, ()),
    "several": gym.spaces.MultiDiscrete([2, 3]),
    "bits": gym.spaces.MultiBinary(3),
    "from 1": gym.spaces.Discrete(3, start=1),
    "named": gym.spaces.Dict({"a": BOX(-1, 1, (2,))}),
}
BAD_OBSERVATIONS = {
    "a number of things": gym.spaces.Discrete(5),
    "named": gym.spaces.Dict({"a": BOX(-1, 1, (2,))}),
    "a pair": gym.spaces.Tuple([BOX(-1, 1, (2,)), BOX(-1, 1, (2,))]),
    "text": gym.spaces.Text(5),
    "a sequence": gym.spaces.Sequence(BOX(-1, 1, (2,))),
}


def refused(module, about, capsys, small, **options):
    args = small(module, env="Hostile-v0", **options)
    with contextlib.suppress(AttributeError), pytest.raises(SystemExit) as end:
        module.train(args)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and "--env Hostile-v0" in line and not Path(args.run_dir).exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_actions_and_observations_of_no_use_are_refused(script, small, capsys, monkeypatch):
    module = importlib.import_module(script)
    abouts = [{"action_space": space} for space in BAD_ACTIONS.values()]
    abouts += [{"observation_space": space} for space in BAD_OBSERVATIONS.values()]
    if script in ("ddpg_bn", "sac_bn"):
        abouts += [{"action_space": gym.spaces.Discrete(3)}]
        abouts += [{"observation_space": BOX(-1, 1, shape)} for shape in ((), (2, 3), (5, 5, 1))]
    for about in abouts:
        monkeypatch.setattr(gym, "make", lambda name, about=about: Hostile(**about))
        refused(module, about, capsys, small)
    if script in ("reinforce_bn", "ppo_bn"):
        for shape in ((3,), (5, 5), (2, 5, 1), (5, 2, 1), (5, 5, 1, 1)):
            about = {"observation_space": BOX(-1, 1, shape)}
            monkeypatch.setattr(gym, "make", lambda name, about=about: Hostile(**about))
            refused(module, about, capsys, small, network="cnn")

    def breaks(name):
        raise TypeError("needs\nwheels")

    monkeypatch.setattr(gym, "make", breaks)
    refused(module, {}, capsys, small)


@pytest.mark.parametrize("script", ["reinforce_bn", "ppo_bn"])
@pytest.mark.parametrize("shape", [(), (2, 3), (3, 3, 1), (2, 2, 2, 2)])
def test_shapes_that_are_flattened(script, shape, hostile):
    module = importlib.import_module(script)
    result, args = hostile(module, {"observation_space": BOX(-9, 9, shape)})
    assert not result["diverged"]
    weight = checkpoint(args.run_dir)["actor"]["net.0.weight"]
    assert weight.shape[1] == int(np.prod(shape))
