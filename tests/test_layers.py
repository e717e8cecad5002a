"""The normalization layers, against the formula of the paper and against torch's batch norm."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import same
from test_ddpg import make_agent, update

import ddpg_bn


def layer(warmup=0):
    torch.manual_seed(0)
    renorm = ddpg_bn.BatchRenorm(4, 0.1, warmup)
    for x, y in ((renorm.weight.data, renorm.bias.data), (renorm.running_var, renorm.running_mean)):
        x.uniform_(0.5, 2), y.normal_()
    return renorm


def batch(scale=1.0):
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * scale + 0.3


def test_formula_by_hand_with_clipping():
    renorm, x = layer(), batch(scale=torch.tensor([0.05, 0.9, 1.1, 20.0]))
    x[:, 2] += 40  # r is clipped below in the first feature, above in the last; d in the third
    state = {key: value.double().numpy() for key, value in renorm.state_dict().items()}
    (weight, bias, mean, var, _), data = state.values(), x.double().numpy()
    std_b, std = np.sqrt(data.var(0) + 1e-3), np.sqrt(var + 1e-3)
    r, d = std_b / std, (data.mean(0) - mean) / std
    assert (r[0] < 1 / 3) and (r[3] > 3) and (1 / 3 < r[1] < 3) and (d[2] > 5) and (abs(d[1]) < 5)
    r, d = r.clip(1 / 3, 3), d.clip(-5, 5)
    expected = ((data - data.mean(0)) / std_b * r + d) * weight + bias
    np.testing.assert_allclose(renorm(x).detach().numpy(), expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(renorm.running_mean, 0.9 * mean + 0.1 * data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(renorm.running_var, 0.9 * var + 0.1 * data.var(0), rtol=1e-4)


def test_gradient_takes_r_and_d_for_constants():
    renorm, x = layer(), batch().requires_grad_()
    mean, std = x.mean(0), (x.var(0, correction=0) + 1e-3).sqrt()
    run_std = (renorm.running_var + 1e-3).sqrt()
    r, d = (std / run_std).detach(), ((mean - renorm.running_mean) / run_std).detach()
    expected = ((x - mean) / std * r + d) * renorm.weight + renorm.bias
    inputs = x, renorm.weight, renorm.bias
    want, got = (torch.autograd.grad((y**3).sum(), inputs) for y in (expected, renorm(x)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_warm_up_is_batch_norm_and_ends_on_time():
    renorm, plain = layer(warmup=3), nn.BatchNorm1d(4, eps=1e-3)
    plain.load_state_dict(renorm.state_dict())
    for k in range(4):
        x = batch(scale=k + 2)
        assert torch.allclose(renorm(x), plain(x), atol=1e-5) == (k < 3)


def test_unclipped_train_mode_is_eval_mode_which_is_batch_norm_and_moves_nothing():
    renorm, x = layer(), batch()
    before = copy.deepcopy(renorm.state_dict())
    args = renorm.running_mean, renorm.running_var, renorm.weight, renorm.bias
    expected = F.batch_norm(x, *args, eps=1e-3)
    torch.testing.assert_close(renorm.eval()(x), expected)
    assert same(renorm.state_dict(), before)
    torch.testing.assert_close(renorm.train()(x), expected, rtol=1e-5, atol=1e-5)


POSITIONS = {
    ("pre",): "L N1 R L N2 R L",
    ("post",): "L R N1 L R N2 L",
    ("input", "pre", "post"): "N0 L N1 R N1 L N2 R N2 L",
}
KINDS = {"batchnorm": nn.BatchNorm1d, "batchrenorm": ddpg_bn.BatchRenorm, "layernorm": nn.LayerNorm}


@pytest.mark.parametrize("position", POSITIONS, ids=str)
@pytest.mark.parametrize("norm", KINDS)
def test_positions(norm, position):
    args = ddpg_bn.Args(norm=norm, norm_position=position)
    args.bn_momentum, args.bn_warmup = 0.03, 7
    words, net = [], ddpg_bn.make_net(5, 6, 7, 1)
    ddpg_bn.add_norm(net, "critic", ddpg_bn.Args(norm="zfilter"))  # no layer
    assert len(net) == 5
    ddpg_bn.add_norm(net, "critic", args)
    for module in net:
        is_layer = type(module) is KINDS[norm]
        words.append(f"N{'567'.index(str(len(module.weight)))}" if is_layer else str(module)[0])
        assert (getattr(module, "momentum", 0.03), getattr(module, "warmup", 7)) == (0.03, 7)
    assert " ".join(words) == POSITIONS[position]


def lengths(net):
    """Return the lengths of the weights and biases of hidden units, and those of outputs."""
    found = {True: [], False: []}
    for layer in (x for x in net.modules() if isinstance(x, nn.Linear)):
        vectors = torch.cat([layer.weight, layer.bias[:, None]], 1)
        found[len(vectors) == 16].append(vectors.norm(dim=1))
    return torch.cat(found[True]), torch.cat(found[False])


@pytest.mark.parametrize("norm", ["batchnorm", "batchrenorm"])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_weight_norm_leaves_the_function(script, norm, position):
    """Batch norm behind a unit divides by its length, whatever that is, but for epsilon."""
    options = {"norm": norm, "norm_position": (position,), "weight_norm": True}
    agent, batch, _ = make_agent(script=script, **options)
    for name, inputs in (("actor", (batch.obs,)), ("critic", (batch.obs, batch.action))):
        net = getattr(agent, name).train()
        for module in net.modules():
            module.eps = 1e-12
            if getattr(module, "out_features", 0) == 16:  # hidden units, which begin at length 1
                module.weight.data *= 3
                module.bias.data *= 3
        before, (_, outputs) = net(*inputs), lengths(net)
        script.project_weights(net)
        torch.testing.assert_close(net(*inputs), before, rtol=1e-4, atol=1e-5)
        assert torch.allclose(lengths(net)[0], torch.ones(()))
        assert torch.equal(lengths(net)[1], outputs)


def test_weight_norm_holds_from_the_start_and_after_updates(script):
    options = {"norm": "batchnorm", "weight_norm": True, "actor_lr": 0.1, "critic_lr": 0.1}
    for norm_net in ("both", "critic"):
        agent, batch, args = make_agent(script=script, norm_net=norm_net, **options)
        assert same(agent.critic.state_dict(), agent.critic_target.state_dict())
        for _ in range(2):
            for net, is_one in ((agent.actor, norm_net == "both"), (agent.critic, True)):
                assert torch.allclose(lengths(net)[0], torch.ones(())) == is_one
            update(script, agent, batch, args)
    agent, _, _ = make_agent(script=script, norm="batchnorm")
    assert not torch.allclose(lengths(agent.critic)[0], torch.ones(()))
