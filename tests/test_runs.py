"""Whole runs of the scripts that learn from a replay buffer: what they store, learn and leave."""

import importlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import checkpoint, same, tags

from zfilter import RunningStat


@pytest.mark.parametrize("norm", ["none", "zfilter"])
def test_training_stores_raw_transitions_and_bootstraps_through_time_outs(script, small, norm):
    args = small(script, env="Countdown-v0", norm=norm, total_steps=200)
    script.train(args)
    obs, action, reward, next_obs, terminated = checkpoint(args.run_dir)["buffer"]["data"]
    t, episode, t_next, episode_next = obs[:, 0], obs[:, 1], next_obs[:, 0], next_obs[:, 1]
    assert torch.equal(t_next, t + 1) and torch.equal(episode_next, episode)  # never the next reset
    assert torch.equal(reward, 1 + t_next)
    assert torch.equal(terminated == 1, (t_next == 5) & (episode % 2 == 0))
    timed_out = t_next == 8
    assert timed_out.sum() > 10 and terminated[timed_out].sum() == 0  # time-outs are no deaths
    space = gym.make("Countdown-v0").action_space
    space.seed(args.seed)
    drawn = np.array([space.sample() for _ in range(101)])
    np.testing.assert_array_equal(action[:100], drawn[:100])  # random until learning starts
    assert not np.array_equal(action[100], drawn[100])


# ------------------------------------------------------------------------- Filters in a run


class Recorder(gym.Wrapper):
    """Keeps every observation that training sees."""

    seen: list

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.seen.append(obs)
        return obs, info

    def step(self, action):
        result = self.env.step(action)
        self.seen.append(result[0])
        return result


@pytest.mark.parametrize("norm", ["none", "zfilter"])
def test_statistics_are_those_of_all_training_observations(script, small, norm, monkeypatch):
    recorders, make = [], gym.make

    def recording(name):
        recorders.append(Recorder(make(name)))
        recorders[-1].seen = []
        return recorders[-1]

    monkeypatch.setattr(gym, "make", recording)
    args = small(script, norm=norm, eval_every=100, total_steps=450)
    script.train(args)
    seen = np.array(recorders[0].seen[1:], np.float64)  # without the reset that only sets the seed
    with np.load(f"{args.run_dir}/obs_stats.npz") as stats:
        assert stats["count"] == len(seen) == 450 + 3
        np.testing.assert_allclose(stats["mean"], seen.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats["std"], seen.std(0, ddof=1), rtol=1e-9)


def test_zfilter_feeds_acting_and_learning_the_same(script, small, monkeypatch):
    """To the bit, also where a feature is a constant, which float32 and float64 round apart."""
    acted, learnt = {}, []
    original, explore = script.update, script.explore

    def exploring(agent, obs, *rest):
        if agent.obs_stat.count == 250:
            acted[tuple(obs)] = agent.obs_filter(obs, update=False)
        return explore(agent, obs, *rest)

    def update(agent, batch, *rest):
        learnt.append((agent.obs_stat.mean, agent.obs_stat.std, batch))
        return original(agent, batch, *rest)

    monkeypatch.setattr(script, "update", update)
    monkeypatch.setattr(script, "explore", exploring)
    args = small(script, env="Countdown-v0", norm="zfilter", total_steps=300)
    script.train(args)
    raw = checkpoint(args.run_dir)["buffer"]["data"][0].double().numpy()
    mean, std, batch = learnt[-1]
    rows = {tuple(np.float32(x)) for x in ((raw - mean) / (std + 1e-8)).clip(-10, 10)}
    assert {tuple(x.numpy()) for x in batch.obs} <= rows
    assert (batch.obs[:, 2] == 0).all()
    assert acted and all(z[2] == 0 for z in acted.values())


