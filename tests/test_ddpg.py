"""ddpg_bn.py: each trap that it could fall into, against something worked out independently."""

import copy
import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import same, scalars

import ddpg_bn
from ddpg_bn import Args, Batch, ReplayBuffer
from zfilter import ZFilter

BATCH_NORMS = ["batchnorm", "batchrenorm"]


def make_agent(n=64, **options):
    """Return a Pendulum agent, a batch of n random transitions, and the options."""
    args = Args(env="Pendulum-v1", hidden_sizes=(16, 16), **options)
    torch.manual_seed(0)
    agent = ddpg_bn.make_agent(gym.make(args.env), args, "cpu")
    g = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g) + 0.5
    action = torch.rand(n, 1, generator=g) * 4 - 2
    reward, terminated = torch.randn(n, generator=g), (torch.rand(n, generator=g) < 0.3).float()
    return agent, Batch(obs, action, reward, next_obs, terminated), args


def fit_critic(agent, batch, steps=300):
    """Teach the live critic a smooth function of s and a, so that its gradients mean something."""
    optimizer = torch.optim.Adam(agent.critic.parameters(), 1e-2)
    goal = 10 * torch.sin(batch.obs.sum(1)) - 3 * (batch.action[:, 0] - 1) ** 2
    for _ in range(steps):
        optimizer.zero_grad()
        q = agent.critic.train()(batch.obs, batch.action)
        (q.reshape(len(goal), -1) - goal.unsqueeze(1)).square().mean().backward()
        optimizer.step()


def grad_norm(loss, net):
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return torch.cat([g.flatten() for g in grads]).norm().item()


# ---------------------------------------------------------------------- The algorithm, by hand


def test_critic_loss_by_hand():
    agent, batch, args = make_agent(gamma=0.9)
    with torch.no_grad():  # targets that differ from the live networks
        for net in (agent.actor_target, agent.critic_target):
            for p in net.parameters():
                p += 0.1 * torch.randn_like(p)

    def forward(net, x):
        layers = [m for m in net if isinstance(m, nn.Linear)]
        for k, layer in enumerate(layers):
            x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
            x = np.maximum(x, 0) if k < len(layers) - 1 else x
        return x

    obs, action, reward, next_obs, terminated = (x.numpy() for x in batch)
    a = 2 * np.tanh(forward(agent.actor_target.net, next_obs))  # Pendulum's bounds are -2 and 2
    q_next = forward(agent.critic_target.net, np.concatenate([next_obs, a], 1))[:, 0]
    q = forward(agent.critic.net, np.concatenate([obs, action], 1))[:, 0]
    y = reward + 0.9 * np.where(terminated == 1, 0, q_next)
    loss, q_ours = ddpg_bn.critic_loss(agent, batch, args)
    np.testing.assert_allclose(q_ours.detach(), q, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss.item(), ((q - y) ** 2).mean(), rtol=1e-5)

    a = 2 * np.tanh(forward(agent.actor.net, obs))
    expected = -forward(agent.critic.net, np.concatenate([obs, a], 1)).mean()
    np.testing.assert_allclose(
        ddpg_bn.actor_loss(agent, batch, args).item(), expected, rtol=1e-4, atol=1e-6
    )


def test_update_is_adam_then_polyak():
    agent, batch, args = make_agent(tau=0.3, critic_lr=0.01, actor_lr=0.02)
    old = copy.deepcopy(agent)
    ddpg_bn.update(agent, batch, args)
    for name, lr in (("critic", 0.01), ("actor", 0.02)):
        live, target = getattr(agent, name), getattr(agent, f"{name}_target")
        before = dict(getattr(old, name).named_parameters())
        before_target = dict(getattr(old, f"{name}_target").named_parameters())
        for (k, p), t in zip(live.named_parameters(), target.parameters(), strict=True):
            moved = (p - before[k]).abs()  # the first step of Adam is lr, wherever a gradient is
            assert moved.max() <= 1.001 * lr and moved.max() > 0.9 * lr
            torch.testing.assert_close(t, 0.7 * before_target[k] + 0.3 * p)
    assert all(p.requires_grad for p in agent.critic.parameters())


