"""Updates beside those of Stable-Baselines3 and sb3-contrib, from the same weights and batches.

In double precision, since Adam turns rounding of a tiny gradient into a full step.
"""

import copy

import pytest
import torch
import torch.nn as nn

import ddpg_bn
import sac_bn

sb3 = pytest.importorskip("stable_baselines3")
contrib = pytest.importorskip("sb3_contrib")
distributions, logger, type_aliases = (
    pytest.importorskip(f"stable_baselines3.common.{name}")
    for name in ("distributions", "logger", "type_aliases")
)

OURS = {"env": "HalfCheetah-v4", "hidden_sizes": (64, 32), "buffer_size": 1000}
THEIRS = {"policy": "MlpPolicy", "policy_kwargs": {"net_arch": [64, 32]}, "device": "cpu"}


@pytest.fixture(autouse=True)
def double(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # theirs rounds observations
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def random_batch(k):
    g = torch.Generator().manual_seed(k)
    obs, next_obs = 3 * torch.randn(2, 256, 17, generator=g) + 1
    action = 2 * torch.rand(256, 6, generator=g) - 1
    reward, u = torch.randn(256, generator=g), torch.rand(256, generator=g)
    return ddpg_bn.Batch(obs, action, reward, next_obs, (u < 0.2).double())


def copy_weights(theirs, ours):
    """Give their linear layers, in order, the weights of ours."""
    pairs = [[x for x in net.modules() if isinstance(x, nn.Linear)] for net in (theirs, ours)]
    for target, source in zip(*pairs, strict=True):
        target.load_state_dict(source.state_dict())


def feed(model, monkeypatch):
    """Return a function that lets a model of theirs learn from a batch of ours."""
    model.set_logger(logger.Logger(None, []))

    def learn(batch):
        data = batch.obs, batch.action, batch.next_obs, batch.terminated[:, None]
        samples = type_aliases.ReplayBufferSamples(*data, batch.reward[:, None])
        monkeypatch.setattr(model.replay_buffer, "sample", lambda *_, **__: samples)
        model.train(1, len(batch.obs))

    return learn


def assert_close(theirs, ours):
    """Compare the weights of two networks of equal layers; a step of Adam moves them by 1e-3."""
    for x, y in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


def test_ddpg_is_that_of_stable_baselines3(monkeypatch):
    args = ddpg_bn.Args(**OURS)
    env = ddpg_bn.make_env(args)
    agent = ddpg_bn.make_agent(env, args, "cpu")
    model = sb3.DDPG(env=env, tau=args.tau, **copy.deepcopy(THEIRS))
    pairs = [(model.actor.double(), agent.actor), (model.critic.double(), agent.critic)]
    pairs += [(model.actor_target.double(), agent.actor_target)]
    pairs += [(model.critic_target.double(), agent.critic_target)]
    for theirs, ours in pairs:
        copy_weights(theirs, ours)
    learn = feed(model, monkeypatch)
    for batch in map(random_batch, range(20)):
        ddpg_bn.update(agent, batch, args)
        learn(batch)
    for theirs, ours in pairs:
        assert_close(theirs, ours)


def test_crossq_is_that_of_sb3_contrib_while_its_layers_are_batch_norm(monkeypatch):
    options = {"norm": "batchrenorm", "norm_position": ("input", "post"), "bn_momentum": 0.01}
    options |= {"bn_policy_critic": "eval", "bn_joint": True, "target_network": False}
    options |= {"adam_beta1": 0.5, "policy_delay": 3}
    args = sac_bn.Args(**OURS, **options)
    env = sac_bn.make_env(args)
    agent = sac_bn.make_agent(env, args, "cpu")
    # theirs adds 1e-6 within a logarithm, and divides variances by n - 1
    squashed = distributions.SquashedDiagGaussianDistribution.__init__
    monkeypatch.setattr(squashed, "__defaults__", (0.0,))
    monkeypatch.setattr(torch.Tensor, "var", lambda x, dim: torch.var(x, dim, correction=0))
    model = contrib.CrossQ(env=env, **copy.deepcopy(THEIRS))
    model.critic.optimizer.param_groups[0]["eps"] /= 2  # as its loss and gradient are half of ours
    model.log_ent_coef.data = model.log_ent_coef.data.double()
    body, outputs = agent.actor.net[:-1], agent.actor.net[-1]
    pairs = [(model.actor.double().latent_pi, body)]
    pairs += list(zip(model.critic.double().q_networks, agent.critic.nets, strict=True))
    for theirs, ours in pairs:
        copy_weights(theirs, ours)
    halves = zip(outputs.weight.chunk(2), outputs.bias.chunk(2), strict=True)
    for head, (weight, bias) in zip((model.actor.mu, model.actor.log_std), halves, strict=True):
        head.load_state_dict({"weight": weight, "bias": bias})
    learn = feed(model, monkeypatch)
    for k in range(1, 21):
        torch.manual_seed(k)
        sac_bn.update(agent, random_batch(k), k, args)
        torch.manual_seed(k)
        learn(random_batch(k))
    for theirs, ours in pairs:
        assert_close(theirs, ours)
        statistics = [[x for x in net.buffers() if x.dim()] for net in (theirs, ours)]
        for x, y in zip(*statistics, strict=True):  # running means and variances
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.log_ent_coef[0], agent.log_alpha, rtol=0, atol=1e-5)