@pytest.mark.parametrize("name", ["reinforce_bn", "ppo_bn", "ddpg_bn", "sac_bn"])
def test_only_a_filter_that_normalizes_clips_and_at_ten_deviations(name):
    script, stat = importlib.import_module(name), RunningStat((1,))
    stat.push(np.array([[-1.0], [3.0]]))
    x = 1 + stat.std * np.array([[-99.0], [-10.1], [9.9], [99.0]])
    for norm, expected in (("zfilter", [-10, -10, 9.9, 10]), ("none", x[:, 0])):
        z = script.make_filter(stat, script.Args(norm=norm))(x, update=False)
        np.testing.assert_allclose(z[:, 0], expected, rtol=1e-6)


def test_every_gradient_of_a_network_has_its_bound(script, small, monkeypatch):
    bounds, step = [], script.gradient_step

    def spy(optimizer, loss, max_grad_norm):
        if len(optimizer.param_groups[0]["params"]) > 1:  # not the temperature's
            bounds.append(max_grad_norm)
        step(optimizer, loss, max_grad_norm)

    monkeypatch.setattr(script, "gradient_step", spy)
    result = script.train(small(script, total_steps=120, max_grad_norm=0.7))
    assert len(bounds) == 2 * result["updates"] > 0 and set(bounds) == {0.7}


def test_fixed_filter_uses_the_file_and_never_learns(script, small, capsys):
    first = small(script)
    script.train(first)
    file = f"{first.run_dir}/obs_stats.npz"
    second = small(script, norm="fixed", norm_stats=file, seed=2)
    result = script.train(second)
    saved = checkpoint(second.run_dir)
    with np.load(file) as stats, np.load(f"{second.run_dir}/obs_stats.npz") as own:
        np.testing.assert_array_equal(saved["obs_filter"]["mean"], stats["mean"])
        assert not np.allclose(own["mean"], stats["mean"])  # generation two, from this run's states
        agent = script.make_agent(gym.make("Pendulum-v1"), second, "cpu")
        x = np.array([0.3, 0.5, 2.0])
        expected = (x - stats["mean"]) / (stats["std"] + 1e-8)
        np.testing.assert_allclose(agent.obs_filter(x, update=False), expected, rtol=1e-6)
    foreign = small(script, norm="fixed", norm_stats=file, env="Countdown-v0")
    with pytest.raises(SystemExit):  # as wide, but of another environment
        script.train(foreign)
    assert "Pendulum-v1" in capsys.readouterr().err and not Path(foreign.run_dir).exists()
    Path(file).unlink()  # a run keeps its statistics with its weights
    second.resume = second.run_dir
    assert script.train(second)["eval"] == result["eval"]


# ------------------------------------------------------------------------------------ Whole runs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "batchnorm"},
        {"norm": "batchnorm", "bn_policy_critic": "eval", "norm_position": ("input", "pre")},
        {"norm": "batchnorm", "bn_target": "train", "norm_net": "critic"},
        {"norm": "batchrenorm", "bn_joint": True, "bn_warmup": 50, "norm_position": ("post",)},
        {"norm": "batchrenorm", "bn_joint": True, "target_network": False, "norm_net": "critic"},
        {"norm": "layernorm", "norm_position": ("input", "pre", "post")},
        {"norm": "zfilter", "max_grad_norm": 1.0},
        {"target_network": False, "hidden_sizes": (16,)},
    ],
    ids=str,
)
def test_every_kind_of_run_learns_something(script, small, options):
    args = small(script, total_steps=1100, learning_starts=950, **options)
    result = script.train(args)
    assert result["updates"] == 150 and result["steps"] == 1100 and not result["diverged"]
    assert result["run_dir"] == args.run_dir
    assert [e[0] for e in result["eval"]] == [1100] and np.isfinite(result["eval"][0][1])
    torch.manual_seed(args.seed)
    start = script.make_agent(gym.make(args.env), args, "cpu")
    end = checkpoint(args.run_dir)
    for name in ("actor", "critic"):
        for key, value in getattr(start, name).named_parameters():
            assert not torch.equal(value, end[name][key]), (name, key)
    found = tags(args.run_dir)
    expected = {"losses/critic", "losses/actor", "losses/q", "eval/return", "charts/SPS"}
    expected |= {"charts/episodic_return", "norm/actor_grad", "norm/saturation", "norm/dead_units"}
    expected |= {"norm/train_eval_gap_policy", "norm/train_eval_gap_q"}
    assert expected <= found
    assert ("norm/stat_lag" in found) == args.norm.startswith("batch")
    assert ("norm/target_stretch" in found) == args.norm.startswith("batch")
    about = json.loads(Path(args.run_dir, "args.json").read_text())
    assert about["args"]["norm"] == args.norm and about["versions"]["torch"] == torch.__version__


