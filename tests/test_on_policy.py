"""Whole runs and functions of the scripts that learn from fresh data, REINFORCE and PPO."""

import itertools

import numpy as np
import pytest
import torch
from conftest import Ragged, all_scalars, checkpoint, scalars
from torch import nn

import ppo_bn
import reinforce_bn


def make_agent(script, args):
    torch.manual_seed(0)
    return script.make_agent(script.make_env(args), args, "cpu")


@pytest.fixture
def captured(on_policy, monkeypatch):
    """The inputs of make_batch in a run, and what it returned, in a list that fills."""
    found, make_batch = [], on_policy.make_batch

    def capture(*inputs):
        found.append((*inputs, make_batch(*inputs)))
        return found[-1][-1]

    monkeypatch.setattr(on_policy, "make_batch", capture)
    return found


def values_are(monkeypatch, script, value):
    """Let V(s) be value(t) wherever it is a bootstrap; the toy environments observe (t, ...)."""
    monkeypatch.setattr(
        script, "state_value", lambda agent, obs, args: torch.as_tensor(value(obs[:, 0]))
    )


def same_gradient(found, expected, parameters):
    """Whether two losses have the same gradient, wherever one has any."""
    parameters = list(parameters)
    grads = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (found, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------- What is stored and learnt
def test_time_outs_pay_what_was_to_come_and_deaths_do_not(on_policy, small, captured, monkeypatch):
    """RareDeath pays 1 + t, dies at t = 5 in every fourth episode, else times out at t = 8."""
    values_are(monkeypatch, on_policy, lambda t: 1000 * t)
    on_policy.train(small(on_policy, env="RareDeath-v0", total_steps=200, gamma=0.5))
    seen = set()
    for rollout, *_ in captured:
        rows = (x.flatten(0, 1) for x in (rollout.obs, rollout.reward, rollout.done))
        for obs, reward, done in zip(*rows, strict=True):
            t, episode = obs[0].item() + 1, obs[1].item()
            dies, timed_out = t == 5 and episode % 4 == 0, t == 8
            assert done.item() == (dies or timed_out)
            assert reward.item() == 1 + t + (0.5 * 1000 * t if timed_out else 0)
            seen.add((dies, timed_out))
        for before, after, done in zip(rollout.obs, rollout.obs[1:], rollout.done, strict=False):
            expected = torch.where(done.bool(), 0, before[:, 0] + 1)
            assert torch.equal(after[:, 0], expected)  # behind an end stands a start
    assert seen == {(False, False), (True, False), (False, True)}
    captured.clear()
    on_policy.train(small(on_policy, env="LastBreath-v0", total_steps=60, gamma=0.5))
    for rollout, *_ in captured:  # a death at the time limit is a death
        assert torch.equal(rollout.reward, 2 + rollout.obs[..., 0])


@pytest.mark.parametrize("on_policy", ["ppo_bn"], indirect=True)
def test_a_rollout_bootstraps_from_the_observation_after_it(
    on_policy, small, captured, monkeypatch
):
    values_are(monkeypatch, on_policy, lambda t: 100 + t)
    on_policy.train(small(on_policy, env="Countdown-v0", total_steps=500))
    for rollout, last_value, *_ in captured:
        t = torch.where(rollout.done[-1].bool(), 0, rollout.obs[-1, :, 0] + 1)
        assert torch.equal(last_value, 100 + t)
    assert len(captured) == 4


@pytest.mark.parametrize("on_policy", ["reinforce_bn"], indirect=True)
def test_reinforce_learns_from_first_episodes_only(on_policy, small, captured):
    """Four environments side by side, whose episodes last 2, 3, 4 and 5 steps."""
    Ragged.made = 0
    args = small(on_policy, env="Ragged-v0", total_steps=40, gamma=1.0)
    on_policy.train(args)
    for _, _, batch in captured:
        assert sorted(batch.obs[:, 0].tolist()) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4]
        assert batch.returns.max() == 2 + 3 + 4 + 5 + 6
    returns = [value for _, value in scalars(args.run_dir, "charts/episodic_return")]
    assert returns == [(5 + 9 + 14 + 20) / 4] * len(captured)