def test_actor_update_leaves_the_critic_alone_and_climbs():
    agent, batch, args = make_agent(actor_lr=1e-3)
    fit_critic(agent, batch)
    before = copy.deepcopy(agent.critic.state_dict())
    losses = []
    for _ in range(50):
        loss = ddpg_bn.actor_loss(agent, batch, args)
        ddpg_bn.gradient_step(agent.actor_optimizer, loss, 0.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert same(before, agent.critic.state_dict())


def test_gradient_clipping():
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    ddpg_bn.gradient_step(optimizer, 1000 * net(torch.ones(1, 3)).sum(), 0.5)
    after = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close((after - before).norm(), torch.tensor(0.5))


def test_first_actions_and_values_are_small():
    agent, batch, _ = make_agent()
    assert agent.actor(batch.obs).abs().max() < 0.2
    assert agent.critic(batch.obs, batch.action).abs().max() < 0.2


def test_actions_fill_asymmetric_bounds():
    env = gym.make("Countdown-v0")  # bounds -1 and 3
    agent = ddpg_bn.make_agent(env, Args(hidden_sizes=(8,)), "cpu")
    with torch.no_grad():
        agent.actor.net[-1].bias.fill_(100)
        np.testing.assert_array_equal(ddpg_bn.act(agent, np.zeros(3)), [3])
        agent.actor.net[-1].bias.fill_(-100)
        np.testing.assert_array_equal(ddpg_bn.act(agent, np.zeros(3)), [-1])
        agent.actor.net[-1].bias.fill_(0)
        agent.actor.net[-1].weight.fill_(0)
    rng, args = np.random.default_rng(0), Args(noise=0.25)
    drawn = [ddpg_bn.explore(agent, np.zeros(3), env.action_space, rng, args) for _ in range(4000)]
    assert abs(np.mean(drawn) - 1) < 0.03 and abs(np.std(drawn) - 0.25 * 2) < 0.03
    args.noise = 5.0
    drawn = [ddpg_bn.explore(agent, np.zeros(3), env.action_space, rng, args) for _ in range(100)]
    assert min(drawn) == -1 and max(drawn) == 3


def test_action_layer_is_the_papers():
    agent, batch, _ = make_agent(
        action_layer=1, norm="batchnorm", norm_position=("input", "pre"), n=8
    )
    names = [type(m).__name__ for m in agent.critic.obs_net]
    assert names == ["BatchNorm1d", "Linear", "BatchNorm1d", "ReLU"]  # the state, the first layer
    assert agent.critic.obs_net[0].num_features == 3
    assert agent.critic.net[0].in_features == 16 + 1
    assert not any(isinstance(m, nn.BatchNorm1d) for m in agent.critic.net)
    kinds = [type(m).__name__ for m in agent.actor.net]
    assert kinds == ["BatchNorm1d"] + 2 * ["Linear", "BatchNorm1d", "ReLU"] + ["Linear"]
    assert agent.critic(batch.obs, batch.action).shape == (8,)


# ------------------------------------------------------------------------------- Replay buffer


def test_buffer_keeps_the_newest_and_samples_uniformly():
    buffer = ReplayBuffer(5, 2, 1)
    for k in range(8):
        buffer.add([k, -k], [k + 0.5], k / 10, [k + 1, 9], k % 2)
    assert len(buffer) == 5
    batch = buffer.sample(np.random.default_rng(0), 5000)
    ks, counts = np.unique(batch.obs[:, 0], return_counts=True)
    assert list(ks) == [3, 4, 5, 6, 7] and counts.min() > 900
    k = batch.obs[:, 0]
    np.testing.assert_array_equal(batch.obs[:, 1], -k)
    np.testing.assert_array_equal(batch.action[:, 0], k + 0.5)
    np.testing.assert_array_equal(batch.next_obs[:, 0], k + 1)
    np.testing.assert_allclose(batch.reward, k / 10, rtol=1e-6)
    np.testing.assert_array_equal(batch.terminated, k % 2)
    assert all(x.dtype == np.float32 for x in batch)


def test_buffer_state_shares_memory_and_comes_back():
    a, b = ReplayBuffer(4, 2, 1), ReplayBuffer(4, 2, 1)
    for k in range(3):
        a.add([k, k], [k], k, [k, k], 0)
    state = a.state_dict()
    assert (
        state["data"][0].shape == (3, 2) and state["data"][0].data_ptr() == a.data.obs.ctypes.data
    )
    b.load_state_dict(state)
    for buffer in (a, b):
        buffer.add([7, 7], [7], 7, [7, 7], 1)
        buffer.add([8, 8], [8], 8, [8, 8], 1)
    assert all(np.array_equal(x, y) for x, y in zip(a.data, b.data, strict=True))


# ------------------------------------------------------- Whose statistics: modes, targets, joint


def modes(agent, batch, args, update=ddpg_bn.update):
    """Return [(network, train mode?, rows), ...] of every forward pass of one update."""
    passes = []
    for name in ("actor", "critic", "actor_target", "critic_target"):
        net = getattr(agent, name)

        def hook(net, inputs, name=name):
            bn = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
            assert {m.training for m in bn} <= {net.training}
            passes.append((name, net.training, len(inputs[0])))

        if not any(net is getattr(agent, other) for other in ("actor", "critic") if other != name):
            net.register_forward_pre_hook(hook)
    update(agent, batch, args)
    return passes


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "actor_target eval, critic_target eval, critic train, actor train, critic train"),
        (
            {"bn_policy_critic": "eval"},
            "actor_target eval, critic_target eval, critic train, actor train, critic eval",
        ),
        (
            {"bn_target": "train"},
            "actor_target train, critic_target train, critic train, actor train, critic train",
        ),
        (
            {"bn_joint": True},
            "actor_target eval, critic train joint, critic_target eval joint, "
            "actor train, critic train",
        ),
        (
            {"target_network": False},
            "actor eval, critic eval, critic train, actor train, critic train",
        ),
        (
            {"target_network": False, "bn_joint": True, "bn_policy_critic": "eval"},
            "actor eval, critic train joint, actor train, critic eval",
        ),
    ],
)
@pytest.mark.parametrize("norm", BATCH_NORMS)
def test_mode_of_every_forward_pass(norm, options, expected):
    agent, batch, args = make_agent(norm=norm, **options)
    words = [
        f"{name} {'train' if training else 'eval'}{' joint' if rows == 128 else ''}"
        for name, training, rows in modes(agent, batch, args)
    ]
    assert ", ".join(words) == expected


