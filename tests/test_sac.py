"""sac_bn.py: what differs from DDPG, against distributions of torch and values worked by hand."""

import copy
import re
import shlex

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import tyro
from conftest import same, tags
from test_ddpg import fit_critic, grad_norm, modes

import sac_bn
from ddpg_bn import Batch


def make_agent(n=64, env="Pendulum-v1", **options):
    """Return an agent, a batch of n random transitions, and the options."""
    args = sac_bn.Args(env=env, hidden_sizes=(16, 16), **options)
    torch.manual_seed(0)
    env = gym.make(args.env)
    agent = sac_bn.make_agent(env, args, "cpu")
    g, obs_dim = torch.Generator().manual_seed(1), env.observation_space.shape[0]
    obs = torch.randn(n, obs_dim, generator=g)
    next_obs = torch.randn(n, obs_dim, generator=g) + 0.5
    action = torch.rand(n, *env.action_space.shape, generator=g) * 4 - 2
    reward, terminated = torch.randn(n, generator=g), (torch.rand(n, generator=g) < 0.3).float()
    return agent, Batch(obs, action, reward, next_obs, terminated), args


def distribution(actor, obs, low=-20.0, high=2.0):
    """Return the policy as torch builds it from parts."""
    mean, log_std = actor.net(obs).chunk(2, 1)
    normal = torch.distributions.Normal(mean, log_std.clamp(low, high).exp())
    transforms = [
        torch.distributions.TanhTransform(cache_size=1),
        torch.distributions.AffineTransform(actor.action_bias, actor.action_scale),
    ]
    squashed = torch.distributions.TransformedDistribution(normal, transforms)
    return torch.distributions.Independent(squashed, 1)


@pytest.mark.parametrize("env", ["Pendulum-v1", "Countdown-v0"])  # bounds (-2, 2) and (-1, 3)
def test_log_probability_is_that_of_torch(env):
    agent, batch, _ = make_agent(env=env)
    torch.manual_seed(5)
    action, log_prob = agent.actor.sample(batch.obs)
    torch.manual_seed(5)
    policy = distribution(agent.actor, batch.obs)
    expected = policy.rsample()
    torch.testing.assert_close(action, expected)
    torch.testing.assert_close(log_prob, policy.log_prob(expected), rtol=1e-4, atol=1e-4)
    want = torch.autograd.grad(policy.log_prob(expected).sum(), agent.actor.net[0].weight)
    got = torch.autograd.grad(log_prob.sum(), agent.actor.net[0].weight)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_log_probability_integrates_to_one_in_units_of_the_action():
    agent, _, _ = make_agent(env="Countdown-v0")
    a = torch.linspace(-1 + 1e-4, 3 - 1e-4, 200_001).unsqueeze(1)
    policy = distribution(agent.actor, torch.zeros(1, 3))
    assert abs(torch.trapezoid(policy.log_prob(a).exp(), a[:, 0]) - 1) < 1e-3


def test_log_probability_stays_finite_at_the_bounds():
    agent, batch, _ = make_agent()
    with torch.no_grad():
        agent.actor.net[-1].bias[0] = 200.0
    action, log_prob = agent.actor.sample(batch.obs)
    assert (action == 2).all() and log_prob.isfinite().all()


def test_log_std_is_bounded():
    for bias, bound in ((-99.0, -3.0), (99.0, 1.0)):
        agent, batch, _ = make_agent(log_std_min=-3.0, log_std_max=1.0)
        with torch.no_grad():
            agent.actor.net[-1].bias[1] = bias
            agent.actor.net[-1].weight.zero_()
        torch.manual_seed(1)
        action, log_prob = agent.actor.sample(batch.obs)
        torch.manual_seed(1)
        u = agent.actor.net[-1].bias[0] + torch.randn(64, 1) * np.exp(bound)
        torch.testing.assert_close(action, 2 * torch.tanh(u))
        assert log_prob.isfinite().all()


def test_losses_by_hand():
    agent, batch, args = make_agent(gamma=0.9, target_entropy=-0.7)
    with torch.no_grad():
        agent.temperature.log_alpha.fill_(np.log(0.3))
        for p in agent.critic_target.parameters():
            p += 0.1 * torch.randn_like(p)

    def q(critic, obs, action):
        x = torch.cat([obs, action], 1)
        return [net(x)[:, 0] for net in critic.nets]

    torch.manual_seed(7)
    loss, values = sac_bn.critic_loss(agent, batch, args)
    torch.manual_seed(7)
    a, log_prob = agent.actor.sample(batch.next_obs)
    q_next = torch.minimum(*q(agent.critic_target, batch.next_obs, a)) - 0.3 * log_prob
    y = batch.reward + 0.9 * torch.where(batch.terminated == 1, torch.zeros(()), q_next)
    expected = sum(((x - y) ** 2).mean() for x in q(agent.critic, batch.obs, batch.action))
    torch.testing.assert_close(loss, expected)
    assert values.shape == (64, 2)

    torch.manual_seed(8)
    loss, log_prob = sac_bn.actor_loss(agent, batch, args)
    torch.manual_seed(8)
    a, expected_log_prob = agent.actor.sample(batch.obs)
    torch.testing.assert_close(log_prob, expected_log_prob)
    expected = (0.3 * log_prob - torch.minimum(*q(agent.critic, batch.obs, a))).mean()
    torch.testing.assert_close(loss, expected)

    loss = sac_bn.alpha_loss(agent, log_prob)
    np.testing.assert_allclose(loss.item(), -0.3 * (log_prob.mean().item() - 0.7), rtol=1e-5)
    gradient = torch.autograd.grad(loss, agent.temperature.log_alpha)[0]
    np.testing.assert_allclose(gradient, -0.3 * (log_prob.mean().item() - 0.7), rtol=1e-5)