def test_evaluation_sums_one_episode_of_each_environment(on_policy, small):
    Ragged.made = 0
    args = small(on_policy, env="Ragged-v0")
    envs = [on_policy.make_env(args) for _ in range(4)]
    agent = on_policy.make_agent(envs[0], args, "cpu")
    assert on_policy.evaluate(agent, envs, args)["eval/return"] == (5 + 9 + 14 + 20) / 4
    assert len({env.unwrapped.np_random_seed for env in envs}) == 4


def brute_force(reward, done, value, gamma, lam):
    """Return for each step the weighted sum of TD errors until its episode ends."""
    expected = np.zeros_like(reward)
    for t, n in itertools.product(*map(range, reward.shape)):
        for k in range(t, len(reward)):
            after = 0 if done[k, n] else gamma * value[k + 1, n]
            expected[t, n] += (gamma * lam) ** (k - t) * (reward[k, n] + after - value[k, n])
            if done[k, n]:
                break
    return expected


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.7), (0.5, 0.0), (0.8, 1.0), (1.0, 1.0)])
def test_advantages_and_returns_against_brute_force(gamma, lam):
    rng = np.random.default_rng(0)
    reward, value, done = rng.normal(size=(12, 3)), rng.normal(size=(13, 3)), np.zeros((12, 3))
    done[4, 0] = done[7, 0] = done[11, 1] = done[0, 2] = 1
    inputs = (torch.as_tensor(x) for x in (reward, value, done))
    expected = brute_force(reward, done, value, gamma, lam)
    np.testing.assert_allclose(ppo_bn.gae(*inputs, gamma, lam), expected, atol=1e-12)
    found = reinforce_bn.reward_to_go(torch.as_tensor(reward), torch.as_tensor(done), gamma)
    expected = brute_force(reward, done, 0 * value, gamma, 1.0)  # TD errors are then rewards
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_rows_of_a_batch_belong_together():
    """Three steps of two environments, where an observation says whose it is: 10 t + n."""
    n, done = 10.0 * torch.arange(3).unsqueeze(1) + torch.arange(2), torch.tensor([[0.0, 1.0]] * 3)
    reward, value = torch.randn(3, 2), torch.randn(4, 2)
    rollout = ppo_bn.Rollout(n.unsqueeze(2), n, n, value[:3], reward, done)
    batch = ppo_bn.make_batch(rollout, value[3], ppo_bn.Args(gamma=0.5, gae_lambda=0.7))
    for x in (batch.obs.flatten(), batch.action, batch.log_prob):
        assert x.tolist() == [0, 1, 10, 11, 20, 21]
    arrays = (x.double().numpy() for x in (reward, done, value))
    expected = torch.as_tensor(brute_force(*arrays, 0.5, 0.7)).float()
    torch.testing.assert_close(batch.advantage, expected.flatten())
    torch.testing.assert_close(batch.returns, (expected + value[:3]).flatten())
    playing = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    rollout = reinforce_bn.Rollout(n.unsqueeze(2), n, value[:3], reward, done, playing)
    batch = reinforce_bn.make_batch(rollout, reinforce_bn.Args(gamma=0.0))
    assert batch.obs.flatten().tolist() == batch.action.tolist() == [0, 1, 10, 20]
    for found, whole in ((batch.returns, reward), (batch.advantage, reward - value[:3])):
        assert torch.equal(found, whole[playing.bool()])


# ------------------------------------------------------------------------- Losses and updates
def test_what_ppo_descends(small, monkeypatch):
    """The gradient step gets policy loss + value_coef critic loss - entropy_coef entropy."""
    args = small(ppo_bn, minibatches=1, epochs=1, entropy_coef=0.3, value_coef=0.1)
    agent, found = make_agent(ppo_bn, args), []
    monkeypatch.setattr(ppo_bn, "gradient_step", lambda *inputs: found.append(inputs))
    obs, action = torch.randn(9, 4), torch.randint(2, (9,))
    policy, advantage, returns = agent.actor(obs), torch.randn(9), torch.randn(9)
    log_prob = policy.log_prob(action)
    batch = ppo_bn.Batch(obs, action, log_prob.detach() - 0.1, advantage, returns)
    ppo_bn.update(agent, batch, np.random.default_rng(0), args)
    a, p = (advantage - advantage.mean()) / advantage.std(), policy.probs
    value, entropy = ((agent.critic(obs) - returns) ** 2).mean(), -(p * p.log()).sum(1).mean()
    expected = -((log_prob - batch.log_prob).exp() * a).mean()  # 1.1 is within the clip
    expected = expected + args.value_coef * value - args.entropy_coef * entropy
    ((optimizer, loss, longest),) = found
    assert optimizer is agent.optimizer and longest == args.max_grad_norm == 0.5
    same_gradient(loss, expected, [*agent.actor.parameters(), *agent.critic.parameters()])


