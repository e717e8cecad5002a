"""sac_bn.py: what differs from DDPG, against distributions of torch and values worked by hand."""

import copy
import re
import shlex

import numpy as np
import torch
import torch.nn as nn
import tyro
from conftest import all_scalars, checkpoint, same
from test_ddpg import fit_critic, policy_gradient
from test_ddpg import make_agent as make

import sac_bn


def make_agent(**options):
    return make(script=sac_bn, **options)


def distribution(actor, obs, low=-20.0, high=2.0):
    """Return the policy as torch builds it from parts."""
    mean, log_std = actor.net(obs).chunk(2, 1)
    normal = torch.distributions.Normal(mean, log_std.clamp(low, high).exp())
    squash = torch.distributions.TanhTransform(cache_size=1)
    squashed = torch.distributions.TransformedDistribution(normal, squash)
    return torch.distributions.Independent(squashed, 1)


def test_log_probability_is_that_of_torch():
    agent, batch, _ = make_agent(env="HalfCheetah-v4")  # six actions
    torch.manual_seed(5)
    action, log_prob = agent.actor.sample(batch.obs)
    torch.manual_seed(5)
    policy = distribution(agent.actor, batch.obs)
    expected = policy.rsample()
    torch.testing.assert_close(action, expected)
    want = policy.log_prob(expected)
    torch.testing.assert_close(log_prob, want, rtol=1e-4, atol=1e-4)
    wants, gots = (
        torch.autograd.grad(x.sum(), agent.actor.net[0].weight) for x in (want, log_prob)
    )
    torch.testing.assert_close(gots, wants, rtol=1e-3, atol=1e-3)


def test_log_probability_stays_finite_at_the_bounds_and_log_std_is_bounded():
    for bias, bound in ((-99.0, -20.0), (99.0, 2.0)):
        agent, batch, _ = make_agent()
        nn.init.zeros_(agent.actor.net[-1].weight)
        for mean in (0.3, 200.0):
            agent.actor.net[-1].bias.data = torch.tensor([mean, bias])
            torch.manual_seed(1)
            action, log_prob = agent.actor.sample(batch.obs)
            torch.manual_seed(1)
            u = mean + torch.randn(64, 1) * np.exp(bound)
            torch.testing.assert_close(action, torch.tanh(u))
            assert log_prob.isfinite().all()
        assert (action == 1).all()


def test_losses_by_hand():
    agent, batch, args = make_agent(gamma=0.9, target_entropy=-0.7)
    agent.log_alpha.data.fill_(np.log(0.3))
    for p in agent.critic_target.parameters():
        p.data += 0.1 * torch.randn_like(p)

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
    assert values.shape == (64, 2) and not torch.allclose(values[:, 0], values[:, 1])

    torch.manual_seed(8)
    loss, log_prob = sac_bn.actor_loss(agent, batch, args)
    torch.manual_seed(8)
    a, expected_log_prob = agent.actor.sample(batch.obs)
    torch.testing.assert_close(log_prob, expected_log_prob)
    expected = (0.3 * log_prob - torch.minimum(*q(agent.critic, batch.obs, a))).mean()
    torch.testing.assert_close(loss, expected)

    loss = sac_bn.alpha_loss(agent, log_prob)
    np.testing.assert_allclose(loss.item(), -0.3 * (log_prob.mean().item() - 0.7), rtol=1e-5)
    gradient = torch.autograd.grad(loss, agent.log_alpha)[0]  # log alpha is what is learnt
    np.testing.assert_allclose(gradient, loss.item(), rtol=1e-5)


def test_evaluation_takes_the_median_and_exploration_a_sample(monkeypatch, small):
    agent, batch, args = make_agent(eval_episodes=1)
    obs, seen = batch.obs[0].numpy(), []
    median = torch.tanh(agent.actor.net(batch.obs)[0, :1]).detach()
    np.testing.assert_allclose(sac_bn.act(agent, obs), median, rtol=1e-5)
    act = sac_bn.act
    monkeypatch.setattr(sac_bn, "act", lambda *x, **y: seen.append((x[1:], y)) or act(*x, **y))
    sac_bn.evaluate(agent, sac_bn.make_env(args), args)
    assert len(seen) == 200 and all(len(x) == 1 and not y for x, y in seen)
    monkeypatch.undo()
    drawn = np.array([sac_bn.act(agent, obs, explores=True) for _ in range(2000)])
    want = distribution(agent.actor, batch.obs[:1].expand(20_000, 3)).sample()
    assert abs(drawn.mean() - want.mean().item()) < 0.05
    assert abs(drawn.std() - want.std().item()) < 0.05
    monkeypatch.setattr(sac_bn, "update", lambda *_: {})  # the policy stays as it begins
    args = small(sac_bn, total_steps=600)
    sac_bn.train(args)
    acted = checkpoint(args.run_dir)["agent"]["buffer"]["data"][1][100:600]
    assert abs(acted.std() - want.std()) < 0.1 < want.std()