def test_temperature_moves_entropy_to_its_target():
    agent, _, _ = make_agent()
    assert agent.target_entropy == -1.0 and agent.log_alpha.exp().item() == 1.0
    assert make_agent(target_entropy=-3.5)[0].target_entropy == -3.5
    for log_prob, direction in ((3.0, 1), (-3.0, -1)):  # too little entropy makes it dearer
        before = agent.log_alpha.exp().item()
        loss = sac_bn.alpha_loss(agent, torch.full((8,), log_prob))
        sac_bn.gradient_step(agent.alpha_optimizer, loss, 0.0)
        assert (agent.log_alpha.exp().item() - before) * direction > 0


def test_evaluation_takes_the_mean_and_exploration_a_sample():
    agent, batch, _ = make_agent()
    obs = batch.obs[0].numpy()
    mean = agent.actor.net(batch.obs)[0, 0]
    expected = 2 * torch.tanh(mean).detach().numpy()
    for _ in range(2):
        np.testing.assert_allclose(sac_bn.act(agent, obs), [expected], rtol=1e-5)
    drawn = np.array([sac_bn.explore(agent, obs) for _ in range(2000)])
    want = distribution(agent.actor, batch.obs[:1].expand(20_000, 3)).sample()
    assert abs(drawn.mean() - want.mean().item()) < 0.1
    assert abs(drawn.std() - want.std().item()) < 0.1


def test_policy_delay_and_beta1():
    agent, batch, args = make_agent(policy_delay=3, adam_beta1=0.5)
    assert agent.actor_optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    assert agent.critic_optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    assert agent.alpha_optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    for number in range(1, 7):
        before = copy.deepcopy(agent)
        losses = sac_bn.update(agent, batch, number, args)
        for name in ("actor", "temperature"):
            still = same(getattr(agent, name).state_dict(), getattr(before, name).state_dict())
            assert still == (number % 3 != 0)
        assert ("actor" in losses) == ("alpha" in losses) == (number % 3 == 0)
        for name in ("critic", "critic_target"):
            assert not same(getattr(agent, name).state_dict(), getattr(before, name).state_dict())


def test_a_report_before_the_first_delayed_update(small):
    args = small(sac_bn, total_steps=1000, learning_starts=999, policy_delay=3)
    assert sac_bn.train(args)["updates"] == 1
    found = tags(args.run_dir)
    assert "losses/critic" in found and not {"losses/actor", "norm/actor_grad"} & found


def test_losses_of_the_actor_are_reported_whenever_it_was_updated(small):
    args = small(sac_bn, total_steps=2000, learning_starts=999, policy_delay=2)  # odd updates
    sac_bn.train(args)
    assert {"losses/actor", "losses/entropy", "losses/alpha"} <= tags(args.run_dir)


def test_critics_differ_and_can_be_wider():
    agent, batch, _ = make_agent(critic_hidden_sizes=(24, 8))
    q = agent.critic(batch.obs, batch.action)
    assert q.shape == (64, 2) and not torch.allclose(q[:, 0], q[:, 1])
    assert [m.out_features for m in agent.critic.nets[0] if isinstance(m, nn.Linear)] == [24, 8, 1]
    assert [m.out_features for m in agent.actor.net if isinstance(m, nn.Linear)] == [16, 16, 2]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "actor eval, critic_target eval, critic train, actor train, critic train"),
        (
            {"bn_policy_critic": "eval"},
            "actor eval, critic_target eval, critic train, actor train, critic eval",
        ),
        (
            {"bn_target": "train"},
            "actor eval, critic_target train, critic train, actor train, critic train",
        ),
        (
            {"bn_joint": True},
            "actor eval, critic train joint, critic_target eval joint, actor train, critic train",
        ),
        (
            {"bn_joint": True, "target_network": False, "bn_policy_critic": "eval"},
            "actor eval, critic train joint, actor train, critic eval",
        ),
    ],
)
@pytest.mark.parametrize("norm", ["batchnorm", "batchrenorm"])
def test_mode_of_every_forward_pass(norm, options, expected, monkeypatch):
    agent, batch, args = make_agent(norm=norm, **options)
    # modules are called through their nets, since sample() is a method of its own
    agent.actor.sample = hooked(agent.actor)
    agent.actor_target = agent.actor
    passes = modes(agent, batch, args, lambda *x: sac_bn.update(x[0], x[1], 1, x[2]))
    words = [
        f"{name} {'train' if training else 'eval'}{' joint' if rows == 128 else ''}"
        for name, training, rows in passes
    ]
    assert ", ".join(words) == expected


