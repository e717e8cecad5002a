"""Whole runs and functions of the scripts that learn from fresh data, REINFORCE and PPO."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Countdown, Ragged, checkpoint, same, scalars, tags
from torch import nn

import ppo_bn
import reinforce_bn


def make_agent(script, args):
    torch.manual_seed(0)
    return script.make_agent(script.make_envs(args, args.num_envs), args, "cpu")


@pytest.fixture
def captured(on_policy, monkeypatch):
    """The rollouts and batches of a run, in lists that fill as it learns."""
    rollouts, batches = [], []
    make_batch = on_policy.make_batch

    def capture(rollout, *rest):
        rollouts.append(rollout)
        batches.append(make_batch(rollout, *rest))
        return batches[-1]

    monkeypatch.setattr(on_policy, "make_batch", capture)
    return rollouts, batches


# -------------------------------------------------------------------- What is stored and learnt


def test_time_outs_pay_what_was_to_come_and_deaths_do_not(on_policy, small, captured, monkeypatch):
    """RareDeath pays 1 + t, dies at t = 5 in every fourth episode, else times out at t = 8."""
    monkeypatch.setattr(
        on_policy,
        "state_value",  # recognizable: 1000 t
        lambda agent, obs, args: torch.as_tensor(1000.0 * obs[:, 0]),
    )
    args = small(on_policy, env="RareDeath-v0", total_steps=200, gamma=0.5)
    on_policy.train(args)
    rollouts, _ = captured
    seen = set()
    for rollout in rollouts:
        for obs, reward, done in zip(
            rollout.obs.flatten(0, 1), rollout.reward.flatten(), rollout.done.flatten(), strict=True
        ):
            t, episode = obs[0].item() + 1, obs[1].item()
            dies, timed_out = t == 5 and episode % 4 == 0, t == 8
            assert done.item() == (dies or timed_out)
            assert reward.item() == 1 + t + (0.5 * 1000 * t if timed_out else 0)
            seen.add((dies, timed_out))
        for before, after, done in zip(rollout.obs, rollout.obs[1:], rollout.done, strict=False):
            ended = done.bool()
            assert (after[ended][:, 0] == 0).all()  # the next row is the start of an episode
            assert (after[~ended][:, 0] == before[~ended][:, 0] + 1).all()
    assert seen == {(False, False), (True, False), (False, True)}


def test_a_death_at_the_time_limit_is_a_death(on_policy, small, captured, monkeypatch):
    monkeypatch.setattr(on_policy, "state_value", lambda agent, obs, args: torch.ones(len(obs)))
    on_policy.train(small(on_policy, env="LastBreath-v0", total_steps=60, gamma=0.5))
    for rollout in captured[0]:
        assert torch.equal(rollout.reward, 2 + rollout.obs[..., 0])  # no bootstrap anywhere


def test_a_rollout_bootstraps_from_the_observation_after_it(small, monkeypatch):
    """PPO's last value is that of the state it acts in next; Countdown observes (t, ...)."""
    found, make_batch = [], ppo_bn.make_batch

    def spy(rollout, last_value, args):
        found.append((rollout, last_value))
        return make_batch(rollout, last_value, args)

    monkeypatch.setattr(ppo_bn, "make_batch", spy)
    monkeypatch.setattr(
        ppo_bn, "state_value", lambda agent, obs, args: torch.as_tensor(100.0 + obs[:, 0])
    )
    ppo_bn.train(small(ppo_bn, env="Countdown-v0", total_steps=500))
    for rollout, last_value in found:
        t = torch.where(rollout.done[-1].bool(), 0, rollout.obs[-1, :, 0] + 1)
        assert torch.equal(last_value, 100 + t)
    assert len(found) == 4


def test_scaled_rewards_do_not_scale_the_bootstrap(on_policy, small, captured, monkeypatch):
    value = 123.0
    monkeypatch.setattr(
        on_policy, "state_value", lambda agent, obs, args: torch.full((len(obs),), value)
    )
    args = small(on_policy, env="RareDeath-v0", total_steps=300, gamma=0.5, reward_norm=True)
    on_policy.train(args)
    timed_out = torch.cat([x.reward[x.obs[..., 0] == 7] for x in captured[0]])
    assert len(timed_out) > 3 and ((timed_out > 61.5) & (timed_out <= 61.5 + 10)).all()


def test_reinforce_leaves_out_what_follows_in_a_run(small, monkeypatch):
    """Four environments whose episodes last 2, 3, 4 and 5 steps, side by side."""
    Ragged.made = 0
    batches, make_batch = [], reinforce_bn.make_batch
    monkeypatch.setattr(
        reinforce_bn,
        "make_batch",
        lambda *inputs: batches.append(make_batch(*inputs)) or batches[-1],
    )
    args = small(reinforce_bn, env="Ragged-v0", total_steps=40, gamma=1.0)
    reinforce_bn.train(args)
    for batch in batches:
        assert sorted(batch.obs[:, 0].tolist()) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4]
        assert batch.returns.max() == 2 + 3 + 4 + 5 + 6
    returns = [value for _, value in scalars(args.run_dir, "charts/episodic_return")]
    assert returns == [(5 + 9 + 14 + 20) / 4] * len(batches)
    lengths = [value for _, value in scalars(args.run_dir, "charts/episodic_length")]
    assert lengths == [3.5] * len(batches)


