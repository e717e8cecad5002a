"""ddpg_bn.py: each trap that it could fall into, against something worked out independently."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import checkpoint, same

import ddpg_bn
from ddpg_bn import Batch, ReplayBuffer

BATCH_NORMS = ["batchnorm", "batchrenorm"]


def make_agent(n=64, script=ddpg_bn, env="Pendulum-v1", **options):
    """Return an agent, a batch of n random transitions, and the options."""
    args = script.Args(env=env, hidden_sizes=(16, 16), buffer_size=100, **options)
    torch.manual_seed(0)
    env = script.make_env(args)
    agent = script.make_agent(env, args, "cpu")
    g, dim = torch.Generator().manual_seed(1), env.observation_space.shape[0]
    obs, next_obs = torch.randn(n, dim, generator=g), torch.randn(n, dim, generator=g) + 0.5
    action = torch.rand(n, *env.action_space.shape, generator=g) * 2 - 1
    reward, terminated = torch.randn(n, generator=g), (torch.rand(n, generator=g) < 0.3).float()
    return agent, Batch(obs, action, reward, next_obs, terminated), args


def update(script, agent, batch, args):
    return script.update(agent, batch, *([args] if script is ddpg_bn else [1, args]))


def fit_critic(agent, batch, steps=300):
    """Teach the live critic a smooth function of s and a, so that its gradients mean something."""
    optimizer = torch.optim.Adam(agent.critic.parameters(), 1e-2)
    goal = 10 * torch.sin(batch.obs.sum(1)) - 3 * (2 * batch.action[:, 0] - 1) ** 2
    for _ in range(steps):
        optimizer.zero_grad()
        q = agent.critic.train()(batch.obs, batch.action)
        (q.reshape(len(goal), -1) - goal.unsqueeze(1)).square().mean().backward()
        optimizer.step()


def policy_gradient(agent, batch, args, script=ddpg_bn):
    """Return the gradient of the actor's loss, flat."""
    loss = script.actor_loss(agent, batch, args)
    loss = loss if script is ddpg_bn else loss[0]
    grads = torch.autograd.grad(loss, list(agent.actor.parameters()))
    return torch.cat([g.flatten() for g in grads])


def nets(network):
    """Return the layers of a network: SAC's critic has two, an absent target none."""
    return list(getattr(network, "nets", None) or [network.net]) if network else []


# ---------------------------------------------------------------------- The algorithm, by hand
def test_critic_loss_by_hand():
    agent, batch, args = make_agent(gamma=0.9)
    for p in (*agent.actor_target.parameters(), *agent.critic_target.parameters()):
        p.data += 0.1 * torch.randn_like(p)  # targets differ from the live networks

    def forward(net, *inputs):
        x = np.concatenate(inputs, 1)
        for k in (0, 2, 4):
            x = np.maximum(x, 0) if k else x
            x = x @ net[k].weight.detach().numpy().T + net[k].bias.detach().numpy()
        return x

    obs, action, reward, next_obs, terminated = (x.numpy() for x in batch)
    a = np.tanh(forward(agent.actor_target.net, next_obs))
    q_next = forward(agent.critic_target.net, next_obs, a)[:, 0]
    q = forward(agent.critic.net, obs, action)[:, 0]
    y = reward + 0.9 * np.where(terminated == 1, 0, q_next)
    loss, q_ours = ddpg_bn.critic_loss(agent, batch, args)
    np.testing.assert_allclose(q_ours.detach(), q, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss.item(), ((q - y) ** 2).mean(), rtol=1e-5)
    expected = -forward(agent.critic.net, obs, np.tanh(forward(agent.actor.net, obs))).mean()
    loss = ddpg_bn.actor_loss(agent, batch, args).item()
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