def hooked(actor):
    """Return actor.sample such that forward hooks of the actor see it."""
    original = actor.sample

    def sample(obs):
        for hook in actor._forward_pre_hooks.values():
            hook(actor, (obs,))
        return original(obs)

    return sample


@pytest.mark.parametrize("norm", ["batchnorm", "batchrenorm"])
def test_statistics_of_the_target_are_copied(norm):
    agent, batch, args = make_agent(norm=norm)
    for number in range(3):
        sac_bn.update(agent, batch, number, args)
    live, target = agent.critic, agent.critic_target
    assert same(dict(live.named_buffers()), dict(target.named_buffers()))
    assert live.nets[1][2].running_mean.abs().max() > 0
    assert not same(dict(live.named_parameters()), dict(target.named_parameters()))


def test_in_train_mode_each_mean_q_is_constant_but_not_the_mean_minimum():
    """SAC's exact reason (claim B7): what survives is the choice of the smaller critic."""
    agent, batch, args = make_agent(norm="batchnorm", n=256)
    fit_critic(agent, batch)
    means, minima = [], []
    for action in (-2.0, 0.0, 1.5):
        q = agent.critic.train()(batch.obs, torch.full((256, 1), action)).detach()
        means.append(q.mean(0))
        minima.append(q.amin(1).mean())
    assert (torch.stack(means).std(0) < 1e-4).all() and torch.stack(minima).std() > 1e-3

    def policy_gradient(mode):
        args.bn_policy_critic = mode
        torch.manual_seed(3)
        agent.temperature.log_alpha.data.fill_(-50.0)  # without the entropy's own gradient
        return grad_norm(sac_bn.actor_loss(agent, batch, args)[0], agent.actor)

    assert 1e-4 < policy_gradient("train") / policy_gradient("eval") < 0.5


def test_q_bias_by_brute_force():
    agent, _, _ = make_agent(gamma=0.5)
    rng = np.random.default_rng(0)
    played, expected = [], []
    agent.temperature.log_alpha.data.fill_(np.log(7.0))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    for n, terminated in ((30, True), (30, False)):
        obs, action = rng.normal(size=(n, 3)), rng.normal(size=(n, 1))
        reward = 100 * rng.normal(size=n)
        played.append((obs, action, reward, terminated))
        inputs = [torch.tensor(x, dtype=torch.float32) for x in (obs, action)]
        torch.set_rng_state(state)
        log_prob = agent.actor.sample(inputs[0])[1].detach().numpy()
        q = agent.critic(*inputs).detach().numpy().mean(1)
        for t in range(n if terminated else n - 6):
            g = sum(0.5**k * r for k, r in enumerate(reward[t:]))
            g -= 7 * sum(0.5**k * log_prob[t + k] for k in range(1, n - t))
            expected.append((q[t] - g) / max(abs(g), 10))
    torch.set_rng_state(state)
    values = sac_bn.q_bias(agent, played, 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(values["q_bias"], np.mean(expected), rtol=1e-4)
    np.testing.assert_allclose(values["q_bias_std"], np.std(expected), rtol=1e-4)


def test_the_ladder_of_the_docstring_runs(small):
    """Each rung of the docstring parses, and the last is CrossQ as facts about it say."""
    text = sac_bn.__doc__.split("python sac_bn.py --env Ant-v4 --norm batchnorm")[1]
    rungs = [re.split("#", line)[0].strip() for line in text.splitlines()[:6]]
    options = ["--norm", "batchnorm"]
    for rung in rungs:
        options += shlex.split(rung)
        args = tyro.cli(sac_bn.Args, args=options)
        sac_bn.check(args)
        agent = sac_bn.make_agent(gym.make("Pendulum-v1"), args, "cpu")
    assert (args.norm, args.norm_position) == ("batchrenorm", ("input", "post"))
    assert args.bn_joint and args.bn_policy_critic == "eval" and not args.target_network
    assert (args.adam_beta1, args.policy_delay, args.bn_momentum) == (0.5, 3, 0.01)
    assert args.actor_lr == args.critic_lr == args.alpha_lr == 1e-3 and args.bn_warmup == 100_000
    for net in (*agent.critic.nets, agent.actor.net):
        names = " ".join(type(m).__name__ for m in net)
        assert names == "BatchRenorm" + 2 * " Linear ReLU BatchRenorm" + " Linear"
        assert net[0].eps == 1e-3 and (net[0].r_max, net[0].d_max) == (3, 5)