@pytest.mark.parametrize("norm", BATCH_NORMS)
def test_acting_is_in_eval_mode_and_moves_nothing(norm):
    agent, batch, args = make_agent(norm=norm)
    ddpg_bn.update(agent, batch, args)
    before = copy.deepcopy(agent.actor.state_dict())
    one = ddpg_bn.act(agent, batch.obs[3].numpy())
    assert same(before, agent.actor.state_dict())
    expected = agent.actor.eval()(batch.obs)[3].detach().numpy()
    np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", BATCH_NORMS)
@pytest.mark.parametrize("bn_target", ["eval", "train"])
def test_targets_get_statistics_by_copy_and_weights_by_polyak(norm, bn_target):
    agent, batch, args = make_agent(norm=norm, bn_target=bn_target)
    for _ in range(3):
        ddpg_bn.update(agent, batch, args)
    for name in ("actor", "critic"):
        live = getattr(agent, name)
        target = getattr(agent, f"{name}_target")
        assert same(dict(live.named_buffers()), dict(target.named_buffers()))
        assert live.net[2].num_batches_tracked > 0 and live.net[2].running_mean.abs().max() > 0
        assert not same(dict(live.named_parameters()), dict(target.named_parameters()))


def test_joint_pass_is_one_batch_norm_over_both_halves():
    agent, batch, args = make_agent(norm="batchnorm", norm_position=("input",), bn_joint=True)
    next_action = torch.zeros(64, 1)
    q, q_next = ddpg_bn.q_values(agent, batch, next_action, args)
    s = torch.cat([batch.obs, batch.next_obs])
    a = torch.cat([batch.action, next_action])
    x = torch.cat([s, a], 1)
    z = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    net = agent.critic.net
    expected = net[1:](z)[:, 0]
    torch.testing.assert_close(q, expected[:64], rtol=1e-4, atol=1e-6)
    # the running mean starts at 0 and has moved by the momentum to the mean of the mixture
    torch.testing.assert_close(net[0].running_mean, 0.1 * x.mean(0))
    # with a target network in eval mode, its own (initial) statistics serve: mean 0, variance 1
    torch.testing.assert_close(q_next, agent.critic_target.net[1:](x / (1 + 1e-5) ** 0.5)[64:, 0])
    assert not q_next.requires_grad

    args.target_network = False
    agent.critic_target = agent.critic
    q, q_next = ddpg_bn.q_values(agent, batch, next_action, args)
    torch.testing.assert_close(torch.cat([q, q_next]), expected, rtol=1e-4, atol=1e-6)
    assert q.requires_grad and not q_next.requires_grad