def test_update_is_adam_then_polyak(script, monkeypatch):
    cut, step = [], script.gradient_step
    monkeypatch.setattr(script, "gradient_step", lambda *x: cut.append(x[2]) or step(*x))
    options = {"tau": 0.3, "max_grad_norm": 0.7, "critic_lr": 0.01, "actor_lr": 0.02}
    options |= {"alpha_lr": 0.03} if script is not ddpg_bn else {}
    agent, batch, args = make_agent(script=script, **options)
    old = copy.deepcopy(agent)
    update(script, agent, batch, args)
    assert cut[:2] == [0.7, 0.7]  # of critic and actor
    parts = {"critic": 0.01, "actor": 0.02, "temperature": 0.03}
    for name, lr in ((x, lr) for x, lr in parts.items() if hasattr(agent, x)):
        live, before = (list(getattr(x, name).parameters()) for x in (agent, old))
        for p, old_p in zip(live, before, strict=True):
            moved = (p - old_p).abs()  # the first step of Adam is lr, wherever a gradient is
            assert moved.max() <= 1.001 * lr and moved.max() > 0.9 * lr
        if hasattr(agent, f"{name}_target"):
            pair = (getattr(x, f"{name}_target").parameters() for x in (agent, old))
            for p, t, old_t in zip(live, *pair, strict=True):
                torch.testing.assert_close(t, 0.7 * old_t + 0.3 * p)


def test_exploration_is_noise_around_small_first_actions_within_the_bounds(small, monkeypatch):
    agent, batch, _ = make_agent()
    assert agent.critic(batch.obs, batch.action).abs().max() < 0.2
    nn.init.constant_(agent.actor.net[-1].bias, 0.5)
    assert ddpg_bn.act(agent, batch.obs[0].numpy()) == pytest.approx(np.tanh(0.5), abs=0.01)
    monkeypatch.setattr(ddpg_bn, "update", lambda *_: {})  # the policy stays as it begins
    drawn = {}
    for noise in (0.25, 5.0):
        args = small(ddpg_bn, noise=noise, total_steps=1100, buffer_size=1100)
        ddpg_bn.train(args)
        drawn[noise] = checkpoint(args.run_dir)["agent"]["buffer"]["data"][1][100:]
    assert abs(drawn[0.25].mean()) < 0.03 and abs(drawn[0.25].std() - 0.25) < 0.02
    assert (drawn[5.0].min(), drawn[5.0].max()) == (-1, 1)


def test_action_layer_is_the_papers():
    options = {"norm": "batchnorm", "norm_position": ("input", "pre"), "action_layer": 1}
    agent, _, _ = make_agent(**options)
    parts = agent.actor.net, agent.critic.net, agent.critic.obs_net
    words = ["".join(type(layer).__name__[0] for layer in part) for part in parts]
    assert words == ["BLBRLBRL", "LRL", "BLBR"]  # B: batch norm, L: linear, R: ReLU
    assert agent.critic.obs_net[0].num_features == 3 and agent.critic.net[0].in_features == 16 + 1


def test_buffer_keeps_the_newest_and_samples_uniformly():
    a, b = ReplayBuffer(5, 2, 1), ReplayBuffer(5, 2, 1)
    for k in range(8):
        for buffer in (a, b)[: 1 + (k > 2)]:
            buffer.add([k, -k], [k + 0.5], k / 10, [k + 1, 9], k % 2)
        if k == 2:
            b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert len(a) == 5 and all(map(np.array_equal, a.data, b.data))
    batch = a.sample(np.random.default_rng(0), 5000)
    k, counts = batch.obs[:, 0], np.unique(batch.obs[:, 0], return_counts=True)
    assert counts[0].tolist() == [3, 4, 5, 6, 7] and counts[1].min() > 900
    expected = np.stack([k, -k, k + 0.5, k / 10, k + 1, 0 * k + 9, k % 2], 1)
    np.testing.assert_allclose(np.column_stack(batch), expected, rtol=1e-6)
    assert {x.dtype for x in batch} == {np.dtype(np.float32)}
    assert a.state_dict()["data"][0].data_ptr() == a.data.obs.ctypes.data  # without a copy


# ------------------------------------------------------- Whose statistics: modes, targets, joint
def modes(script, agent, batch, args):
    """Return the name, the mode, and whether joint, of every forward pass of an update."""
    names = "actor_target", "critic_target", "actor", "critic"  # a target may be the live network
    passes, found = [], {getattr(agent, name, None): name for name in names}

    def note(net, inputs, name):
        (mode,) = {m.training for m in net if isinstance(m, nn.BatchNorm1d)}
        joint = " joint" if len(inputs[0]) == 2 * len(batch.obs) else ""
        passes.append(f"{name} {'train' if mode else 'eval'}{joint}")

    for network, name in found.items():
        for net in nets(network)[:1]:
            net.register_forward_pre_hook(partial(note, name=name))
    update(script, agent, batch, args)
    return ", ".join(passes)