def test_an_activation_that_cannot_die_reports_no_dead_units(script, small, monkeypatch):
    monkeypatch.setattr(script, "ACTIVATION", torch.nn.Tanh)
    args = small(script, total_steps=1000, learning_starts=990, norm="batchnorm")
    assert script.train(args)["updates"] == 10
    assert "norm/stat_lag" in tags(args.run_dir) and "norm/dead_units" not in tags(args.run_dir)


class Solved(Exception):
    pass


def test_pendulum_is_learnt(script, small, monkeypatch):
    """Solved is above -200; random actions get about -1200.

    The first such evaluation counts: which one falls back, say to -600, depends on the processor.
    """
    report_evaluation = script.report_evaluation

    def report(*inputs):
        point = report_evaluation(*inputs)
        if point[1] > -200:
            raise Solved
        return point

    monkeypatch.setattr(script, "report_evaluation", report)
    args = small(script, total_steps=5000, learning_starts=1000, hidden_sizes=(128, 128))
    args.eval_every, args.eval_episodes, args.batch_size, args.buffer_size = 500, 10, 128, 5000
    with pytest.raises(Solved):
        script.train(args)


@pytest.mark.parametrize("norm", ["none", "batchnorm", "zfilter"])
def test_same_seed_same_bits_and_evaluation_changes_nothing(script, small, norm):
    ends = []
    for eval_every in (0, 70):
        args = small(script, norm=norm, eval_every=eval_every)
        result = script.train(args)
        end = checkpoint(args.run_dir)
        end.pop("progress")
        ends.append((end, result["eval"][-1]))
    assert len(result["eval"]) == 6
    assert same(*ends)
    other = script.train(small(script, norm=norm, seed=2))
    assert other["eval"][-1] != ends[0][1]


def test_a_run_that_diverges_says_so(script, small, capsys):
    args = small(script, env="HugeReward-v0", eval_every=101)
    result = script.train(args)
    assert result["diverged"] and result["steps"] == 101 and result["eval"] == []
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "diverged" in err and "101" in err
    assert json.loads(Path(args.run_dir, "result.json").read_text())["diverged"]


def test_a_weight_that_is_not_finite_reaches_no_checkpoint(script, small, monkeypatch):
    """It breaks in the update of step 160, where an episode ends and a checkpoint is due."""
    update, updates = script.update, itertools.count(1)

    def broken(agent, *rest):
        losses = update(agent, *rest)
        if next(updates) == 60:
            with torch.no_grad():
                next(agent.actor.parameters())[0, 0] = float("nan")
        return losses

    monkeypatch.setattr(script, "update", broken)
    args = small(script, env="ShortPendulum-v0", save_every=40)
    result = script.train(args)
    assert result["diverged"] and result["steps"] == 160
    saved = checkpoint(args.run_dir)
    assert saved["progress"][0] == 120
    assert all(x.isfinite().all() for x in saved["actor"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("norm", ["none", "batchnorm", "batchrenorm", "zfilter"])
@pytest.mark.parametrize("name", ["reinforce_bn", "ppo_bn", "ddpg_bn", "sac_bn"])
def test_a_run_on_a_gpu_learns_and_goes_on_there_or_on_the_cpu(name, norm, small):
    module = importlib.import_module(name)
    args = small(module, norm=norm, device="cuda")
    results = [module.train(args)]
    for device in ("cuda", "cpu"):
        steps = results[-1]["steps"] + 200
        more = {"device": device, "total_steps": steps, "resume": args.run_dir}
        results.append(module.train(replace(args, **more)))
    assert 0 < results[0]["updates"] < results[1]["updates"] < results[2]["updates"]
    assert np.isfinite([result["eval"][-1] for result in results]).all()