def test_evaluation_sums_one_episode_of_each_environment(on_policy, small):
    Ragged.made = 0
    args = small(on_policy, env="Ragged-v0", num_envs=4)
    envs = on_policy.make_envs(args, 4)
    agent = on_policy.make_agent(envs, args, "cpu")
    assert on_policy.evaluate(agent, envs).tolist() == [5, 9, 14, 20]


def test_reinforce_learns_from_first_episodes_only(small, monkeypatch):
    batches, make_batch = [], reinforce_bn.make_batch
    monkeypatch.setattr(
        reinforce_bn,
        "make_batch",
        lambda *inputs: batches.append(make_batch(*inputs)) or batches[-1],
    )
    args = small(reinforce_bn, env="RareDeath-v0", total_steps=50, gamma=1.0)
    reinforce_bn.train(args)
    # Episode 1 is the reset that sets the seed, 2 is learnt from and times out, 3 begins when 2 has
    # ended, 4 begins with the next iteration and dies.
    assert [len(batch.obs) for batch in batches] == [4 * 8, 4 * 5]
    deaths = batches[1]
    t = deaths.obs[:, 0]
    expected = sum((t < k) * (1.0 + k) for k in range(1, 6))  # all rewards 1 + t' with t < t' <= 5
    torch.testing.assert_close(deaths.returns, expected)


def test_reinforce_masks_what_follows_the_first_end():
    one = torch.tensor
    rollout = reinforce_bn.Rollout(
        obs=torch.arange(6.0).reshape(3, 2, 1),
        action=torch.zeros(3, 2),
        value=torch.full((3, 2), 0.5),
        reward=one([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]]),
        done=one([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]),
        playing=one([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]),
    )
    batch = reinforce_bn.make_batch(rollout, reinforce_bn.Args(gamma=0.5))
    assert batch.obs.flatten().tolist() == [0, 1, 2, 4]
    assert batch.returns.tolist() == [1 + 2 + 4, 2, 4 + 8, 16]
    assert batch.advantage.tolist() == [6.5, 1.5, 11.5, 15.5]


def test_gae_against_brute_force():
    """Over hand-made ends, each advantage is the weighted sum of TD errors until its episode's."""
    rng = np.random.default_rng(0)
    length, gamma, lam = 12, 0.9, 0.7
    reward, value = rng.normal(size=(length, 3)), rng.normal(size=(length + 1, 3))
    done = np.zeros((length, 3))
    done[4, 0] = done[7, 0] = done[11, 1] = done[0, 2] = 1
    expected = np.zeros((length, 3))
    for t, n in itertools.product(range(length), range(3)):
        for k in range(t, length):
            after = 0 if done[k, n] else gamma * value[k + 1, n]
            expected[t, n] += (gamma * lam) ** (k - t) * (reward[k, n] + after - value[k, n])
            if done[k, n]:
                break
    inputs = (torch.as_tensor(x) for x in (reward, value, done))
    found = ppo_bn.gae(*inputs, gamma, lam)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_gae_at_its_limits():
    """lambda = 1: rewards that follow minus V; lambda = 0: the TD error."""
    reward = torch.tensor([[1.0], [2.0], [3.0]])
    value = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    done = torch.zeros(3, 1)
    one = ppo_bn.gae(reward, value, done, 0.5, 1.0).flatten()
    assert one.tolist() == [1 + 1 + 0.75 + 5 - 10, 2 + 1.5 + 10 - 20, 3 + 20 - 30]
    zero = ppo_bn.gae(reward, value, done, 0.5, 0.0).flatten()
    assert zero.tolist() == [1 + 10 - 10, 2 + 15 - 20, 3 + 20 - 30]


def test_reward_to_go_against_brute_force():
    rng = np.random.default_rng(1)
    reward, done = rng.normal(size=(9, 2)), np.zeros((9, 2))
    done[3, 0] = done[8] = 1
    expected = np.zeros((9, 2))
    for t, n in itertools.product(range(9), range(2)):
        for k in range(t, 9):
            expected[t, n] += 0.8 ** (k - t) * reward[k, n]
            if done[k, n]:
                break
    found = reinforce_bn.reward_to_go(torch.as_tensor(reward), torch.as_tensor(done), 0.8)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_ppo_batch_by_hand():
    """Two steps of one environment; the value after the rollout is bootstrapped from."""
    rollout = ppo_bn.Rollout(
        obs=torch.zeros(2, 1, 3),
        action=torch.zeros(2, 1),
        log_prob=torch.zeros(2, 1),
        value=torch.tensor([[10.0], [20.0]]),
        reward=torch.tensor([[1.0], [2.0]]),
        done=torch.zeros(2, 1),
    )
    batch = ppo_bn.make_batch(rollout, torch.tensor([30.0]), ppo_bn.Args(gamma=0.5, gae_lambda=0.5))
    last = 2 + 0.5 * 30 - 20
    first = 1 + 0.5 * 20 - 10 + 0.25 * last
    assert batch.advantage.tolist() == [first, last]
    assert batch.returns.tolist() == [first + 10, last + 20]