def test_what_reinforce_descends(small, monkeypatch):
    args = small(reinforce_bn, critic_steps=2, entropy_coef=0.3, max_grad_norm=0.7)
    agent, found = make_agent(reinforce_bn, args), []
    monkeypatch.setattr(reinforce_bn, "gradient_step", lambda *inputs: found.append(inputs))
    obs, action = torch.randn(9, 4), torch.randint(2, (9,))
    advantage, returns = torch.randn(9), torch.randn(9)
    reinforce_bn.update(agent, reinforce_bn.Batch(obs, action, advantage, returns), args)
    policy, a = agent.actor(obs), (advantage - advantage.mean()) / advantage.std()
    entropy = -(policy.probs * policy.probs.log()).sum(1).mean()
    (actor, loss, _), *critics = found
    assert actor is agent.actor_optimizer and [longest for *_, longest in found] == [0.7] * 3
    expected = -(policy.log_prob(action) * a).mean() - 0.3 * entropy
    same_gradient(loss, expected, agent.actor.parameters())
    value = ((agent.critic(obs) - returns) ** 2).mean()  # fitted to returns, not to advantages
    assert [x is agent.critic_optimizer for x, *_ in critics] == [True, True]
    same_gradient(critics[0][1], value, agent.critic.parameters())
    assert reinforce_bn.policy_loss(torch.tensor([-2.0]), torch.tensor([3.0])) == 6  # one sample


def test_clipped_loss_by_hand():
    """With clip 0.2: ratio 1.5 and A > 0 counts as 1.2, without gradient; A < 0 as 1.5."""
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    a = torch.tensor([1.0, -1.0, 1.0, -1.0])  # mean 0, so standardizing divides by their std only
    loss, std = ppo_bn.policy_loss(log_ratio, a, ppo_bn.Args(clip=0.2)), a.std().item()
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4 / std, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]) / 4 / std)


def test_the_first_policy(on_policy, small):
    """Torch's Normal agrees that the policy is N(nearly 0, 0.5)."""
    agent, obs = make_agent(on_policy, small(on_policy, env="Pendulum-v1")), torch.randn(99, 3)
    policy, mean = agent.actor(obs), agent.actor.net(obs)
    assert policy.mean.abs().max() < 0.1
    weight = agent.actor.net[0].weight.detach()  # orthogonal, of gain sqrt(2)
    torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(3))
    action = policy.sample()
    expected = torch.distributions.Normal(mean, 0.5).log_prob(action).sum(1)
    torch.testing.assert_close(policy.log_prob(action), expected)


def test_the_learning_rate_falls_to_zero_linearly(on_policy, small, monkeypatch):
    rates, update = [], on_policy.update
    rate = {"learning_rate": 0.1} if on_policy is ppo_bn else {"actor_lr": 0.1, "critic_lr": 0.2}

    def spy(agent, *inputs):
        groups = [x.param_groups[0] for name, x in vars(agent).items() if "optimizer" in name]
        rates.append([group["lr"] for group in groups])
        assert all(group["eps"] == 1e-5 for group in groups)
        return update(agent, *inputs)

    monkeypatch.setattr(on_policy, "update", spy)
    args = small(on_policy, **rate)
    on_policy.train(args)
    ends = np.array([step for step, _ in scalars(args.run_dir, "losses/policy")])
    expected = 0.1 * (1 - np.array([0, *ends[:-1]]) / 400)  # of a rollout's first step
    np.testing.assert_allclose([actor for actor, *_ in rates], expected)
    assert len(rates) > 2 and all(critic == [0.2] for _, *critic in rates if critic)


