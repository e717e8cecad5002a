"""Whole runs, most of those that learn from a replay: what they store, learn and leave."""

import importlib
import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, Countdown, all_scalars, checkpoint


@pytest.fixture
def agents(script, monkeypatch):
    """Return the list of the agents that the script makes."""
    made, make_agent = [], script.make_agent

    def keep(*inputs):
        made.append(make_agent(*inputs))
        return made[-1]

    monkeypatch.setattr(script, "make_agent", keep)
    return made


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("longest, expected", [(0.0, [-3.0, -4.0]), (1.0, [-0.6, -0.8])])
def test_a_gradient_of_length_5_is_cut_to_the_longest(name, longest, expected):
    x = torch.zeros(2, requires_grad=True)
    loss = (x * torch.tensor([3.0, 4.0])).sum()
    importlib.import_module(name).gradient_step(torch.optim.SGD([x], lr=1.0), loss, longest)
    torch.testing.assert_close(x.detach(), torch.tensor(expected))


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_no_two_generators_give_the_same_numbers(script, small, monkeypatch):
    """With one seed torch and numpy's global one would: both are Mersenne twisters."""
    made, low = [], 2**24  # torch.rand takes the low bits

    def draw(args, agent, generators):
        made.append((torch.rand(100).double() * low).tolist())
        made.append((np.random.randint(0, 2**32, 100, np.uint32) % low).tolist())
        made.append([random.getrandbits(32) % low for _ in range(100)])
        made.extend((x.integers(2**32, size=100) % low).tolist() for x in generators)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "Run", draw)
    with pytest.raises(KeyboardInterrupt):
        script.train(small(script))
    assert not any({*a} & {*b} for a, b in itertools.combinations(made, 2))


def test_training_stores_raw_transitions_and_bootstraps_through_time_outs(script, small):
    options = {"norm": "zfilter", "reward_norm": True, "total_steps": 200}
    args = small(script, env="Countdown-v0", **options)
    result = script.train(args)
    obs, action, reward, next_obs, terminated = checkpoint(args.run_dir)["agent"]["buffer"]["data"]
    assert torch.equal(next_obs - obs, torch.tensor([1.0, 0, 0]).expand(200, 3))  # never the reset
    assert torch.equal(reward, 1 + next_obs[:, 0]) and (next_obs[:, 0] == 8).sum() > 10
    dies = (next_obs[:, 0] == 5) & (obs[:, 1] % 2 == 0)
    assert torch.equal(terminated, dies.float())  # and a time-out, at 8, is no death
    assert abs(action[:100].std() - 3**-0.5) < 0.05  # uniform in [-1, 1] until learning starts
    returns = {x for _, x in all_scalars(args.run_dir)["charts/episodic_return"]}
    assert returns == {20, 44}  # 2 + ... + 6, 2 + ... + 9
    assert result["eval"] == [(200, 44.0, 0.0)]  # 2 + ... + 9, whatever learning makes of rewards


# ------------------------------------------------------------------------- Filters in a run
@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_statistics_are_those_of_all_training_observations(script, small, monkeypatch):
    seen, observe = [], Countdown.observe

    def spy(env):
        if env.np_random_seed != 1_000_000 and env.episode > 1:  # the first reset sets the seed
            seen.append(observe(env))
        return observe(env)

    monkeypatch.setattr(Countdown, "observe", spy)
    args = small(script, env="Countdown-v0", norm="zfilter", total_steps=300, eval_every=50)
    steps = script.train(args)["steps"]
    with np.load(f"{args.run_dir}/obs_stats.npz") as stats:
        x = np.array(seen, np.float32).astype(np.float64)
        assert stats["count"] == len(x) > steps >= 300
        np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats["std"], x.std(0, ddof=1), rtol=1e-9, atol=1e-12)


def test_a_filter_feeds_acting_and_learning_alike(script, small, agents, monkeypatch):
    """To the bit, also where a feature is a constant, which float32 and float64 round apart."""
    inputs, make_net = [], script.make_net

    def spied(*sizes):
        net = make_net(*sizes)
        if sizes[0] == 3:  # the actor's
            net.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        return net

    monkeypatch.setattr(script, "make_net", spied)
    args = small(script, env="Countdown-v0", norm="zfilter", total_steps=300)
    script.train(args)
    assert {1, 32} <= {len(x) for x in inputs} and all((x[:, 2] == 0).all() for x in inputs)
    agent = agents[0]
    raw = agent.buffer.sample(np.random.default_rng(0), 32)
    learnt = script.sample_batch(agent, np.random.default_rng(0), args)
    mean, std = agent.obs_stat.mean, agent.obs_stat.std
    for name in ("obs", "next_obs"):
        expected = ((getattr(raw, name) - mean) / (std + 1e-8)).clip(-10, 10)
        np.testing.assert_allclose(getattr(learnt, name), expected, rtol=1e-6)
    for obs, row in zip(raw.obs, learnt.obs, strict=True):
        script.act(agent, obs)
        assert torch.equal(inputs[-1][0], row)