def test_rows_of_a_ppo_batch_belong_together():
    """Three steps of two environments, where each number says whose it is: 10 t + n."""
    n = 10.0 * torch.arange(3).unsqueeze(1) + torch.arange(2)
    zero, one = torch.zeros(3, 2), torch.ones(3, 2)
    rollout = ppo_bn.Rollout(n.unsqueeze(2).expand(3, 2, 4), n, n, zero, n, one)
    batch = ppo_bn.make_batch(rollout, torch.zeros(2), ppo_bn.Args())
    expected = torch.tensor([0.0, 1, 10, 11, 20, 21])
    assert all(torch.equal(x, expected) for x in batch[1:])
    assert torch.equal(batch.obs, expected.unsqueeze(1).expand(6, 4))


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.3}, {"value_coef": 0.1}], ids=str)
def test_what_ppo_descends(small, monkeypatch, options):
    """The gradient step gets policy loss + value_coef critic loss - entropy_coef entropy."""
    args = small(ppo_bn, minibatches=1, epochs=1, **options)
    agent, found = make_agent(ppo_bn, args), []
    monkeypatch.setattr(ppo_bn, "gradient_step", lambda *inputs: found.append(inputs))
    torch.manual_seed(1)
    obs, action = torch.randn(9, 4), torch.randint(2, (9,))
    policy, advantage, returns = agent.actor(obs), torch.randn(9), torch.randn(9)
    old = policy.log_prob(action).detach() - 0.1
    ppo_bn.update(
        agent, ppo_bn.Batch(obs, action, old, advantage, returns), np.random.default_rng(0), args
    )
    a, ratio = (advantage - advantage.mean()) / advantage.std(), np.exp(0.1)
    value = ((agent.critic(obs) - returns) ** 2).mean()
    p = policy.probs
    entropy = -(p * p.log()).sum(1).mean()
    expected = -(ratio * a).mean() + args.value_coef * value - args.entropy_coef * entropy
    ((optimizer, loss, longest),) = found
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert optimizer is agent.optimizer and longest == args.max_grad_norm == 0.5


def test_what_reinforce_descends(small, monkeypatch):
    args = small(reinforce_bn, critic_steps=2, entropy_coef=0.3, max_grad_norm=0.7)
    agent, found = make_agent(reinforce_bn, args), []
    monkeypatch.setattr(reinforce_bn, "gradient_step", lambda *inputs: found.append(inputs))
    obs, action = torch.randn(9, 4), torch.randint(2, (9,))
    advantage, returns = torch.randn(9), torch.randn(9)
    policy = agent.actor(obs)
    batch = reinforce_bn.Batch(obs, action, advantage, returns)
    reinforce_bn.update(agent, batch, args)
    a = (advantage - advantage.mean()) / advantage.std()
    p = policy.probs
    entropy = -(p * p.log()).sum(1).mean()
    expected = -(policy.log_prob(action) * a).mean() - 0.3 * entropy
    (actor, loss, longest), *critics = found
    assert actor is agent.actor_optimizer and longest == 0.7
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    value = ((agent.critic(obs) - returns) ** 2).mean()  # fitted to returns, not to advantages
    assert [x is agent.critic_optimizer for x, *_ in critics] == [True, True]
    assert [longest for *_, longest in critics] == [0.7, 0.7]
    torch.testing.assert_close(critics[0][1], value)


def test_clipped_loss_by_hand():
    """With clip 0.2: ratio 1.5 and A > 0 counts as 1.2, without gradient; A < 0 as 1.5."""
    old = torch.zeros(4)
    log_prob = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    a = torch.tensor([1.0, -1.0, 1.0, -1.0])  # mean 0, so standardizing divides by their std only
    batch = ppo_bn.Batch(None, None, old, a, None)
    loss, ratio = ppo_bn.policy_loss(log_prob, batch, ppo_bn.Args(clip=0.2))
    torch.testing.assert_close(ratio, torch.tensor([1.5, 1.5, 0.5, 0.5]))
    std = a.std().item()
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4 / std, rel=1e-5)
    loss.backward()
    expected = torch.tensor([0.0, 1.5, -0.5, 0.0]) / 4 / std
    torch.testing.assert_close(log_prob.grad, expected)


def test_reinforce_loss_by_hand():
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    batch = reinforce_bn.Batch(None, None, torch.tensor([3.0, 5.0]), None)
    reinforce_bn.policy_loss(log_prob, batch).backward()
    expected = torch.tensor([0.5, -0.5]) / np.sqrt(2)  # standardized advantages are -+1 / sqrt(2)
    torch.testing.assert_close(log_prob.grad, expected)