@pytest.mark.parametrize("shift, epochs", [(-0.01, 1), (0.01, 5), (None, 5)])
def test_minibatches_cover_the_rollout_until_the_mean_divergence_ends_it(
    small, shift, epochs, monkeypatch
):
    """Asked is the mean of r - 1 - log r over all ratios r, not that of the last minibatch."""
    log_ratio, seen, policy_loss = torch.linspace(-1, 2, 32), [], ppo_bn.policy_loss
    kl = (log_ratio.exp() - 1 - log_ratio).mean().item()
    options = {"target_kl": 0.0 if shift is None else kl + shift, "learning_rate": 0.0}
    args = small(ppo_bn, minibatches=4, epochs=5, **options)
    monkeypatch.setattr(
        ppo_bn, "policy_loss", lambda *inputs: seen.append(inputs[1]) or policy_loss(*inputs)
    )
    agent, obs, action = make_agent(ppo_bn, args), torch.randn(32, 4), torch.randint(2, (32,))
    log_prob = agent.actor(obs).log_prob(action).detach() - log_ratio
    batch = ppo_bn.Batch(obs, action, log_prob, torch.arange(32.0), torch.randn(32))
    losses, taken = ppo_bn.update(agent, batch, np.random.default_rng(0), args)
    assert taken == 4 * epochs and losses["losses/kl"].item() == pytest.approx(kl, rel=1e-5)
    assert [len(x) for x in seen] == [8] * taken
    orders = torch.cat(seen).reshape(epochs, 32)
    assert all(torch.equal(order.sort()[0], batch.advantage) for order in orders)
    assert len(orders.unique(dim=0)) == epochs


# ------------------------------------------------------------------- Observations and rewards
def test_reward_norm_scales_what_is_learnt_but_no_bootstrap_and_no_report(
    on_policy, small, captured, monkeypatch
):
    """Also where a checkpoint of PPO cuts an episode, discounted sums begin with their episode."""
    begun, explore, value = [], on_policy.explore, 123.0

    def spy(agent, obs, args):
        begun.append(obs[:, 0] == 0)
        assert not agent.reward_scale.sums[begun[-1]].any()
        assert agent.reward_scale.sums[~begun[-1]].all()
        return explore(agent, obs, args)

    monkeypatch.setattr(on_policy, "explore", spy)
    values_are(monkeypatch, on_policy, lambda t: value + 0 * t)
    options = {"env": "RareDeath-v0", "total_steps": 400, "save_every": 100, "gamma": 0.5}
    args = small(on_policy, reward_norm=True, **options)
    on_policy.train(args)
    sums, seen = np.zeros(4), []
    for rollout, *_ in captured:
        for t, reward in zip(rollout.obs[..., 0].numpy(), rollout.reward, strict=True):
            sums = 2 + t + 0.5 * np.where(t > 0, sums, 0)
            seen.extend(sums)
            scaled = (2 + t) / np.maximum(np.std(seen, ddof=1), 1e-8)
            expected = scaled.clip(max=10) + 0.5 * value * (t == 7)  # a time-out
            np.testing.assert_allclose(reward, expected, rtol=1e-5)
    assert 40 < np.sum(begun) < 100
    returns = [value for _, value in scalars(args.run_dir, "charts/episodic_return")]
    assert all(20 <= value <= 44 for value in returns)  # 2 + ... + 6 and 2 + ... + 9
    count = sum(rollout.reward.numel() for rollout, *_ in captured)
    assert checkpoint(args.run_dir)["agent"]["reward_scale"]["count"] == count


# ------------------------------------------------------------------------- Modes of batch norm
@pytest.mark.parametrize("rollout", ["eval", "train"])
@pytest.mark.parametrize("update", ["eval", "train"])
def test_every_pass_has_its_mode(on_policy, small, rollout, update):
    args = small(on_policy, norm="batchnorm", bn_rollout=rollout, bn_update=update)
    agent, modes = make_agent(on_policy, args), []
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
    rest = (np.random.default_rng(0), args) if on_policy is ppo_bn else (args,)
    on_policy.update(agent, on_policy.Batch(x, **parts), *rest)
    assert len(modes) > 2 and {m for _, m in modes} == {update == "train"}


FIRST_RATIO = [
    ({}, False),
    ({"norm": "layernorm", "norm_position": ("input", "pre")}, False),
    ({"norm": "zfilter"}, False),
    ({"norm": ("batchrenorm", "zfilter"), "bn_update": "eval"}, False),
    ({"norm": "batchnorm"}, True),
    ({"norm": "batchnorm", "bn_rollout": "train"}, True),
]