JOINT = "critic train joint"
MODES = [
    ("", "critic_target eval, critic train", "train"),
    ("bn_policy_critic", "critic_target eval, critic train", "eval"),
    ("bn_target", "critic_target train, critic train", "train"),
    ("bn_joint", f"{JOINT}, critic_target eval", "train"),
    ("bn_joint bn_target", f"{JOINT}, critic_target train joint", "train"),
    ("target_network", "critic eval, critic train", "train"),
    ("target_network bn_joint bn_policy_critic", JOINT, "eval"),
]


@pytest.mark.parametrize("options, critics, policy", MODES)
def test_mode_of_every_forward_pass(script, options, critics, policy):
    values = {"bn_policy_critic": "eval", "bn_target": "train"}
    chosen = {x: values.get(x, x != "target_network") for x in options.split()}
    agent, batch, args = make_agent(script=script, norm="batchnorm", **chosen)
    is_live = script is not ddpg_bn or "target_network" in chosen  # SAC's actor has no target
    first = "actor eval" if is_live else "actor_target eval"
    expected = f"{first}, {critics}, actor train, critic {policy}"
    assert modes(script, agent, batch, args) == expected


@pytest.mark.parametrize("norm", BATCH_NORMS)
@pytest.mark.parametrize("bn_target", ["eval", "train"])
def test_targets_get_statistics_by_copy_and_weights_by_polyak(script, norm, bn_target):
    agent, batch, args = make_agent(script=script, norm=norm, bn_target=bn_target)
    for _ in range(3):
        update(script, agent, batch, args)
    for name in ("actor", "critic") if script is ddpg_bn else ("critic",):
        live, target = getattr(agent, name), getattr(agent, f"{name}_target")
        statistics = dict(live.named_buffers())
        assert same(statistics, dict(target.named_buffers()))
        assert all(x.abs().max() > 0 for x in statistics.values())
        assert not same(dict(live.named_parameters()), dict(target.named_parameters()))


def test_joint_pass_is_one_batch_norm_over_both_halves():
    agent, batch, args = make_agent(norm="batchnorm", norm_position=("input",), bn_joint=True)
    next_action = torch.zeros(64, 1)
    q, q_next = ddpg_bn.q_values(agent, batch, next_action, args)
    halves = [(batch.obs, batch.action), (batch.next_obs, next_action)]
    x, net = torch.cat([torch.cat(half, 1) for half in halves]), agent.critic.net
    expected = net[1:](F.batch_norm(x, None, None, training=True))[:, 0]
    torch.testing.assert_close(q, expected[:64], rtol=1e-4, atol=1e-6)
    # the running mean starts at 0 and has moved by the momentum to the mean of the mixture
    torch.testing.assert_close(net[0].running_mean, 0.1 * x.mean(0))
    # with a target network in eval mode, its own (initial) statistics serve: mean 0, variance 1
    torch.testing.assert_close(q_next, agent.critic_target.net[1:](x / (1 + 1e-5) ** 0.5)[64:, 0])
    args.target_network = False
    q, q_next = ddpg_bn.q_values(agent, batch, next_action, args)
    torch.testing.assert_close(torch.cat([q, q_next]), expected, rtol=1e-4, atol=1e-6)
    assert q.requires_grad and not q_next.requires_grad


@pytest.mark.parametrize("norm", [*BATCH_NORMS, "layernorm"])
def test_norm_net_decides_who_has_layers_and_layers_draw_no_random_numbers(script, norm):
    plain, _, _ = make_agent(script=script)
    options = {"norm": norm, "norm_position": ("input", "pre", "post"), "script": script}
    for norm_net in ("both", "actor", "critic"):
        agent, _, _ = make_agent(norm_net=norm_net, **options)
        for name in ("actor", "critic"):
            old, new = (list(getattr(x, name).modules()) for x in (plain, agent))
            has_layers = any(isinstance(m, nn.BatchNorm1d | nn.LayerNorm) for m in new)
            assert has_layers == (norm_net in ("both", name))
            old, new = ([m.weight for m in net if isinstance(m, nn.Linear)] for net in (old, new))
            assert same(old, new)