def test_first_weights_are_orthogonal_and_the_first_policy_nearly_the_same_everywhere(
    on_policy, small
):
    agent = make_agent(on_policy, small(on_policy, env="Pendulum-v1"))
    for net, gain in ((agent.actor.net, 0.01), (agent.critic.net, 1.0)):
        linear = [layer for layer in net if isinstance(layer, nn.Linear)]
        for layer, length in zip(linear, (2**0.5, 2**0.5, gain), strict=True):
            w = layer.weight if len(layer.weight) <= layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(w @ w.T, length**2 * torch.eye(len(w)))
            assert not layer.bias.any()
    policy = agent.actor(torch.randn(99, 3))
    assert policy.mean.abs().max() < 0.1
    torch.testing.assert_close(policy.stddev, torch.full((99, 1), 0.5))


def test_log_probabilities_of_a_continuous_policy(on_policy, small):
    args = small(on_policy, env="Countdown-v0")
    agent = make_agent(on_policy, args)
    obs = torch.randn(5, 3)
    policy = agent.actor(obs)
    action = policy.sample()
    mean, std = agent.actor.net(obs), 0.5
    expected = -((action - mean) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))
    torch.testing.assert_close(policy.log_prob(action), expected.sum(1))
    assert mean.abs().max() < 0.1  # first actions are near the middle of the bounds


def test_actions_fill_the_bounds_and_no_more(on_policy, small):
    """Countdown's bounds are (-1, 3); its step asserts that actions lie within."""
    env = on_policy.make_env(small(on_policy, env="Countdown-v0"))
    taken = []
    env.unwrapped.step = lambda action: (
        taken.append(action) or Countdown.step(env.unwrapped, action)
    )
    env.reset()
    for action in (-1.0, 0.0, 1.0, 7.0):
        env.step(np.float32([action]))
    assert np.concatenate(taken).tolist() == [-1.0, 1.0, 3.0, 3.0]


def test_early_stop_looks_at_the_epochs_mean(small, monkeypatch):
    """Ratios 10, 1, 1, 1 diverge by 10 - 1 - log 10 in the first minibatch, by 0 in the last."""
    ratios, policy_loss = itertools.cycle([10.0, 1.0, 1.0, 1.0]), ppo_bn.policy_loss

    def scripted(*inputs):
        return policy_loss(*inputs)[0], torch.tensor(next(ratios))

    monkeypatch.setattr(ppo_bn, "policy_loss", scripted)
    mean = (10 - 1 - np.log(10)) / 4
    for target, epochs in ((mean - 0.01, 1), (mean + 0.01, 5), (0.0, 5)):
        args = small(ppo_bn, total_steps=100, target_kl=target, epochs=5)
        assert ppo_bn.train(args)["updates"] == 4 * epochs


def test_minibatches_are_equal_and_cover_the_rollout(small, monkeypatch):
    sizes, policy_loss = [], ppo_bn.policy_loss

    def spy(log_prob, batch, args):
        sizes.append(batch.obs)
        return policy_loss(log_prob, batch, args)

    monkeypatch.setattr(ppo_bn, "policy_loss", spy)
    ppo_bn.train(small(ppo_bn, total_steps=100, epochs=1))
    assert [len(x) for x in sizes] == [32] * 4
    assert len({tuple(row.tolist()) for row in torch.cat(sizes)}) == 128


def test_learning_rate_falls_linearly(on_policy, small, monkeypatch):
    rates, update = [], on_policy.update

    def spy(agent, *rest):
        optimizer = getattr(agent, "optimizer", None) or agent.actor_optimizer
        rates.append(optimizer.param_groups[0]["lr"])
        return update(agent, *rest)

    monkeypatch.setattr(on_policy, "update", spy)
    args = small(on_policy, env="Countdown-v0", total_steps=500)
    on_policy.train(args)
    first = args.learning_rate if on_policy is ppo_bn else args.actor_lr
    assert rates[0] == first and rates == sorted(rates, reverse=True) and len(set(rates)) > 2
    if on_policy is ppo_bn:
        np.testing.assert_allclose(rates, [first * (1 - k * 128 / 500) for k in range(4)])


# ---------------------------------------------------------------------------- Filters in a run


def test_statistics_are_those_of_all_training_observations(on_policy, small, monkeypatch):
    seen, make = [], gym.make

    class Recorder(gym.Wrapper):
        def reset(self, seed=None, options=None):
            obs, info = self.env.reset(seed=seed, options=options)
            self.in_training = seed < 1_000_000 if seed is not None else self.in_training
            if self.in_training and seed is None:  # the seeded reset only sets the seed
                seen.append(obs)
            return obs, info

        def step(self, action):
            result = self.env.step(action)
            if self.in_training:
                seen.append(result[0])
            return result

    monkeypatch.setattr(gym, "make", lambda name: Recorder(make(name)))
    args = small(on_policy, norm="zfilter", total_steps=300)
    result = on_policy.train(args)
    with np.load(f"{args.run_dir}/obs_stats.npz") as stats:
        x = np.array(seen, np.float32).astype(np.float64)
        assert stats["count"] == len(x) > result["steps"] >= 300
        np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(stats["std"], x.std(0, ddof=1), rtol=1e-6)