def test_reward_norm_scales_what_is_sampled(script, small, agents):
    """By the deviation of all discounted sums so far; the replay is raw, see above."""
    args = small(script, env="Countdown-v0", reward_norm=True, total_steps=300, gamma=0.9)
    script.train(args)
    buffer, sums = agents[0].buffer, [0.0]
    for t, reward in zip(buffer.data.obs[:300, 0], buffer.data.reward, strict=False):
        sums.append(reward + (0.9 * sums[-1] if t > 0 else 0.0))
    expected = buffer.sample(np.random.default_rng(0), 32).reward / np.std(sums[1:], ddof=1)
    batch = script.sample_batch(agents[0], np.random.default_rng(0), args)
    np.testing.assert_allclose(batch.reward, expected, rtol=1e-5)


def test_fixed_filter_uses_the_file_and_never_learns(script, small, agents):
    first = small(script, total_steps=120)
    script.train(first)
    file = f"{first.run_dir}/obs_stats.npz"
    second = small(script, norm=("fixed", "layernorm"), norm_stats=file, seed=2, total_steps=120)
    result = script.train(second)
    with np.load(file) as stats, np.load(f"{second.run_dir}/obs_stats.npz") as own:
        assert not np.allclose(own["mean"], stats["mean"])  # of this run's states
        np.testing.assert_array_equal(agents[-1].obs_filter.mean, stats["mean"])
        z = agents[-1].obs_filter(stats["mean"] + 3 * stats["std"])
        np.testing.assert_allclose(z, 3, rtol=1e-6)
    foreign = small(script, norm="fixed", norm_stats=file, env="Countdown-v0")
    with pytest.raises(ValueError, match="Pendulum-v1"):  # as wide, but of another environment
        script.train(foreign)
    assert not Path(foreign.run_dir).exists()
    Path(file).unlink()  # a run keeps its statistics with its weights
    assert script.train(replace(second, resume=second.run_dir))["eval"] == result["eval"]


# ------------------------------------------------------------------------------------ Whole runs
KINDS = [
    {},
    {"norm": ("batchnorm", "zfilter"), "bn_policy_critic": "eval", "norm_position": ("input",)},
    {"norm": "batchnorm", "bn_target": "train", "norm_net": "critic", "weight_norm": True},
    {"norm": "batchrenorm", "bn_joint": True, "bn_warmup": 20, "reward_norm": True},
    {"norm": "batchrenorm", "bn_joint": True, "target_network": False},
    {"norm": ("layernorm", "zfilter"), "norm_position": ("input", "pre", "post")},
    {"target_network": False, "hidden_sizes": (16,), "max_grad_norm": 1.0},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_kind_of_run_learns_something(script, small, options, agents):
    args = small(script, total_steps=1010, learning_starts=960, **options)
    result = script.train(args)
    assert (result["updates"], result["steps"], result["diverged"]) == (50, 1010, False)
    torch.manual_seed(int(np.random.SeedSequence(args.seed).generate_state(1)[0]))
    start, end = script.make_agent(script.make_env(args), args, "cpu"), agents[0]
    for name in ("actor", "critic"):
        pairs = zip(*(getattr(x, name).named_parameters() for x in (start, end)), strict=True)
        assert all(not torch.equal(p, q) for (_, p), (_, q) in pairs)
    assert ("zfilter" in args.norm) == (end.obs_filter is end.obs_stat)
    expected = {"losses/critic", "losses/actor", "losses/q", "eval/return", "eval/return_std"}
    expected |= {"charts/episodic_return", "norm/actor_grad", "norm/saturation"}
    found = all_scalars(args.run_dir)
    assert expected <= found.keys()
    assert ("norm/stat_lag" in found) == ("batch" in str(args.norm))
    assert [step for step, _ in found["losses/critic"]] == [1000, 1010]


def test_pendulum_is_learnt(script, small, monkeypatch):
    """Solved is above -200; random actions get about -1200.

    The first such evaluation counts: which one falls back, say to -600, depends on the processor.
    """

    def judge(_, scalars):
        assert scalars["eval/return_std"] > 0  # each episode has a start of its own
        if scalars["eval/return"] > -200:
            raise StopIteration

    monkeypatch.setattr(script.Run, "log_evaluation", judge)
    options = {"total_steps": 5000, "learning_starts": 500, "hidden_sizes": (64, 64), "tau": 0.02}
    options |= {"buffer_size": 5000, "batch_size": 64, "actor_lr": 3e-3, "critic_lr": 3e-3}
    args = small(script, eval_every=500, eval_episodes=4, gamma=0.95, **options)
    with pytest.raises(StopIteration):
        script.train(args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("norm", ["none", "batchnorm", "batchrenorm", "zfilter"])
@pytest.mark.parametrize("name", SCRIPTS)
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