def test_norm_net_decides_who_has_layers():
    for norm_net, expected in (("both", [1, 1]), ("actor", [1, 0]), ("critic", [0, 1])):
        for norm in ("batchnorm", "batchrenorm", "layernorm"):
            agent, _, _ = make_agent(norm=norm, norm_net=norm_net)
            kinds = nn.BatchNorm1d | nn.LayerNorm
            has = [
                any(isinstance(m, kinds) for m in net.modules())
                for net in (agent.actor, agent.critic)
            ]
            assert has == expected


def test_norm_layers_draw_no_random_numbers():
    plain, _, _ = make_agent()
    for norm in ("batchnorm", "batchrenorm", "layernorm"):
        agent, _, _ = make_agent(norm=norm, norm_position=("input", "pre", "post"))
        ours, theirs = (
            [m.weight for m in net.modules() if isinstance(m, nn.Linear)]
            for net in (agent.critic, plain.critic)
        )
        assert same(ours, theirs)


# ---------------------------------------------------------- The exact reason (claim B7)


@pytest.mark.parametrize("norm", BATCH_NORMS)
def test_train_mode_batch_norm_before_the_output_has_no_policy_gradient(norm):
    """mean Q = w beta + b whatever the actions are: the gradient is rounding, and Adam moves on."""
    agent, batch, args = make_agent(norm=norm, n=256)
    fit_critic(agent, batch)
    out, bn = agent.critic.net[-1], agent.critic.net[-2]
    assert isinstance(bn, nn.BatchNorm1d)
    constant = -(out.weight[0] @ bn.bias + out.bias[0]).item()
    for action in (-2.0, 0.0, 1.5):  # three policies that have nothing in common
        q = agent.critic.train()(batch.obs, torch.full((256, 1), action))
        assert abs(-q.mean().item() - constant) < 1e-4
    args.bn_policy_critic = "eval"
    real = grad_norm(ddpg_bn.actor_loss(agent, batch, args), agent.actor)
    args.bn_policy_critic = "train"
    noise = grad_norm(ddpg_bn.actor_loss(agent, batch, args), agent.actor)
    assert real > 0.1 and noise < 1e-5 * real, (real, noise)

    before = [p.detach().clone() for p in agent.actor.parameters()]
    for _ in range(10):
        loss = ddpg_bn.actor_loss(agent, batch, args)
        ddpg_bn.gradient_step(agent.actor_optimizer, loss, 0.0)
    moved = max(
        (p - q).abs().max().item() for p, q in zip(agent.actor.parameters(), before, strict=True)
    )
    assert moved > args.actor_lr  # ten steps along nothing

    with torch.no_grad():
        out.weight *= 1e5  # Q is as far off as on Hopper-v4, and rounding grows with the weights
    noise = grad_norm(ddpg_bn.actor_loss(agent, batch, args), agent.actor)
    batch = ddpg_bn.Batch(*(x.double() for x in batch))
    agent.actor.double(), agent.critic.double()
    rest = grad_norm(ddpg_bn.actor_loss(agent, batch, args), agent.actor)
    assert noise > 1e-3 and rest < 1e-6 * noise, (noise, rest)