def test_a_learning_filter_stores_what_the_policy_saw(on_policy, small, captured):
    args = small(on_policy, norm="zfilter", env="Countdown-v0", total_steps=100)
    agents, explore = [], on_policy.explore

    def spy(agent, obs, *rest):
        agents.append((obs, agent.obs_stat.mean, agent.obs_stat.std))
        return explore(agent, obs, *rest)

    on_policy.explore = spy
    try:
        on_policy.train(args)
    finally:
        on_policy.explore = explore
    rollouts, _ = captured
    stored = torch.cat([rollout.obs for rollout in rollouts])
    for (obs, mean, std), z in zip(agents, stored, strict=True):
        np.testing.assert_allclose(z, ((obs - mean) / (std + 1e-8)).clip(-10, 10), atol=1e-5)
    assert not np.array_equal(agents[0][1], agents[-1][1])


def test_rewards_are_scaled_by_the_deviation_of_their_discounted_sums(on_policy):
    rng = np.random.default_rng(0)
    args = on_policy.Args(num_envs=3, gamma=0.9)
    scale, sums, history = on_policy.RewardScale(args), np.zeros(3), []
    for k in range(100):
        reward, done = rng.normal(2, 3, 3), rng.random(3) < 0.2
        if k == 99:
            reward[:2] = 1e4, -1e4  # so many deviations that they are clipped
        sums = 0.9 * sums + reward
        history.append(sums.copy())
        sums[done] = 0
        found = scale(reward, done)
        if len(history) > 1:
            expected = reward / np.std(history, ddof=1)  # divided, never shifted
            np.testing.assert_allclose(found, expected.clip(-10, 10), rtol=1e-6)
    assert found[:2].tolist() == [10, -10] and abs(expected).max() < 13


def test_sums_of_rewards_begin_with_their_episode(on_policy, small, monkeypatch):
    """Also where a checkpoint of PPO cut the one before; Countdown observes (t, ...)."""
    begun, explore = [], on_policy.explore

    def spy(agent, obs, args):
        begun.append(obs[:, 0] == 0)
        assert not agent.reward_scale.sums[begun[-1]].any()
        assert agent.reward_scale.sums[~begun[-1]].all()
        return explore(agent, obs, args)

    monkeypatch.setattr(on_policy, "explore", spy)
    on_policy.train(
        small(on_policy, env="Countdown-v0", total_steps=400, reward_norm=True, save_every=100)
    )
    assert 40 < np.sum(begun) < 100


def test_reward_scale_agrees_with_gymnasium():
    envs = gym.vector.SyncVectorEnv([lambda: gym.make("Pendulum-v1")] * 4)
    theirs = gym.wrappers.vector.NormalizeReward(envs, gamma=0.95)
    envs.reset(seed=0), theirs.reset(seed=0)
    raw = []
    theirs.env.step = lambda action, step=envs.step: raw.append(step(action)) or raw[-1]
    ours = ppo_bn.RewardScale(ppo_bn.Args(num_envs=4, gamma=0.95))
    for _ in range(190):
        _, expected, _, _, _ = theirs.step(np.zeros((4, 1), np.float32))
        found = ours(raw[-1][1], np.zeros(4, bool))
    np.testing.assert_allclose(found, expected, rtol=5e-3)  # theirs starts from variance 1


def test_reward_norm_scales_what_is_learnt_and_not_what_is_reported(on_policy, small, captured):
    args = small(on_policy, env="Countdown-v0", total_steps=400, reward_norm=True)
    on_policy.train(args)
    rollouts, _ = captured
    assert rollouts[-1].reward.abs().max() < 10
    returns = [value for _, value in scalars(args.run_dir, "charts/episodic_return")]
    assert all(20 <= value <= 44 for value in returns)  # 2 + ... + 6 and 2 + ... + 9
    assert np.isclose(checkpoint(args.run_dir)["reward_stat"]["count"], sum(map(rows, rollouts)))


def rows(rollout):
    return rollout.reward.numel()


# ------------------------------------------------------------------------- Modes of batch norm


@pytest.mark.parametrize("rollout", ["eval", "train"])
@pytest.mark.parametrize("update", ["eval", "train"])
def test_every_pass_has_its_mode(on_policy, small, rollout, update):
    args = small(on_policy, norm="batchnorm", bn_rollout=rollout, bn_update=update)
    agent = make_agent(on_policy, args)
    modes = []
    for name in ("actor", "critic"):
        net = getattr(agent, name)
        net.register_forward_pre_hook(lambda net, _, name=name: modes.append((name, net.training)))
    obs = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    on_policy.explore(agent, obs, args)
    on_policy.state_value(agent, obs, args)
    acting = rollout == "train"
    assert modes == [("actor", acting), ("critic", acting), ("critic", acting)]
    modes.clear()
    on_policy.act(agent, obs)
    assert modes == [("actor", False)]
    modes.clear()
    x = torch.randn(128, 4)
    parts = {"action": torch.zeros(128), "advantage": torch.randn(128), "returns": x[:, 0]}
    parts |= {"log_prob": torch.zeros(128)} if on_policy is ppo_bn else {}
    batch = on_policy.Batch(x, **parts)
    rest = (np.random.default_rng(0), args) if on_policy is ppo_bn else (args,)
    on_policy.update(agent, batch, *rest)
    assert len(modes) > 2 and {m for _, m in modes} == {update == "train"}