@pytest.mark.parametrize("options, differs", FIRST_RATIO, ids=str)
def test_ratio_before_the_first_step(small, options, differs, monkeypatch):
    add_norm = ppo_bn.add_norm

    def with_statistics(net, name, args):
        """As if the running statistics had been learnt, so that eval mode does something."""
        add_norm(net, name, args)
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2.0)

    monkeypatch.setattr(ppo_bn, "add_norm", with_statistics)
    args = small(ppo_bn, total_steps=600, **options)
    ppo_bn.train(args)
    ratios = [value for _, value in scalars(args.run_dir, "norm/first_ratio")]
    assert len(ratios) >= 3
    assert (max(ratios[1:]) > 1e-3) == differs and (max(ratios) < 1e-5) == (not differs), ratios


def test_momentum_is_a_bystander(on_policy, small):
    """Rollout and update in train mode: momentum changes no bit of learning, only a later eval."""
    runs = []
    for momentum in (0.001, 0.9):
        options = {"bn_rollout": "train", "bn_momentum": momentum, "eval_every": 200}
        args = small(on_policy, norm="batchnorm", total_steps=1500, eval_episodes=4, **options)
        result = on_policy.train(args)
        curves = [scalars(args.run_dir, x) for x in ("charts/episodic_return", "losses/policy")]
        runs.append((curves, checkpoint(args.run_dir)["agent"]["actor"], result["eval"]))
    (curves, weights, final), (curves2, weights2, final2) = runs
    assert curves == curves2 and len(curves[1]) > 3
    for key, value in weights.items():
        assert torch.equal(value, weights2[key]) == ("running" not in key), key
    assert final[-1][1] != final2[-1][1]


def test_three_ways_to_evaluate(small, monkeypatch):
    """REINFORCE reports the return in eval mode, in train mode and recalibrated, which stays."""
    options = {"bn_rollout": "train", "bn_recalibrate": 400, "bn_momentum": 0.05}
    options |= {"norm_position": ("input",), "total_steps": 100, "eval_episodes": 3}
    args = small(reinforce_bn, norm="batchnorm", **options)
    seen, batches = [], []
    evaluate, update = reinforce_bn.evaluate, reinforce_bn.update

    def spy(agent, envs, args):
        found, mean = evaluate(agent, envs, args), agent.actor.net[0].running_mean.clone()
        seen.append((agent.actor.training, len(envs), found["eval/return"], mean))
        return found

    monkeypatch.setattr(reinforce_bn, "evaluate", spy)
    monkeypatch.setattr(
        reinforce_bn, "update", lambda *inputs: batches.append(inputs[1].obs) or update(*inputs)
    )
    result = reinforce_bn.train(args)
    modes, sizes, returns, means = zip(*seen, strict=True)
    assert modes == (False, True, False, False) and sizes == (4, 4, 4, 3)
    assert torch.equal(means[2], means[3])
    assert not torch.allclose(means[0], means[2], atol=1e-3)
    torch.testing.assert_close(means[2], batches[-1].mean(0), rtol=1e-3, atol=1e-3)
    for mode, value in zip(("eval", "train", "recalibrated"), returns, strict=False):
        found = scalars(args.run_dir, f"norm/return_{mode}_mode")[-1][1]
        assert found == pytest.approx(value)
    saved = checkpoint(args.run_dir)["agent"]["actor"]["net.0.running_mean"]
    assert torch.equal(saved, means[3]) and result["eval"][-1][1] == returns[-1]


def test_evaluation_in_train_mode_uses_the_batch_and_moves_nothing(small, monkeypatch):
    options = {"env": "Countdown-v0", "norm_position": ("input",)}
    args, found = small(reinforce_bn, norm="batchnorm", **options), []
    agent = make_agent(reinforce_bn, args)
    obs = np.random.default_rng(0).normal(3, 5, size=(6, 3)).astype(np.float32)

    def spy(agent, *_):
        found.append(reinforce_bn.act(agent, obs))
        return {"eval/return": 0.0}

    monkeypatch.setattr(reinforce_bn, "evaluate", spy)
    reinforce_bn.returns_by_mode(agent, args, None)
    standardized = (obs - obs.mean(0)) / np.sqrt(obs.var(0) + 1e-5)
    expected = agent.actor.net[1:](torch.as_tensor(standardized)).detach()
    np.testing.assert_allclose(found[1], expected, rtol=1e-4, atol=1e-6)
    assert agent.actor.net[0].running_mean.eq(0).all()
    assert not np.allclose(found[1], found[0])
    np.testing.assert_equal(found[0], reinforce_bn.act(agent, obs))