# ---------------------------------------------------------- The exact reason (claim B7)
@pytest.mark.parametrize("norm", BATCH_NORMS)
def test_train_mode_batch_norm_before_the_output_has_no_policy_gradient(norm):
    """mean Q = w beta + b whatever the actions are: the gradient is rounding, and Adam moves on."""
    agent, batch, args = make_agent(norm=norm, n=256)
    fit_critic(agent, batch)
    out, bn = agent.critic.net[-1], agent.critic.net[-2]
    constant = (out.weight[0] @ bn.bias + out.bias[0]).item()
    for action in (-1.0, 0.0, 0.75):  # three policies that have nothing in common
        q = agent.critic.train()(batch.obs, torch.full((256, 1), action))
        assert abs(q.mean().item() - constant) < 1e-4
    found = {}
    for args.bn_policy_critic in ("eval", "train"):
        found[args.bn_policy_critic] = policy_gradient(agent, batch, args).norm().item()
    assert found["eval"] > 0.1 and found["train"] < 1e-5 * found["eval"], found
    before = copy.deepcopy(agent.actor)
    for _ in range(10):
        loss = ddpg_bn.actor_loss(agent, batch, args)
        ddpg_bn.gradient_step(agent.actor_optimizer, loss, 0.0)
    pairs = zip(agent.actor.parameters(), before.parameters(), strict=True)
    assert max((p - q).abs().max() for p, q in pairs) > args.actor_lr  # ten steps along nothing
    with torch.no_grad():
        out.weight *= 1e5  # Q is as far off as on Hopper-v4, and rounding grows with the weights
    noise = policy_gradient(agent, batch, args).norm()
    batch = Batch(*(x.double() for x in batch))
    agent.actor.double(), agent.critic.double()
    assert noise > 1e-3 and policy_gradient(agent, batch, args).norm() < 1e-6 * noise


def test_two_passes_fix_the_mean_of_the_target_and_one_pass_that_of_both_halves():
    agent, batch, args = make_agent(norm="batchnorm", bn_target="train", n=256)
    fit_critic(agent, batch)
    agent.critic_target.load_state_dict(agent.critic.state_dict())
    out, bn = agent.critic_target.net[-1], agent.critic_target.net[-2]
    constant, means = (out.weight[0] @ bn.bias + out.bias[0]).item(), {False: [], True: []}
    for args.bn_joint, action in itertools.product(means, (-1.0, 1.0)):
        q, q_next = ddpg_bn.q_values(agent, batch, torch.full((256, 1), action), args)
        means[args.bn_joint].append((q.mean().item(), q_next.mean().item()))
    assert np.ptp(means[False], 0).max() < 1e-4 and abs(means[False][0][1] - constant) < 1e-4
    assert all(abs((q + q_next) / 2 - constant) < 1e-4 for q, q_next in means[True])
    assert np.ptp(means[True], 0)[1] > 0.1  # Q' rises with what the policy does, and Q is lowered


def test_two_passes_tie_mean_q_to_the_mean_reward_whatever_the_policy():
    """At rest mean Q = mean r + gamma mean Q', and mean Q' has followed mean Q."""
    means, options = {"train": [], "eval": []}, {"gamma": 0.5, "tau": 0.3, "critic_lr": 0.01}
    for mode, bias in itertools.product(means, (-5.0, 5.0)):
        agent, batch, args = make_agent(norm="batchnorm", bn_target=mode, **options)
        batch = batch._replace(reward=2 * batch.action[:, 0], terminated=torch.zeros(64))
        nn.init.constant_(agent.actor_target.net[-1].bias, bias)  # it acts -1, or 1
        for _ in range(200):
            loss, q = ddpg_bn.critic_loss(agent, batch, args)
            ddpg_bn.gradient_step(agent.critic_optimizer, loss, 0.0)
            ddpg_bn.update_target(agent.critic_target, agent.critic, args.tau)
        means[mode].append(q.mean().item())
    assert np.allclose(means["train"], batch.reward.mean() / (1 - 0.5), atol=0.05), means
    assert means["eval"][1] - means["eval"][0] > 1, means  # in truth 4 apart