FIRST_RATIO = [
    ({}, False),
    ({"norm": "layernorm", "norm_position": ("input", "pre")}, False),
    ({"norm": "zfilter"}, False),
    ({"norm": "batchnorm", "bn_update": "eval"}, False),
    ({"norm": "batchrenorm", "bn_update": "eval"}, False),
    ({"norm": "batchnorm"}, True),
    ({"norm": "batchnorm", "bn_rollout": "train"}, True),
]


@pytest.mark.parametrize("options, differs", FIRST_RATIO, ids=str)
def test_ratio_before_the_first_step(on_policy, small, options, differs, monkeypatch):
    add_norm = on_policy.add_norm

    def with_statistics(net, name, args):
        """As if the running statistics had been learnt, so that eval mode does something."""
        net = add_norm(net, name, args)
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2.0)
        return net

    monkeypatch.setattr(on_policy, "add_norm", with_statistics)
    args = small(on_policy, total_steps=600, **options)
    on_policy.train(args)
    ratios = [value for _, value in scalars(args.run_dir, "norm/first_ratio")]
    assert len(ratios) >= 3
    assert (max(ratios[1:]) > 1e-3) == differs and (max(ratios) < 1e-5) == (not differs), ratios


def test_ratio_before_the_first_step_with_fixed_statistics(on_policy, small):
    first = small(on_policy)
    on_policy.train(first)
    args = small(on_policy, norm="fixed", norm_stats=f"{first.run_dir}/obs_stats.npz")
    on_policy.train(args)
    assert max(value for _, value in scalars(args.run_dir, "norm/first_ratio")) < 1e-5


def test_momentum_is_a_bystander(on_policy, small):
    """Rollout and update in train mode: momentum changes no bit of learning, only a later eval."""
    runs = []
    for momentum in (0.001, 0.9):
        options = {"bn_rollout": "train", "bn_momentum": momentum, "eval_every": 200}
        args = small(on_policy, norm="batchnorm", total_steps=1500, eval_episodes=4, **options)
        result = on_policy.train(args)
        curve = scalars(args.run_dir, "charts/episodic_return")
        losses = scalars(args.run_dir, "losses/policy")
        weights = checkpoint(args.run_dir)["actor"]
        runs.append((curve, losses, weights, result["eval"]))
    (curve, losses, weights, final), (curve2, losses2, weights2, final2) = runs
    assert curve == curve2 and losses == losses2 and len(curve) > 3
    for key, value in weights.items():
        assert torch.equal(value, weights2[key]) == ("running" not in key), key
    assert final[-1][1] != final2[-1][1]


def test_moment_gap_by_hand():
    """One layer on two features: |mean of the moment - mean of the batch| / std of the batch."""
    net = nn.Sequential(nn.BatchNorm1d(2))
    batch = torch.tensor([[0.0, 10.0], [2.0, 30.0]])  # means 1, 20; deviations 1, 10
    moment = torch.tensor([[3.0, 20.0], [5.0, 20.0]])  # means 4, 20
    found = ppo_bn.moment_gap(net, [moment], batch)
    assert found == pytest.approx((3 + 0) / 2, rel=1e-4)
    assert net[0].running_mean.tolist() == [0, 0] and net[0].momentum == 0.1


def test_moment_gap_looks_at_each_moment_alone():
    """Also behind batch renormalization, whose outputs depend on running statistics."""
    torch.manual_seed(0)
    layers = [ppo_bn.BatchRenorm(3, 0.1, 0), nn.Linear(3, 3), ppo_bn.BatchRenorm(3, 0.1, 0)]
    net, batch = nn.Sequential(*layers), torch.randn(64, 3)
    moments = [torch.randn(8, 3) * k + k for k in range(1, 5)]
    gaps = [ppo_bn.moment_gap(net, [moment], batch) for moment in moments]
    for order in (moments, moments[::-1]):
        assert ppo_bn.moment_gap(net, order, batch) == pytest.approx(np.mean(gaps), rel=1e-5)


def test_three_ways_to_evaluate(on_policy, small, capsys, monkeypatch):
    options = {"bn_rollout": "train", "bn_recalibrate": 20, "bn_momentum": 0.5}
    args = small(on_policy, norm="batchnorm", norm_position=("input",), **options)
    seen, evaluate = [], on_policy.evaluate

    def spy(agent, envs):
        returns, in_train_mode = evaluate(agent, envs), hasattr(agent.actor, "actor")
        actor = agent.actor.actor if in_train_mode else agent.actor
        mean = actor.net[0].running_mean.clone()
        seen.append((in_train_mode, envs.num_envs, returns.mean(), mean))
        return returns

    monkeypatch.setattr(on_policy, "evaluate", spy)
    result = on_policy.train(args)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("return by mode"))
    assert [in_train_mode for in_train_mode, *_ in seen] == [False, True, False, False]
    assert [n for _, n, _, _ in seen] == [4, 4, 4, 1]
    means = [mean for _, _, _, mean in seen]
    assert torch.equal(means[0], means[1]) and torch.equal(means[2], means[3])
    assert not torch.allclose(means[1], means[2])  # recalibration moved them, and they stay
    for mode, (_, _, expected, _) in zip(("eval", "train", "recalibrated"), seen, strict=False):
        (_, value) = scalars(args.run_dir, f"norm/return_{mode}_mode")[-1]
        assert value == pytest.approx(expected) and f"{mode} {value:.1f} ±" in line
    saved = checkpoint(args.run_dir)["actor"]["net.0.running_mean"]
    assert torch.equal(saved, means[3]) and result["eval"][-1][1] == seen[-1][2]