def test_two_passes_fix_the_mean_of_the_target_and_one_pass_that_of_both_halves():
    agent, batch, args = make_agent(norm="batchnorm", bn_target="train", n=256)
    fit_critic(agent, batch)
    agent.critic_target.load_state_dict(agent.critic.state_dict())
    out, bn = agent.critic_target.net[-1], agent.critic_target.net[-2]
    constant = (out.weight[0] @ bn.bias + out.bias[0]).item()
    means = {False: [], True: []}
    for args.bn_joint, action in itertools.product(means, (-2.0, 2.0)):
        q, q_next = ddpg_bn.q_values(agent, batch, torch.full((256, 1), action), args)
        means[args.bn_joint].append((q.mean().item(), q_next.mean().item()))
    assert np.ptp(means[False], 0).max() < 1e-4 and abs(means[False][0][1] - constant) < 1e-4
    assert all(abs((q + q_next) / 2 - constant) < 1e-4 for q, q_next in means[True])
    assert np.ptp(means[True], 0)[1] > 0.1  # Q' rises with what the policy does, and Q is lowered


def test_two_passes_tie_mean_q_to_the_mean_reward_whatever_the_policy():
    """At rest mean Q = mean r + gamma mean Q', and mean Q' has followed mean Q."""
    means = {"train": [], "eval": []}
    for bn_target, bias in itertools.product(means, (-5.0, 5.0)):
        agent, batch, args = make_agent(norm="batchnorm", bn_target=bn_target, gamma=0.5, tau=0.1)
        batch = batch._replace(reward=batch.action[:, 0], terminated=torch.zeros(64))
        nn.init.constant_(agent.actor_target.net[-1].bias, bias)  # it acts -2, or 2
        for _ in range(1000):
            loss, q = ddpg_bn.critic_loss(agent, batch, args)
            ddpg_bn.gradient_step(agent.critic_optimizer, loss, 0.0)
            ddpg_bn.update_target(agent.critic_target, agent.critic, args.tau)
        means[bn_target].append(q.mean().item())
    assert np.allclose(means["train"], batch.reward.mean() / (1 - 0.5), atol=0.05), means
    assert means["eval"][1] - means["eval"][0] > 1, means  # in truth 4 apart


def policy_gradients(position):
    """Return the gradient of the actor's loss in train and in eval mode, flat, and the agent."""
    agent, batch, args = make_agent(norm="batchnorm", norm_position=(position,), n=256)
    fit_critic(agent, batch)
    flat = []
    for args.bn_policy_critic in ("train", "eval"):
        loss = ddpg_bn.actor_loss(agent, batch, args)
        grads = torch.autograd.grad(loss, list(agent.actor.parameters()))
        flat.append(torch.cat([g.flatten() for g in grads]))
    return *flat, agent, batch


@pytest.mark.parametrize("position", ["pre", "input"])
def test_elsewhere_the_policy_gradient_survives_in_part_and_points_elsewhere(position):
    train, real, _, _ = policy_gradients(position)
    assert train.norm() > 1e-2 * real.norm()
    assert F.cosine_similarity(train, real, dim=0) < 0.8