def test_policy_delay_and_beta1():
    agent, batch, args = make_agent(policy_delay=3, adam_beta1=0.5)
    assert agent.target_entropy == -1.0 and agent.log_alpha.item() == 0
    for name, beta1 in (("actor", 0.5), ("critic", 0.5), ("alpha", 0.9)):
        assert getattr(agent, f"{name}_optimizer").param_groups[0]["betas"] == (beta1, 0.999)
    for number in range(1, 7):
        before = copy.deepcopy(agent)
        losses = sac_bn.update(agent, batch, number, args)
        for name in ("actor", "temperature", "critic", "critic_target"):
            is_still = same(*(dict(getattr(x, name).state_dict()) for x in (agent, before)))
            assert is_still == (number % 3 != 0 and name in ("actor", "temperature"))
        assert {f"losses/{x}" in losses for x in ("actor", "alpha", "entropy")} == {number % 3 == 0}


def test_what_is_logged_is_of_one_update_also_if_the_actor_is_delayed(small):
    """The 42nd is the first after step 1000 that moves the actor, the 50th and last does not."""
    args = small(sac_bn, total_steps=1010, learning_starts=960, policy_delay=3)
    sac_bn.train(args)
    found = all_scalars(args.run_dir)
    tags = "losses/critic", "losses/actor", "norm/actor_grad"
    steps = [[step for step, _ in found[tag]] for tag in tags]
    assert steps == [[1002, 1010], [1002], [1002]]


def test_in_train_mode_each_mean_q_is_constant_but_not_the_mean_minimum():
    """SAC's exact reason (claim B7): what survives is the choice of the smaller critic."""
    agent, batch, args = make_agent(norm="batchnorm", n=256)
    fit_critic(agent, batch)
    means, minima = [], []
    for action in (-1.0, 0.0, 0.75):
        q = agent.critic.train()(batch.obs, torch.full((256, 1), action)).detach()
        means.append(q.mean(0))
        minima.append(q.amin(1).mean())
    assert (torch.stack(means).std(0) < 1e-4).all() and torch.stack(minima).std() > 1e-3
    agent.log_alpha.data.fill_(-50.0)  # without the entropy's own gradient
    norms = {}
    for args.bn_policy_critic in ("train", "eval"):
        torch.manual_seed(3)
        norms[args.bn_policy_critic] = policy_gradient(agent, batch, args, sac_bn).norm()
    assert 1e-4 < norms["train"] / norms["eval"] < 0.5


def test_q_bias_by_brute_force():
    """The return that follows an action holds the entropy of all later ones."""
    agent, _, args = make_agent(gamma=0.5, norm="zfilter", reward_norm=True)
    agent.obs_stat.push(np.random.default_rng(1).normal(2, 3, size=(50, 3)))
    agent.reward_scale.push([0.0, 40.0, 80.0])  # of deviation 40
    agent.log_alpha.data.fill_(np.log(7.0))
    rng = np.random.default_rng(0)
    obs, action, reward = rng.normal(size=(30, 3)), rng.normal(size=(30, 1)), rng.normal(size=30)
    inputs = [torch.tensor(x).float() for x in (agent.obs_filter(obs), action)]
    q = agent.critic(*inputs).detach().numpy().mean(1)
    episode = list(zip(obs, action, 100 * 40 * reward, strict=True))
    reward = (100 * reward).clip(-10, 10)
    for terminated in (True, False):
        torch.manual_seed(11)
        log_prob, expected = agent.actor.sample(inputs[0])[1].detach().numpy(), []
        for t in range(30 if terminated else 30 - 6):  # 0.5 ** 7 < 0.01 < 0.5 ** 6
            g = sum(0.5**k * r for k, r in enumerate(reward[t:]))
            g -= 7 * sum(0.5**k * log_prob[t + k] for k in range(1, 30 - t))
            expected.append((q[t] - g) / max(abs(g), 10 / 40))
        torch.manual_seed(11)
        found = sac_bn.q_errors(agent, episode, terminated, args)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_each_rung_of_the_docstring_is_accepted_and_one_branch_ends_at_crossq():
    ladder = sac_bn.__doc__.split("python sac_bn.py --env Ant-v4 --norm batchnorm")[1]
    options, after, ends = ["--norm", "batchnorm"], {}, []
    for line in ladder.split("python sac_bn.py --resume")[0].splitlines()[1:]:
        if branch := re.search("is a branch after (--[a-z-]+)", line):
            ends.append(options)
            options = after[branch[1]]
        else:
            options = options + shlex.split(line, comments=True)
            after[options[-1]] = options
            args = tyro.cli(sac_bn.Args, args=options)
    assert len(ends) == 1 and tyro.cli(sac_bn.Args, args=ends[0]).bn_joint
    assert (args.norm, args.norm_position) == (("batchrenorm",), ("input", "post"))
    assert args.bn_joint and args.bn_policy_critic == "eval" and not args.target_network
    assert (args.adam_beta1, args.policy_delay, args.bn_momentum) == (0.5, 3, 0.01)
    assert args.actor_lr == args.critic_lr == args.alpha_lr == 1e-3 and args.bn_warmup == 100_000
    args.env = "Pendulum-v1"
    agent = sac_bn.make_agent(sac_bn.make_env(args), args, "cpu")
    for net in (*agent.critic.nets, agent.actor.net):
        names = " ".join(type(m).__name__ for m in net)
        assert names == "BatchRenorm" + 2 * " Linear ReLU BatchRenorm" + " Linear"
    assert agent.critic.nets[0][1].out_features == agent.critic.nets[1][-1].in_features == 2048