def test_evaluation_in_train_mode_uses_the_batch_and_moves_nothing(on_policy, small):
    args = small(on_policy, norm="batchnorm", env="Countdown-v0", norm_position=("input",))
    agent = make_agent(on_policy, args)
    before = {k: v.clone() for k, v in agent.actor.state_dict().items()}
    obs = np.random.default_rng(0).normal(3, 5, size=(6, 3)).astype(np.float32)
    in_train_mode = SimpleNamespace(**vars(agent) | {"actor": on_policy.InTrainMode(agent.actor)})
    found = on_policy.act(in_train_mode, obs)
    standardized = (obs - obs.mean(0)) / np.sqrt(obs.var(0) + 1e-5)
    expected = agent.actor.net[1:](torch.as_tensor(standardized)).detach()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert same(before, agent.actor.state_dict())
    assert not np.allclose(found, on_policy.act(agent, obs))


def test_recalibration_leads_running_statistics_to_the_batch(on_policy, small):
    args = small(on_policy, norm="batchnorm", norm_position=("input", "post"))
    agent = make_agent(on_policy, args)
    obs = torch.randn(64, 4) * 3 + 7
    weights = [p.clone() for p in agent.actor.parameters()]
    on_policy.recalibrate(agent, obs, 200)
    layer = agent.actor.net[0]
    torch.testing.assert_close(layer.running_mean, obs.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.running_var, obs.var(0), rtol=1e-3, atol=1e-4)
    for net in (agent.actor, agent.critic):
        assert on_policy.probe(net.net, obs)[0] < 0.05  # train and eval mode nearly agree
    assert all(map(torch.equal, weights, agent.actor.parameters()))


# ----------------------------------------------------------------------------------- Networks


def kinds(net):
    return [type(layer).__name__.replace("Batch", "") for layer in net]


def test_where_layers_stand(on_policy, small):
    def layers(**options):
        return kinds(make_agent(on_policy, small(on_policy, **options)).actor.net)

    act = on_policy.ACTIVATION.__name__
    plain = ["Linear", act, "Linear", act, "Linear"]
    assert (
        layers() == plain == layers(norm="zfilter") == layers(norm="batchnorm", norm_net="critic")
    )
    post = ["Linear", act, "Norm1d", "Linear", act, "Norm1d", "Linear"]
    assert layers(norm="batchnorm") == post
    pre = ["Norm1d", "Linear", "Norm1d", act, "Linear", "Norm1d", act, "Linear"]
    assert layers(norm="batchnorm", norm_position=("input", "pre")) == pre
    options = {"norm": "batchnorm", "network": "linear", "norm_position": ("input",)}
    options["hidden_sizes"] = on_policy.Args.hidden_sizes
    assert layers(**options) == ["Norm1d", "Linear"]
    options = {"norm": "batchnorm", "network": "cnn", "norm_position": ("input", "post")}
    cnn = ["Norm2d", "Conv2d", act, "Norm2d", "Flatten", "Linear", act, "Norm1d"]
    cnn += ["Linear", act, "Norm1d", "Linear"]
    assert layers(env="Picture-v0", **options) == cnn


def test_images_reach_the_convolution_channels_first(on_policy, small):
    env = on_policy.make_env(small(on_policy, env="Picture-v0", network="cnn"))
    obs, _ = env.reset(seed=0)
    assert obs.shape == (2, 10, 10) and obs.dtype == np.float32
    assert obs[0].sum() == 0 and obs[1, env.unwrapped.row].sum() == 10 == obs.sum()
    flat, _ = on_policy.make_env(small(on_policy, env="Picture-v0")).reset(seed=0)
    assert flat.shape == (200,) and flat.sum() == 10