def test_on_the_input_train_mode_cannot_tell_larger_actions():
    """Batch norm subtracts the mean of the actions, and with it what a common shift would bring."""
    train, real, agent, batch = policy_gradients("input")
    values = {True: [], False: []}
    for mode, found in values.items():
        agent.critic.train(mode)
        for shift in (0.0, 0.5, 1.5):
            found.append(agent.critic(batch.obs, batch.action + shift).mean().item())
    assert np.std(values[True]) < 1e-4 < 0.1 < np.std(values[False])
    assert abs(train[-1]) < 1e-2 * abs(real[-1])  # the bias of the actor's output


def test_layer_norm_has_no_such_constant():
    agent, batch, args = make_agent(norm="layernorm", n=256)
    fit_critic(agent, batch)
    assert grad_norm(ddpg_bn.actor_loss(agent, batch, args), agent.actor) > 0.1


def test_the_dead_gradient_shows_in_a_run(small):
    found = []
    for mode in ("train", "eval"):
        options = {"norm": "batchnorm", "bn_policy_critic": mode}
        args = small(ddpg_bn, total_steps=1000, learning_starts=500, batch_size=64, **options)
        ddpg_bn.train(args)
        found += [value for _, value in scalars(args.run_dir, "norm/actor_grad")]
    assert len(found) == 2 and found[0] < 1e-4 * found[1]


# -------------------------------------------------------------------------- Diagnostics by hand


def test_probe_by_hand_and_without_a_trace():
    agent, batch, _ = make_agent(norm="batchnorm", norm_position=("pre",))
    for _ in range(3):
        agent.critic.train()(batch.obs * 2 + 1, batch.action)
    with torch.no_grad():
        agent.critic.net[1].bias[:4] = -100  # four dead units of the first layer's sixteen
    agent.critic.eval()
    before = copy.deepcopy(agent.critic.state_dict())
    gap, found, dead = ddpg_bn.probe(agent.critic, batch.obs, batch.action)
    scalars = ddpg_bn.norm_scalars(agent, batch)
    assert same(before, agent.critic.state_dict()) and not agent.critic.training

    def lags_by_hand(net, x):
        lags = []
        for layer in copy.deepcopy(net).train():
            if isinstance(layer, nn.BatchNorm1d):
                std = (x.var(0, correction=0) + 1e-5).sqrt()
                lags.append(((layer.running_mean - x.mean(0)).abs() / std).mean().item())
            x = layer(x)
        return lags

    with torch.no_grad():
        lags = lags_by_hand(agent.critic.net, torch.cat([batch.obs, batch.action], 1))
        lags += lags_by_hand(agent.actor.net, batch.obs)
        np.testing.assert_allclose(scalars["stat_lag"], np.mean(lags), rtol=1e-4)
        eval_q = copy.deepcopy(agent.critic).eval()(batch.obs, batch.action)
        train_q = copy.deepcopy(agent.critic).train()(batch.obs, batch.action)
    np.testing.assert_allclose(gap, (train_q - eval_q).abs().mean(), rtol=1e-4)
    assert len(found) == len(dead) == 2 and dead[0] == 4 / 16


@pytest.mark.parametrize(("position", "is_stretched"), [("post", True), ("pre", False)])
def test_copied_statistics_of_a_unit_that_died_stretch_its_slow_copy(position, is_stretched):
    agent, batch, args = make_agent(norm="batchnorm", norm_position=(position,))
    with torch.no_grad():
        agent.critic.net[0].bias[0] = -10  # as if a step of the optimizer had gone too far
        for _ in range(300):  # until nothing is left of the variance from before
            agent.critic.train()(batch.obs, batch.action)
        ddpg_bn.update_target(agent.critic_target, agent.critic, args.tau)
        next_action = agent.actor.eval()(batch.next_obs)
        linear = agent.critic_target.net[0](torch.cat([batch.next_obs, next_action], 1))[:, 0]
    stretch = ddpg_bn.norm_scalars(agent, batch)["target_stretch"]
    if is_stretched:
        by_hand = linear.relu().var(correction=0).add(1e-5).sqrt() / 1e-5**0.5
        np.testing.assert_allclose(stretch, by_hand, rtol=1e-3)
    assert (stretch > 50) if is_stretched else (stretch < 3)


