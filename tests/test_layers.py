"""The normalization layers, against the formula of the paper and against torch's batch norm."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ddpg_bn


def layer(warmup=0, momentum=0.1, features=4):
    torch.manual_seed(0)
    renorm = ddpg_bn.BatchRenorm(features, momentum, warmup)
    with torch.no_grad():
        renorm.weight.uniform_(0.5, 2)
        renorm.bias.normal_()
        renorm.running_mean.normal_()
        renorm.running_var.uniform_(0.5, 2)
    return renorm


def batch(n=64, scale=1.0, features=4):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(1)) * scale + 0.3


def test_formula_by_hand_with_clipping():
    renorm, x = layer(), batch(scale=torch.tensor([0.05, 0.9, 1.1, 20.0]))
    x[:, 2] += 40  # r is clipped below in the first feature, above in the last; d in the third
    mean, var = renorm.running_mean.double().numpy(), renorm.running_var.double().numpy()
    weight, bias = renorm.weight.detach().double().numpy(), renorm.bias.detach().double().numpy()
    data = x.double().numpy()
    std_b, std = np.sqrt(data.var(0) + 1e-3), np.sqrt(var + 1e-3)
    r, d = std_b / std, (data.mean(0) - mean) / std
    assert (r[0] < 1 / 3) and (r[3] > 3) and (1 / 3 < r[1] < 3) and (d[2] > 5) and (abs(d[1]) < 5)
    r, d = r.clip(1 / 3, 3), d.clip(-5, 5)
    expected = ((data - data.mean(0)) / std_b * r + d) * weight + bias
    np.testing.assert_allclose(renorm(x).detach().numpy(), expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(renorm.running_mean, 0.9 * mean + 0.1 * data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(renorm.running_var, 0.9 * var + 0.1 * data.var(0), rtol=1e-4)
    assert renorm.num_batches_tracked == 1


def test_gradient_takes_r_and_d_for_constants():
    renorm, x = layer(), batch().requires_grad_()
    mean, std = x.mean(0), (x.var(0, correction=0) + 1e-3).sqrt()
    run_std = (renorm.running_var + 1e-3).sqrt()
    r, d = (std / run_std).detach(), ((mean - renorm.running_mean) / run_std).detach()
    expected = ((x - mean) / std * r + d) * renorm.weight + renorm.bias
    variables = [x, renorm.weight, renorm.bias]
    want = torch.autograd.grad((expected**3).sum(), variables)
    got = torch.autograd.grad((renorm(x) ** 3).sum(), variables)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_warm_up_is_batch_norm_and_ends_on_time():
    renorm, plain = layer(warmup=3), nn.BatchNorm1d(4, eps=1e-3)
    plain.load_state_dict(renorm.state_dict())
    for k in range(4):
        x = batch(scale=k + 2)
        equal = torch.allclose(renorm(x), plain(x), atol=1e-5)
        assert equal == (k < 3), k


@pytest.mark.parametrize("passes, warm", [(0, 0), (3, 3), (4, 0)])
def test_layers_that_never_left_their_warm_up_are_told(passes, warm, capsys):
    """The fourth pass of a layer with a warm-up of three is the first that renormalizes.

    Layers without a pass, say of PPO in eval mode throughout, have no warm-up to shorten.
    """
    nets = nn.Sequential(layer(warmup=3), layer(warmup=3)), nn.Sequential(layer(warmup=3))
    for net in nets:
        for _ in range(passes):
            net(batch())
    ddpg_bn.report_warmup(SimpleNamespace(actor=nets[0], critic=nets[1]))
    out = capsys.readouterr().out
    assert out == ("3 of 3 layers were batch norm to the end: lower --bn-warmup\n" if warm else "")


def test_unclipped_train_output_is_eval_output():
    renorm, x = layer(), batch()
    renorm.r_max, renorm.d_max = 1e9, 1e9
    expected = renorm.eval()(x)
    torch.testing.assert_close(renorm.train()(x), expected, rtol=1e-5, atol=1e-5)


def test_eval_is_batch_norm_and_moves_nothing():
    renorm, x = layer(), batch()
    before = {k: v.clone() for k, v in renorm.state_dict().items()}
    args = renorm.running_mean, renorm.running_var, renorm.weight, renorm.bias
    torch.testing.assert_close(renorm.eval()(x), F.batch_norm(x, *args, eps=1e-3))
    assert all(torch.equal(v, before[k]) for k, v in renorm.state_dict().items())


@pytest.mark.parametrize(
    "position, expected",
    [
        (("input",), "N0 L R L R L"),
        (("pre",), "L N1 R L N2 R L"),
        (("post",), "L R N1 L R N2 L"),
        (("input", "post"), "N0 L R N1 L R N2 L"),
        (("input", "pre", "post"), "N0 L N1 R N1 L N2 R N2 L"),
    ],
)
@pytest.mark.parametrize("norm", ["batchnorm", "batchrenorm", "layernorm"])
def test_positions(norm, position, expected):
    net = nn.Sequential(*ddpg_bn.hidden_layers(5, 6, 7), ddpg_bn.final_layer(7, 1))
    args = ddpg_bn.Args(norm=norm, norm_position=position, bn_momentum=0.03)
    kind = {"batchrenorm": ddpg_bn.BatchRenorm, "layernorm": nn.LayerNorm}
    kind = kind.get(norm, nn.BatchNorm1d)
    words = []
    for module in ddpg_bn.add_norm(net, "critic", args):
        if type(module) is kind:
            features = getattr(module, "num_features", None) or module.normalized_shape[0]
            words.append(f"N{(5, 6, 7).index(features)}")
            assert norm == "layernorm" or module.momentum == 0.03
        else:
            words.append(type(module).__name__[0])
    assert " ".join(words) == expected


def test_default_position_is_post():
    net = nn.Sequential(*ddpg_bn.hidden_layers(5, 6))
    named = [
        type(x).__name__ for x in ddpg_bn.add_norm(net, "actor", ddpg_bn.Args(norm="layernorm"))
    ]
    assert named == ["Linear", "ReLU", "LayerNorm"]


@pytest.mark.parametrize("norm", ["none", "zfilter", "fixed"])
def test_filters_add_no_layer(norm):
    net = nn.Sequential(*ddpg_bn.hidden_layers(5, 6))
    assert ddpg_bn.add_norm(net, "actor", ddpg_bn.Args(norm=norm)) is net