def test_a_normalized_image_has_one_mean_for_a_channel(on_policy, small):
    options = {"norm": "batchnorm", "network": "cnn", "norm_position": ("input",)}
    agent = make_agent(on_policy, small(on_policy, env="Picture-v0", **options))
    images = torch.randn(8, 2, 10, 10)
    out = agent.actor.net[0].train()(images)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    gap, found, dead = on_policy.probe(agent.actor.net, images)
    mean, var = images.mean((0, 2, 3)), images.var((0, 2, 3), correction=0)
    old = 0.1 * mean, (0.9 + 0.1 * var).sqrt()  # a tenth of the way from 0 and 1
    expected = *old, mean, var.sqrt()
    for x, y in zip(found[0], expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    assert gap > 0 and len(dead) == (3 if on_policy.ACTIVATION is nn.ReLU else 0)


# --------------------------------------------------------------------------------- Whole runs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "batchnorm", "env": "Countdown-v0"},
        {"norm": "batchnorm", "bn_rollout": "train", "norm_position": ("input", "pre")},
        {"norm": "batchrenorm", "bn_warmup": 10, "bn_rollout": "train", "norm_net": "actor"},
        {"norm": "layernorm", "norm_position": ("input", "pre", "post"), "norm_net": "critic"},
        {"norm": "zfilter", "reward_norm": True, "entropy_coef": 0.01},
        {"norm": "batchnorm", "network": "linear", "norm_position": ("input",)},
        {"norm": "batchnorm", "network": "cnn", "env": "Picture-v0"},
        {"norm": "layernorm", "network": "cnn", "env": "Picture-v0", "norm_position": ("input",)},
    ],
    ids=str,
)
def test_every_kind_of_run_learns_something(on_policy, small, options):
    if options.get("network") == "linear":
        options = options | {"hidden_sizes": on_policy.Args.hidden_sizes}
    args = small(on_policy, **options)
    result = on_policy.train(args)
    assert result["updates"] >= 8 and result["steps"] >= 400 and not result["diverged"]
    assert [e[0] for e in result["eval"]] == [result["steps"]]
    torch.manual_seed(args.seed)
    start = on_policy.make_agent(on_policy.make_envs(args, 4), args, "cpu")
    end = checkpoint(args.run_dir)
    for name in ("actor", "critic"):
        for key, value in getattr(start, name).named_parameters():
            assert not torch.equal(value, end[name][key]), (name, key)
    found = tags(args.run_dir)
    expected = {"losses/critic", "losses/policy", "losses/entropy", "eval/return", "charts/SPS"}
    expected |= {"norm/first_ratio", "norm/train_eval_gap_policy", "norm/train_eval_gap_v"}
    expected |= {"charts/episodic_return", "charts/episodic_length"}
    assert expected <= found
    assert ("norm/stat_lag" in found) == args.norm.startswith("batch")
    assert ("norm/saturation" in found) == (args.env == "Countdown-v0")
    about = json.loads(Path(args.run_dir, "args.json").read_text())
    assert about["args"]["norm"] == args.norm and about["versions"]["torch"] == torch.__version__


def test_cartpole_is_learnt(on_policy, small):
    """Chance gets about 20."""
    args = small(on_policy, total_steps=30_000, eval_episodes=8, hidden_sizes=(64,), num_envs=8)
    if on_policy is ppo_bn:
        args.learning_rate, args.epochs = 3e-3, 4
    assert on_policy.train(args)["eval"][-1][1] > 100


def test_picture_is_learnt_by_a_convolution(on_policy, small):
    """Chance gets 1 of 10."""
    args = small(on_policy, env="Picture-v0", network="cnn", total_steps=8000, eval_episodes=8)
    if on_policy is ppo_bn:
        args.learning_rate = 3e-3
    assert on_policy.train(args)["eval"][-1][1] > 5


@pytest.mark.parametrize("norm", ["none", "batchnorm", "zfilter"])
def test_same_seed_same_bits_and_evaluation_changes_nothing(on_policy, small, norm):
    ends = []
    for eval_every in (0, 90):
        args = small(on_policy, norm=norm, eval_every=eval_every)
        result = on_policy.train(args)
        end = checkpoint(args.run_dir)
        end.pop("progress")
        ends.append((end, result["eval"][-1]))
    assert len(result["eval"]) >= 3
    assert same(*ends)
    other = on_policy.train(small(on_policy, norm=norm, seed=2))
    assert not same(checkpoint(other["run_dir"])["actor"], ends[0][0]["actor"])


@pytest.mark.parametrize("env", ["CartPole-v1", "Countdown-v0"])
@pytest.mark.parametrize("what", ["weight", "log_prob"])
def test_divergence_is_a_result_wherever_it_begins(on_policy, small, env, what, monkeypatch):
    update = on_policy.update

    def broken(agent, batch, *rest):
        if what == "log_prob" and on_policy is ppo_bn:  # the ratio overflows
            batch = batch._replace(log_prob=batch.log_prob - 200)
        else:
            with torch.no_grad():
                agent.actor.net[0].weight[0, 0] = float("nan")
        return update(agent, batch, *rest)

    monkeypatch.setattr(on_policy, "update", broken)
    result = on_policy.train(small(on_policy, env=env))
    assert result["diverged"] and result["eval"] == []


def test_a_run_that_diverges_says_so(on_policy, small, capsys):
    args = small(on_policy, env="HugeReward-v0", eval_every=10)
    result = on_policy.train(args)
    assert result["diverged"] and result["eval"] == []
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "diverged" in err and str(result["steps"]) in err
    assert json.loads(Path(args.run_dir, "result.json").read_text())["diverged"]