def test_saturation_and_actor_grad():
    agent, batch, args = make_agent()
    ddpg_bn.update(agent, batch, args)
    values = ddpg_bn.norm_scalars(agent, batch)
    expected = sum(p.grad.pow(2).sum() for p in agent.actor.parameters()).sqrt()
    np.testing.assert_allclose(values["actor_grad"], expected, rtol=1e-5)
    assert values["saturation"] == 0 and "stat_lag" not in values
    with torch.no_grad():
        agent.actor.net[-1].weight[:] = 1e6
    assert ddpg_bn.norm_scalars(agent, batch)["saturation"] > 0.5


def test_q_bias_by_brute_force():
    agent, batch, args = make_agent(gamma=0.5, norm="batchnorm")
    ddpg_bn.update(agent, batch, args)
    agent.obs_filter = ZFilter(3)
    agent.obs_filter(np.random.default_rng(1).normal(2, 3, size=(50, 3)))
    before = copy.deepcopy(agent.critic.state_dict())
    rng = np.random.default_rng(0)
    played, expected = [], []
    for n, terminated in ((30, True), (30, False)):
        obs, action = rng.normal(size=(n, 3)), rng.normal(size=(n, 1))
        reward = 100 * rng.normal(size=n)
        played.append((obs, action, reward, terminated))
        filtered = agent.obs_filter(obs, update=False)
        inputs = (torch.tensor(x, dtype=torch.float32) for x in (filtered, action))
        q = agent.critic.eval()(*inputs).detach().numpy()
        agent.critic.train()
        for t in range(n if terminated else n - 6):  # 0.5 ** 7 < 0.01 < 0.5 ** 6
            g = sum(0.5**k * r for k, r in enumerate(reward[t:]))
            expected.append((q[t] - g) / max(abs(g), 10))
    values = ddpg_bn.q_bias(agent, played, 0.5)
    np.testing.assert_allclose(values["q_bias"], np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(values["q_bias_std"], np.std(expected), rtol=1e-5)
    assert agent.obs_filter.stat.count == 50 and same(before, agent.critic.state_dict())
    for gamma in (0.99, 1.0):  # too much of the return is behind the cut, for every state
        assert ddpg_bn.q_bias(agent, [(*played[1][:3], False)], gamma) == {}


def test_evaluation_is_deterministic_and_starts_the_same():
    agent, batch, args = make_agent(norm="batchnorm")
    ddpg_bn.update(agent, batch, args)
    agent.buffer = ddpg_bn.ReplayBuffer(10, 3, 1)
    before = copy.deepcopy({k: getattr(agent, k).state_dict() for k in ddpg_bn.PARTS})
    env = gym.make("Pendulum-v1")
    a, b = ddpg_bn.evaluate(agent, env, 2), ddpg_bn.evaluate(agent, env, 2)
    for x, y in zip(a, b, strict=True):
        assert all(np.array_equal(p, q) for p, q in zip(x, y, strict=True))
        assert x[0].shape == (200, 3) and x[1].shape == (200, 1) and x[2].shape == (200,)
        assert not x[3]  # Pendulum never terminates
    assert not np.array_equal(a[0][0], a[1][0])
    assert same(before, {k: getattr(agent, k).state_dict() for k in ddpg_bn.PARTS})
    first, _ = env.reset(seed=1_000_000)
    np.testing.assert_array_equal(a[0][0][0], first)