# ------------------------------------------------------------------------- Networks, whole runs
LINEAR = {"network": "linear", "hidden_sizes": (64,), "norm_position": ("input",)}
CNN = {"network": "cnn", "env": "Picture-v0", "norm_position": ("input", "post")}
LAYERS = [  # L: a linear layer, C: a convolution, F: flattens, A: activates, n: normalizes
    ({"norm": "batchnorm", "norm_net": "critic"}, "LALAL"),
    ({"norm": "batchnorm"}, "LAnLAnL"),
    ({"norm": ("layernorm", "zfilter"), "norm_position": ("input", "pre")}, "nLnALnAL"),
    ({"norm": "batchrenorm", "bn_momentum": 0.03, "bn_warmup": 7} | LINEAR, "nL"),
    ({"norm": "batchnorm", "bn_momentum": 0.03} | CNN, "nCAnFLAnLAnL"),
]


@pytest.mark.parametrize("options, expected", LAYERS, ids=str)
def test_where_layers_stand(on_policy, small, options, expected):
    if "network" in options and on_policy is ppo_bn:
        pytest.skip("PPO has one kind of network")
    args = small(on_policy, **options)
    net = make_agent(on_policy, args).actor.net
    assert all(getattr(x, "momentum", args.bn_momentum) == args.bn_momentum for x in net)
    assert all(getattr(x, "warmup", args.bn_warmup) == args.bn_warmup for x in net)
    names = {nn.Linear: "L", nn.Conv2d: "C", nn.Flatten: "F", nn.ReLU: "A", nn.Tanh: "A"}
    assert "".join(names.get(type(layer), "n") for layer in net) == expected
    if "cnn" in options.values():  # one mean for a channel
        out = net[0].train()(torch.randn(8, 2, 10, 10)).mean((0, 2, 3))
        torch.testing.assert_close(out, torch.zeros(2), atol=1e-5, rtol=0)


KINDS = [
    {},
    {"norm": ("batchnorm", "zfilter"), "env": "Countdown-v0"},
    {"norm": "batchrenorm", "bn_warmup": 10, "bn_rollout": "train", "norm_net": "actor"},
    {"norm": "layernorm", "norm_position": ("input", "pre", "post"), "norm_net": "critic"},
    {"norm": "zfilter", "reward_norm": True, "entropy_coef": 0.01},
    LINEAR | {"norm": "batchnorm"},
    CNN | {"norm": "layernorm"},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_kind_of_run_learns_something(on_policy, small, options):
    if "network" in options and on_policy is ppo_bn:
        pytest.skip("PPO has one kind of network")
    args = small(on_policy, **options)
    result = on_policy.train(args)
    assert result["updates"] >= 8 and result["steps"] >= 400 and not result["diverged"]
    assert [e[0] for e in result["eval"]] == [result["steps"]]
    torch.manual_seed(np.random.SeedSequence(args.seed).generate_state(1)[0].item())
    start = on_policy.make_agent(on_policy.make_env(args), args, "cpu")
    end = checkpoint(args.run_dir)
    for name in ("actor", "critic"):
        for key, value in getattr(start, name).named_parameters():
            assert not torch.equal(value, end["agent"][name][key]), (name, key)
    expected = {"losses/critic", "losses/policy", "losses/entropy", "eval/return"}
    expected |= {"charts/episodic_return"}
    assert expected <= all_scalars(args.run_dir).keys()


def test_cartpole_is_learnt(on_policy, small):
    """Chance gets about 20."""
    args = small(on_policy, total_steps=30_000, eval_episodes=8, hidden_sizes=(64,), num_envs=8)
    if on_policy is ppo_bn:
        args.learning_rate, args.epochs = 3e-3, 4
    assert on_policy.train(args)["eval"][-1][1] > 100