@pytest.mark.parametrize("position", ["pre", "input"])
def test_elsewhere_the_policy_gradient_survives_in_part_and_points_elsewhere(position):
    agent, batch, args = make_agent(norm="batchnorm", norm_position=(position,), n=256)
    fit_critic(agent, batch)
    other = replace(args, bn_policy_critic="eval")
    train, real = (policy_gradient(agent, batch, x) for x in (args, other))
    assert train.norm() > 1e-2 * real.norm() and F.cosine_similarity(train, real, dim=0) < 0.8
    if position == "input":  # the mean of actions is subtracted, and with it a common shift
        assert abs(train[-1]) < 1e-2 * abs(real[-1])  # the bias of the actor's output
        for is_train in (True, False):
            agent.critic.train(is_train)
            q = [agent.critic(batch.obs, batch.action + x).mean().item() for x in (0.0, 1.0)]
            assert (abs(q[1] - q[0]) < 1e-4) if is_train else (abs(q[1] - q[0]) > 0.1)


def test_diagnostics_by_hand_and_without_a_trace(script):
    agent, batch, args = make_agent(script=script, norm="batchnorm", norm_position=("pre",))
    update(script, agent, batch._replace(obs=batch.obs * 2 + 1), args)
    nn.init.normal_(agent.actor.net[-1].weight, std=5)  # so that some actions are at their bounds
    before = copy.deepcopy((agent.actor.state_dict(), agent.critic.state_dict()))
    values = script.norm_scalars(agent, batch)
    assert same(before, (agent.actor.state_dict(), agent.critic.state_dict()))
    lags, inputs = [], torch.cat([batch.obs, batch.action], 1)
    for net in (agent.actor.net, *nets(agent.critic)):
        x = batch.obs if net is agent.actor.net else inputs
        for layer in copy.deepcopy(net).train():
            if isinstance(layer, nn.BatchNorm1d):
                lag = (layer.running_mean - x.mean(0)).abs() / (x.var(0) + 1e-5).sqrt()
                lags.append(lag.mean().item())
            x = layer(x)
    np.testing.assert_allclose(values["norm/stat_lag"], np.mean(lags), rtol=1e-4)
    grads = torch.cat([p.grad.flatten() for p in agent.actor.parameters()])
    np.testing.assert_allclose(values["norm/actor_grad"], grads.norm(), rtol=1e-5)
    action = agent.actor.eval().net(batch.obs)[:, 0].tanh()
    share = (action.abs() > 0.98).sum().item() / 64
    assert 0 < values["norm/saturation"].item() == share < 1


def test_evaluation_averages_the_errors_of_q_over_its_episodes(script, small, monkeypatch):
    """Of Countdown each second dies at t = 5; the others are cut at 8."""
    args, ends = small(script, env="Countdown-v0", eval_episodes=2), []

    def errors(agent, episode, terminated, args):
        ends.append((len(episode), terminated))
        return [1.0] * len(episode) if terminated else [0.0]

    monkeypatch.setattr(script, "q_errors", errors)
    env = script.make_env(args)
    found = script.evaluate(script.make_agent(env, args, "cpu"), env, args)
    assert ends == [(8, False), (5, True)] and found["norm/q_bias"] == 5 / 6


def test_q_errors_by_brute_force():
    agent, batch, args = make_agent(gamma=0.5, norm=("batchnorm", "zfilter"))
    ddpg_bn.update(agent, batch, args)
    agent.obs_stat.push(np.random.default_rng(1).normal(2, 3, size=(50, 3)))
    agent.reward_scale.push([0.0, 40.0, 80.0])  # of deviation 40
    before = copy.deepcopy(agent.critic.state_dict())
    obs, action, reward = np.split(np.random.default_rng(0).normal(size=(30, 5)), [3, 4], 1)
    inputs = torch.tensor(agent.obs_filter(obs)).float(), torch.tensor(action).float()
    q = agent.critic.eval()(*inputs).detach().numpy()
    episode = list(zip(obs, action, 1000 * reward[:, 0], strict=True))
    agent.critic.train()
    for args.reward_norm, ends in itertools.product((True, False), (1, 0)):
        r, expected = (25 * reward).clip(-10, 10) if args.reward_norm else 1000 * reward, []
        for t in range(30 if ends else 30 - 6):  # 0.5 ** 7 < 0.01 < 0.5 ** 6
            g = sum(0.5**k * x for k, x in enumerate(r[t:, 0]))
            expected.append((q[t] - g) / max(abs(g), 10 / 40 if args.reward_norm else 10))
        found = ddpg_bn.q_errors(agent, episode, ends, args)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert agent.obs_stat.count == 50 and same(before, agent.critic.state_dict())
