"""PPO in one file (Schulman et al. 2017, Proximal Policy Optimization Algorithms).

Run:
  python ppo_bn.py --env HalfCheetah-v4
  python ppo_bn.py --resume runs/HalfCheetah-v4/ppo_bn/RUN
  python ppo_bn.py --norm zfilter --reward-norm  # NORM flag: as usual on MuJoCo
  python ppo_bn.py --norm batchnorm  # NORM flag: acts by running statistics
  python ppo_bn.py --norm batchnorm --bn-rollout train  # NORM flag: by those of the moment

Implementation details, sections and equations of the paper (arXiv 1707.06347) unless said:
  (1) Environments act in parallel, --num-steps each; learning sees that rollout only (Algorithm 1).
  (2) A time-out is not a death: gamma V(s') is added to the last reward, s' being the true last
      observation (Pardo et al. 2018, arXiv 1712.00378).
  (3) Advantages: TD errors summed with weights (gamma lambda)^k, cut at both kinds of end (Eq. 11).
  (4) Values are fitted to advantage + old value; their change is not clipped (no gain in
      Andrychowicz et al. 2021, arXiv 2006.05990).
  (5) Epochs over shuffled minibatches of equal size; advantages standardized in each.
  (6) Actor: ascends min(ratio A, clip(ratio) A); the old log-probability is that of acting (Eq. 7).
  (7) Entropy bonus: off, since --entropy-coef is 0 (Eq. 9).
  (8) Discrete actions: a categorical policy. Continuous: a Gaussian whose deviation, 0.5 at first
      (Andrychowicz et al. 2021), does not depend on the state; actions scaled from [-1, 1] to the
      environment's bounds and clipped there, but not in the log-probability.
  (9) Orthogonal weights; small last layer of the actor (0.01), so at first states matter little.
  (10) One Adam with epsilon 1e-5 for both networks, a gradient no longer than 0.5, and a learning
       rate that falls to zero linearly (Engstrom et al. 2020, arXiv 2005.12729).
  (11) Early stop when an epoch's mean KL divergence exceeds --target-kl (off at 0; CleanRL asks
       that of the last minibatch).
  (12) Hyperparameters are the paper's for MuJoCo (Table 3, Sec. 6.1), its rollout of 2048 steps
       from 16 environments.
"""

import contextlib
import copy  # NORM report: diagnostics work on copies
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from zfilter import RunningStat, ZFilter  # NORM obs: the one file that the scripts share

ACTIVATION = nn.Tanh  # of hidden layers
torch.distributions.Distribution.set_default_validate_args(False)  # divergence is a result

# ------------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    env: str = "HalfCheetah-v4"  # Gymnasium id of the environment
    seed: int = 1  # seeds environments, torch and numpy's generator of the run
    total_steps: int = 1_000_000  # environment steps to train for
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one
    eval_every: int = 50_000  # steps between evaluations; 0 for one at the end only
    eval_episodes: int = 10  # episodes of an evaluation, without noise, from the same starts
    run_dir: str = ""  # folder of the run; default: a new one in runs/<env>/<script>
    save_every: int = 200_000  # steps between checkpoints, after which all episodes begin anew
    resume: str = ""  # folder of a run to continue with its own options, or to a higher total_steps
    # NORM begin: flag: what normalizes, where it stands, and whose statistics each pass uses

    # what normalizes: layers in the networks, or (zfilter, fixed) a filter on the observations
    norm: Literal["none", "batchnorm", "batchrenorm", "layernorm", "zfilter", "fixed"] = "none"
    # where layers stand: on the input, before or after each hidden activation; default: post
    norm_position: tuple[Literal["input", "pre", "post"], ...] = ()
    norm_net: Literal["both", "actor", "critic"] = "both"  # which network has the layers
    norm_stats: str = ""  # fixed: the obs_stats.npz of an earlier run
    # weight of the newest batch in the running statistics (torch's sense; TF and JAX: 1 - this)
    bn_momentum: float = 0.1
    # batchrenorm: a layer's first passes in train mode, which are batch norm (CrossQ: 100000)
    bn_warmup: int = 100_000
    # acting uses the running statistics, or (train) those of all environments at that moment, which
    # also move the running ones
    bn_rollout: Literal["eval", "train"] = "eval"
    # learning uses the statistics of its batch, which also move the running ones, or (eval) the
    # running ones; with both in eval mode nothing but --bn-recalibrate moves these, and a learnt
    # scale and shift remain
    bn_update: Literal["train", "eval"] = "train"
    # passes in train mode over the last batch as a whole, without learning, before the final
    # evaluation; statistics approach the batch's at the rate of --bn-momentum
    bn_recalibrate: int = 0
    reward_norm: bool = False  # divide rewards by the running deviation of their discounted sums
    # NORM end
    network: Literal["linear", "mlp", "cnn"] = "mlp"  # cnn: a convolution, for observed images
    num_envs: int = 16  # environments that act in parallel (1)
    num_steps: int = 128  # steps of each environment in a rollout (1)
    epochs: int = 10  # passes of learning over a rollout (5)
    minibatches: int = 32  # gradient steps in an epoch (5)
    learning_rate: float = 3e-4  # Adam's, at the start (10)
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # how slowly later TD errors fade from an advantage (3)
    clip: float = 0.2  # largest change of the ratio that is rewarded (6)
    value_coef: float = 0.5  # weight of the critic's loss
    entropy_coef: float = 0.0  # weight of the entropy bonus (7)
    target_kl: float = 0.0  # mean divergence that ends the epochs; 0 for never (11)
    hidden_sizes: tuple[int, ...] = (64, 64)  # width of each hidden layer
    max_grad_norm: float = 0.5  # longest gradient of a step; 0 for any length


# NORM begin: layer: what --norm builds, and where --norm-position puts it
# --------------------------------------------------------------------------- Normalization layers


class BatchRenorm(nn.BatchNorm1d):
    """Batch renormalization (Ioffe 2017, arXiv 1702.03275), with the constants of CrossQ.

    Training: y = gamma (x_hat r + d) + beta, where x_hat is batch norm's and the constants
    r = std_B / std and d = (mean_B - mean) / std lead to the running statistics: with r and d
    unclipped, train and eval mode agree. r = 1 and d = 0, as in the warm-up, is batch norm, with
    epsilon 1e-3 where torch's has 1e-5, and a biased running variance where torch's is not.
    """

    r_max, d_max = 3.0, 5.0

    def __init__(self, features, momentum, warmup):
        super().__init__(features, eps=1e-3, momentum=momentum)
        self.warmup = warmup

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            # the kernel behind batch_norm returns its statistics; torch.var_mean is far slower
            _, mean, rstd = torch.native_batch_norm(x, None, None, None, None, True, 0.0, self.eps)
            std = (self.running_var + self.eps).sqrt()
            warm = self.num_batches_tracked >= self.warmup
            r = (1 / (rstd * std)).clamp(1 / self.r_max, self.r_max).where(warm, 1.0)
            d = ((mean - self.running_mean) / std).clamp(-self.d_max, self.d_max).where(warm, 0.0)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(rstd**-2 - self.eps, self.momentum)
            self.num_batches_tracked += 1
        gamma, beta = self.weight * r, self.weight * d + self.bias
        return nn.functional.batch_norm(x, None, None, gamma, beta, True, 0.0, self.eps)


def norm_layer(weight, args, features=None):
    """Return a layer that normalizes what the layer with this weight puts out, or `features`."""
    features, is_image = features or weight.shape[0], weight.dim() == 4
    if args.norm == "batchnorm":
        kind = nn.BatchNorm2d if is_image else nn.BatchNorm1d
        return kind(features, momentum=args.bn_momentum)
    if args.norm == "batchrenorm":
        return BatchRenorm(features, args.bn_momentum, args.bn_warmup)
    return nn.GroupNorm(1, features) if is_image else nn.LayerNorm(features)


def add_norm(net, name, args):
    """Return the layers of net with normalization layers at --norm-position, if it has any."""
    if args.norm in ("none", "zfilter", "fixed") or args.norm_net not in ("both", name):
        return net
    weight, position = net[0].weight, args.norm_position or ("post",)
    layers = [norm_layer(weight, args, weight.shape[1])] if "input" in position else []
    for layer in net:
        weight = getattr(layer, "weight", weight)
        is_hidden = isinstance(layer, ACTIVATION)
        layers += [norm_layer(weight, args)] if is_hidden and "pre" in position else []
        layers += [layer]
        layers += [norm_layer(weight, args)] if is_hidden and "post" in position else []
    return nn.Sequential(*layers)


# NORM end
# --------------------------------------------------------------------------------------- Networks


def hidden_layers(*sizes):
    """Return linear layers, each activated, that lead from sizes[0] features to sizes[-1]."""
    pairs = itertools.pairwise(sizes)
    return [layer for pair in pairs for layer in (nn.Linear(*pair), ACTIVATION())]


def make_net(obs_shape, outputs, gain, args):
    """Return --network; weights are orthogonal, those of the last layer scaled by gain (9)."""
    layers, sizes = [], (math.prod(obs_shape), *args.hidden_sizes)
    if args.network == "linear":
        sizes = sizes[:1]
    if args.network == "cnn":
        layers = [nn.Conv2d(obs_shape[0], 16, 3), ACTIVATION(), nn.Flatten()]
        sizes = 16 * (obs_shape[1] - 2) * (obs_shape[2] - 2), *sizes[1:]
    layers += [*hidden_layers(*sizes), nn.Linear(sizes[-1], outputs)]
    for layer in layers:
        if hasattr(layer, "weight"):
            nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """pi(a|s): observations (n, *obs_shape) to n distributions over actions (8)."""

    def __init__(self, obs_shape, action_space, args):
        super().__init__()
        self.is_discrete = isinstance(action_space, gym.spaces.Discrete)
        outputs = int(action_space.n) if self.is_discrete else action_space.shape[0]
        self.net = make_net(obs_shape, outputs, 0.01, args)
        self.net = add_norm(self.net, "actor", args)  # NORM layer: on s
        if not self.is_discrete:
            self.log_std = nn.Parameter(torch.full((outputs,), math.log(0.5)))  # (8)

    def forward(self, obs):
        outputs = self.net(obs)
        if self.is_discrete:
            return torch.distributions.Categorical(logits=outputs)
        normal = torch.distributions.Normal(outputs, self.log_std.exp())
        return torch.distributions.Independent(normal, 1)


class Critic(nn.Module):
    """V(s): observations (n, *obs_shape) to values, (n,)."""

    def __init__(self, obs_shape, args):
        super().__init__()
        self.net = make_net(obs_shape, 1, 1.0, args)
        self.net = add_norm(self.net, "critic", args)  # NORM layer: on s

    def forward(self, obs):
        return self.net(obs).squeeze(1)


def make_agent(envs, args, device):
    """Return networks and their optimizer."""
    obs_shape = envs.single_observation_space.shape
    actor = Actor(obs_shape, envs.single_action_space, args).to(device)
    critic = Critic(obs_shape, args).to(device)
    agent = SimpleNamespace(actor=actor, critic=critic, device=device, env=args.env)
    parameters = [*actor.parameters(), *critic.parameters()]
    agent.optimizer = Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    agent.obs_stat = RunningStat(obs_shape)  # NORM obs: every run counts the states it meets
    agent.obs_filter = make_filter(agent.obs_stat, args)  # NORM obs: for most --norm the identity
    agent.reward_scale = RewardScale(args)  # NORM reward: for --reward-norm
    agent.reward_stat = agent.reward_scale.stat  # NORM reward: which the checkpoint keeps
    return agent


# ------------------------------------------------------------------------------------------- Data


# NORM begin: obs: what stands between an observation and the networks
def make_filter(obs_stat, args):
    """Return the filter of --norm: zfilter learns with obs_stat, fixed never; else the identity."""
    active = args.norm in ("zfilter", "fixed")
    obs_filter = ZFilter(obs_stat.mean.shape, active, active, 10.0 if active else None)
    if args.norm == "zfilter":
        obs_filter.stat = obs_stat
    if args.norm == "fixed" and not args.resume:
        try:
            obs_filter.stat.load(args.norm_stats, env=args.env)
        except Exception as error:
            fail(f"--norm-stats {args.norm_stats}: no statistics for --env {args.env} ({error})")
    return obs_filter


# NORM end
# NORM begin: reward: rewards are scaled, never shifted, which would change what is optimal
class RewardScale:
    """Divides rewards by the running deviation of their discounted sums, and clips at 10 of these.

    Source: VecNormalize of OpenAI baselines.
    """

    def __init__(self, args):
        self.stat, self.gamma = RunningStat(()), args.gamma
        self.sums = np.zeros(args.num_envs)  # of each environment, since its episode began

    def __call__(self, reward, done):
        """Return rewards (n,) scaled, and learn from them; done, (n,), says whose episode ends."""
        self.sums = self.gamma * self.sums + reward
        self.stat.push(self.sums)
        self.sums[done] = 0
        return np.clip(reward / (self.stat.std + 1e-8), -10, 10)


# NORM end
# What n environments met at one step: obs (n, *obs_shape), action (n, ...), the others (n,).
# Stacked, with an axis of time before that of the environments.
Rollout = namedtuple("Rollout", "obs action log_prob value reward done")

# What is learnt from: obs (n, *obs_shape), action (n, ...), the others (n,).
Batch = namedtuple("Batch", "obs action log_prob advantage returns")


# ----------------------------------------------------------------------------- Losses and updates


def as_input(agent, obs):
    """Return observations (n, *obs_shape) as the networks take them."""
    obs = agent.obs_filter(obs, update=False)  # NORM obs: what a rollout stores is filtered already
    return torch.as_tensor(obs, dtype=torch.float32, device=agent.device)


@torch.no_grad()
def act(agent, obs):
    """Return the likeliest actions, (n, ...), for observations (n, *obs_shape)."""
    agent.actor.eval()  # NORM mode: what a policy does depends on the state alone
    return agent.actor(as_input(agent, obs)).mode.cpu().numpy()


@torch.no_grad()
def explore(agent, obs, args):
    """Return what the policy saw, pi(.|s) and V(s), for observations (n, *obs_shape)."""
    # NORM obs: what the policy saw is stored, not the raw observation; by a later filter this would
    # NORM obs: get another log-probability, as if another policy had acted.
    obs = as_input(agent, obs)
    agent.actor.train(args.bn_rollout == "train")  # NORM mode: --bn-rollout
    agent.critic.train(args.bn_rollout == "train")  # NORM mode: --bn-rollout
    return obs, agent.actor(obs), agent.critic(obs)


@torch.no_grad()
def state_value(agent, obs, args):
    """Return V(s), (n,), as a bootstrap, for observations (n, *obs_shape)."""
    agent.critic.train(args.bn_rollout == "train")  # NORM mode: that of the values in explore
    return agent.critic(as_input(agent, obs))


def gae(reward, value, done, gamma, gae_lambda):
    """Return advantages (T, n) for rewards and ends, (T, n), and values, (T + 1, n) (3)."""
    delta = reward + gamma * (1 - done) * value[1:] - value[:-1]
    advantage, after = torch.empty_like(delta), 0.0
    for t in reversed(range(len(delta))):
        advantage[t] = after = delta[t] + gamma * gae_lambda * (1 - done[t]) * after
    return advantage


def make_batch(rollout, last_value, args):
    """Return the Batch of a rollout, last_value (n,) being V of the observations after it."""
    value = torch.cat([rollout.value, last_value.unsqueeze(0)])
    advantage = gae(rollout.reward, value, rollout.done, args.gamma, args.gae_lambda)
    parts = rollout.obs, rollout.action, rollout.log_prob, advantage, advantage + rollout.value
    return Batch(*(x.flatten(0, 1) for x in parts))


def policy_loss(log_prob, batch, args):
    """Return the clipped loss (6) and the ratios pi(a|s) / pi_old(a|s), (n,)."""
    ratio, a = (log_prob - batch.log_prob).exp(), batch.advantage
    a = (a - a.mean()) / (a.std() + 1e-8)  # (5)
    return -torch.min(ratio * a, ratio.clamp(1 - args.clip, 1 + args.clip) * a).mean(), ratio


def gradient_step(optimizer, loss, max_grad_norm):
    """Descend the loss, by a gradient no longer than max_grad_norm unless that is 0."""
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()


def update(agent, batch, rng, args):
    """Learn from a rollout; return losses (kl: the last epoch's) and the gradient steps taken."""
    # NORM report: first_ratio is max |ratio - 1| in the first minibatch, before weights change:
    # NORM report: what differs from 1 is another mode, or other batch statistics.
    agent.actor.train(args.bn_update == "train")  # NORM mode: --bn-update
    agent.critic.train(args.bn_update == "train")  # NORM mode: --bn-update
    taken = 0
    for _ in range(args.epochs):
        rows, divergences = rng.permutation(len(batch.obs)), []
        parts = (x[rows].chunk(args.minibatches) for x in batch)
        for part in map(Batch._make, zip(*parts, strict=True)):
            policy = agent.actor(part.obs)
            loss_pi, ratio = policy_loss(policy.log_prob(part.action), part, args)
            loss_v = (agent.critic(part.obs) - part.returns).square().mean()  # (4)
            entropy = policy.entropy().mean()
            loss = loss_pi + args.value_coef * loss_v - args.entropy_coef * entropy  # (7)
            gradient_step(agent.optimizer, loss, args.max_grad_norm)
            ratio = ratio.detach()
            divergences.append((ratio - 1 - ratio.log()).mean())  # Schulman's estimate of KL
            taken += 1
            if taken == 1:  # NORM report: this ratio is from before the step
                first_ratio = (ratio - 1).abs().max()  # NORM report: 0 if the policy is the same
        kl = torch.stack(divergences).mean()
        if args.target_kl and kl > args.target_kl:  # (11)
            break
    losses = {"policy": loss_pi.detach(), "critic": loss_v.detach(), "entropy": entropy.detach()}
    losses |= {"kl": kl, "clipped": ((ratio - 1).abs() > args.clip).float().mean()}
    losses["first_ratio"] = first_ratio  # NORM report: see above
    return losses, taken


# --------------------------------------------------------------------- Evaluation and diagnostics


def evaluate(agent, envs):
    """Play an episode in each environment, from the same starts at every call, and learn nothing.

    Returns the sums of rewards, (n,).
    """
    obs, _ = envs.reset(seed=1_000_000)
    returns, playing = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    while playing.any():
        obs, reward, terminated, truncated, _ = envs.step(act(agent, obs))
        returns[playing] += reward[playing]
        done = terminated | truncated
        playing &= ~done
        if done.any():
            obs, _ = envs.reset(options={"reset_mask": done})
    return returns


# NORM begin: report: what normalization does to a run, made visible
PANELS = {
    "Normalization": {
        "lag of running statistics": ["Multiline", ["norm/stat_lag"]],
        "gap between train and eval mode": ["Multiline", ["norm/train_eval_gap_.*"]],
        "first |ratio - 1|": ["Multiline", ["norm/first_ratio"]],
        "distance of acting from learning": ["Multiline", ["norm/moment_gap"]],
        "saturation and dead units": ["Multiline", ["norm/saturation", "norm/dead_units"]],
        "return by mode": ["Multiline", ["norm/return_.*_mode"]],
    },
    "Learning": {"return": ["Multiline", ["eval/return$", "charts/episodic_return"]]},
}


@torch.no_grad()
def probe(net, *inputs):
    """Run a copy of net on one batch. Returns three things:

    mean |train-mode output - eval-mode output|, in the output's units;
    for each batch norm, running mean and deviation before the pass, and the batch's own;
    for each layer of ReLUs, the share that no sample activates (these two in train mode).
    """
    net, found, dead = copy.deepcopy(net), [], []

    def keep(layer, inputs):
        x = inputs[0].movedim(1, -1).flatten(0, -2)  # an image counts as many samples
        var, mean = torch.var_mean(x, 0, correction=0)
        old_std, std = ((v + layer.eps).sqrt() for v in (layer.running_var, var))
        found.append((layer.running_mean.clone(), old_std, mean, std))

    def count_dead(layer, inputs, output):
        dead.append((output <= 0).all(0).float().mean().item())

    eval_output = net.eval()(*inputs)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.register_forward_pre_hook(keep)
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(count_dead)
    return (net.train()(*inputs) - eval_output).abs().mean().item(), found, dead


def moment_gap(net, moments, obs):
    """Return how far apart the statistics of acting and of learning are, both in train mode:

    |mean of the environments at a moment - mean of the batch obs| / deviation of the batch, mean
    over features, layers and moments, (T, n, *obs_shape). Chance alone makes it 0.8 / sqrt(n).
    """
    learnt, gaps = probe(net, obs)[1], []
    for moment in moments:
        for (*_, acted, _), (*_, mean, std) in zip(probe(net, moment)[1], learnt, strict=True):
            gaps.append(((acted - mean).abs() / std).mean().item())
    return np.mean(gaps)


@torch.no_grad()
def norm_scalars(agent, rollout, obs):
    """Return {name: value} of the normalization panel, from the last rollout, obs a part of it:

    train_eval_gap_policy, _v and dead_units: see `probe`, means over layers.
    stat_lag: |running mean - batch mean| / batch deviation, mean over features, then layers.
    moment_gap: see there; of the actor, whether or not it acted in train mode.
    saturation: share of the components of the mean action in the outer 1 % or beyond a bound.
    """
    gap_policy, found, dead = probe(agent.actor.net, obs)
    gap_v, more, more_dead = probe(agent.critic.net, obs)
    scalars = {"train_eval_gap_policy": gap_policy, "train_eval_gap_v": gap_v}
    lags = [((old - mean).abs() / std).mean().item() for old, _, mean, std in found + more]
    if lags:
        scalars["stat_lag"] = np.mean(lags)
    if dead + more_dead:
        scalars["dead_units"] = np.mean(dead + more_dead)
    if found:
        moments = rollout.obs[:: len(rollout.obs) // 8 + 1]
        scalars["moment_gap"] = moment_gap(agent.actor.net, moments, obs)
    if not agent.actor.is_discrete:
        action = agent.actor.eval()(obs).mode
        scalars["saturation"] = (action.abs() > 0.98).float().mean().item()
    return scalars


class InTrainMode(nn.Module):
    """An actor that is in train mode even after eval(), and whose running statistics never move."""

    def __init__(self, actor):
        super().__init__()
        self.actor = actor

    def forward(self, obs):
        return copy.deepcopy(self.actor).train()(obs)


@torch.no_grad()
def recalibrate(agent, obs, passes):
    """Move the running statistics of actor and critic by passes over obs, without learning."""
    for _ in range(passes):
        for net in (agent.actor, agent.critic):
            net.train()(obs)


def report_warmup(agent):
    """Say so if layers of batch renormalization never left their warm-up."""
    modules = *agent.actor.modules(), *agent.critic.modules()
    layers = [layer for layer in modules if isinstance(layer, BatchRenorm)]
    warming = sum(0 < int(layer.num_batches_tracked) <= layer.warmup for layer in layers)
    if warming:
        print(f"{warming} of {len(layers)} layers were batch norm to the end: lower --bn-warmup")


# NORM end
# ------------------------------------------------------------------------------------- Checkpoint

PARTS = "actor", "critic", "optimizer"
PARTS += "obs_stat", "obs_filter", "reward_stat"  # NORM save: a policy needs its statistics


def write(path, save):
    """Let save(file) fill a new file, then move it into place: a kill leaves the old or the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        with contextlib.suppress(OSError):  # a read-only disk refuses this, too
            temporary.unlink()
        sys.exit(f"{path} is not written, what stood there stands: {error}")


def save_run(run_dir, agent, generators, progress, writer):
    """Write all that a run needs to go on as if it had never stopped."""
    state = {part: getattr(agent, part).state_dict() for part in PARTS}
    cuda = [torch.cuda.get_rng_state()] if agent.device == "cuda" else []
    state |= {"env": agent.env, "progress": progress, "torch": torch.get_rng_state(), "cuda": cuda}
    state["generators"] = [generator.bit_generator.state for generator in generators]
    # NORM begin: save: for people, and for --norm fixed
    write(run_dir / "obs_stats.npz", lambda file: agent.obs_stat.save(file, env=agent.env))
    # NORM end
    # events first, since a resumed run writes only those that follow
    write(run_dir / "checkpoint.pt", lambda file: (writer.flush(), torch.save(state, file)))


def load_run(run_dir, agent, generators):
    """Restore what `save_run` wrote and return its progress; nothing in the file is executed."""
    try:
        state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        if state["env"] != agent.env:
            raise ValueError(f"it is of {state['env']}")
        for part in PARTS:
            getattr(agent, part).load_state_dict(state[part])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state_all(state["cuda"])
        for generator, saved in zip(generators, state["generators"], strict=True):
            generator.bit_generator.state = saved
        step, updates, evaluations = state["progress"]
    except Exception as error:
        fail(f"--resume {run_dir}: no checkpoint.pt that fits ({error!r:.200})")
    return step, updates, evaluations


def saved_args(run_dir):
    """Return the options of the run in run_dir; end with one line if it is no run of ours."""
    try:
        saved = json.loads((Path(run_dir) / "args.json").read_text())["args"]
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        args = Args(**saved | {"resume": str(run_dir)})
        check(replace(args, device="cpu"))
        return args
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        fail(f"--resume {run_dir}: no run of {Path(__file__).name} ({error})")


def make_run_dir(args):
    """Make and return the folder of a new run; no two runs get the same."""
    name = f"seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    # NORM begin: flag: the name of a run says how it is normalized
    changed = changed_norm_options(replace(args, norm_stats=""))
    words = [f"{k}={'+'.join(v) if k == 'norm_position' else v}" for k, v in changed.items()]
    name = "-".join([args.norm, *words, name])
    # NORM end
    run_dir = Path(args.run_dir or Path("runs") / args.env / Path(__file__).stem / name)
    for k in itertools.count(2):
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except OSError as error:
            if args.run_dir or not os.path.isdir(run_dir):  # False where it may not look
                fail(f"--run-dir {run_dir} cannot be made ({error.strerror}): choose another one")
        run_dir = run_dir.with_name(f"{name}-{k}")


def open_run(args):
    """Return the folder of a new run, or of the one to resume if its options are the same."""
    if not args.resume:
        return make_run_dir(args)
    saved = asdict(saved_args(args.resume))
    free = "total_steps", "eval_every", "eval_episodes", "save_every", "device"
    for name, value in asdict(args).items():
        if value != saved[name] and name not in free:
            fail(f"--{name.replace('_', '-')} cannot change when a run resumes: leave it out")
    if args.total_steps < saved["total_steps"]:
        fail(f"--total-steps {args.total_steps} is less than the run's {saved['total_steps']}")
    return Path(args.resume)


def describe_run(run_dir, args):
    """Write args.json, with options and versions; the run is not finished, so has no result."""
    names = "torch", "gymnasium", "mujoco", "numpy"  # mujoco only where the environment uses it
    about = {"script": Path(__file__).stem, "args": asdict(replace(args, resume=""))}
    about["versions"] = {x: sys.modules[x].__version__ for x in names if x in sys.modules}
    text, old = json.dumps(about, indent=2), run_dir / "result.json"
    write(run_dir / "args.json", lambda file: (old.unlink(True), file.write(text.encode())))


# ------------------------------------------------------------------------------------- Command line

LIMITS = (  # lowest and highest value of options
    (0, 2**32 - 1, "seed"),
    (0, 10**12, "eval_every"),
    (1, 10**12, "total_steps save_every"),
    (1, 10**6, "num_steps epochs minibatches"),
    (1, 10**4, "eval_episodes num_envs hidden_sizes"),
    (0, 1, "learning_rate gamma gae_lambda"),
    (0, 1e6, "clip value_coef entropy_coef target_kl max_grad_norm"),
    (0, 1, "bn_momentum"),  # NORM flag: a weight
    (0, 10**12, "bn_warmup bn_recalibrate"),  # NORM flag: counts
)


def fail(message):
    """End with exit code 2 and one line that says what to do."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(**default):
    """Return the options of the command line; of tyro's box about a mistake print one line."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as box:
            return tyro.cli(Args, **default)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        rows = (row[1:-1].strip() for row in box.getvalue().splitlines()[1:])  # without the frame
        fail(" ".join(row for row in rows if row.strip("─-")))


# NORM begin: flag: what was asked for beyond --norm
def changed_norm_options(args):
    """Return {name: value} of the options of normalization that are not at their defaults."""
    names = [k for k in vars(args) if k.startswith(("norm_", "bn_", "reward_norm"))]
    return {k: getattr(args, k) for k in names if getattr(args, k) != getattr(Args, k)}


# NORM end
def check(args):
    """End with one line if an option is out of range or options make no sense together."""
    for name, kind in Args.__annotations__.items():
        kind = get_args(kind)[0] if get_origin(kind) is tuple else kind  # NORM flag: norm_position
        for value in np.atleast_1d(getattr(args, name)) if get_origin(kind) is Literal else ():
            if value not in get_args(kind):
                fail(f"--{name.replace('_', '-')} {value}: choose from {get_args(kind)}")
    for low, high, names in LIMITS:
        for name in names.split():
            if not all(low <= value <= high for value in np.atleast_1d(getattr(args, name))):
                fail(f"--{name.replace('_', '-')} is out of range: choose from {low} to {high}")
    if not args.hidden_sizes:
        fail("--hidden-sizes needs at least one width")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda finds no GPU: use --device cpu")
    if args.network == "linear" and args.hidden_sizes != Args.hidden_sizes:
        fail("--hidden-sizes needs hidden layers: drop --network linear")
    steps = args.num_envs * args.num_steps
    if steps % args.minibatches:
        fail(f"--minibatches {args.minibatches} must divide --num-envs x --num-steps, {steps}")
    if steps < 2 * args.minibatches:
        fail(f"--minibatches {args.minibatches} leaves one sample in each: use fewer")
    # NORM begin: flag: a switch that could change nothing is a mistake
    is_batch, changed = args.norm.startswith("batch"), changed_norm_options(args)
    nothing_moves = args.bn_rollout == args.bn_update == "eval" and not args.bn_recalibrate
    if len(set(args.norm_position)) < len(args.norm_position):
        fail("--norm-position names a place twice: name it once")
    if "bn_warmup" in changed and args.norm != "batchrenorm":
        fail("--bn-warmup needs --norm batchrenorm")
    for name in changed:
        option = "--" + name.replace("_", "-")
        if name.startswith("bn_") and not is_batch:
            fail(f"{option} needs --norm batchnorm or batchrenorm, not {args.norm}")
        if name in ("norm_position", "norm_net") and args.norm in ("none", "zfilter", "fixed"):
            fail(f"{option} needs --norm batchnorm, batchrenorm or layernorm, not {args.norm}")
        if name in ("bn_momentum", "bn_warmup") and nothing_moves:
            fail(f"{option} needs a pass in train mode: drop --bn-update eval")
    if (args.norm == "fixed") != bool(args.norm_stats):
        fail("--norm fixed and --norm-stats runs/.../obs_stats.npz need each other")
    has_layers = is_batch or args.norm == "layernorm"
    if has_layers and args.network == "linear" and args.norm_position != ("input",):
        fail("--network linear has no hidden layer: use --norm-position input")
    if args.network == "cnn" and args.norm == "batchrenorm":
        fail("--norm batchrenorm is for vectors: use --norm batchnorm with --network cnn")
    if is_batch and args.num_envs < 2:
        fail("--num-envs 1 has no batch statistics, which diagnostics need: use 2 or more")
    if args.bn_recalibrate and args.norm_net == "critic":
        fail("--bn-recalibrate needs batch norm in the actor: drop --norm-net critic")
    # NORM end


# ------------------------------------------------------------------------------------------ Train


class Checked(gym.Wrapper):
    """Clips actions to their bounds, and ends an episode by reward NaN where float32 cannot go on.

    That is at an observation of 1e18, whose square nears its limit, a reward of 1e38, or where one
    of them or the action is NaN.
    """

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.is_sound = (np.abs(obs) < 1e18).all()  # NaN is not less
        return obs if self.is_sound else np.zeros_like(obs), info

    def step(self, action):
        space = self.action_space
        if isinstance(space, gym.spaces.Box):
            action = np.clip(action, space.low, space.high)  # a Gaussian, or rounding, crosses them
        if self.is_sound and np.isfinite(action).all():
            obs, reward, terminated, truncated, info = self.env.step(action)
            if (np.abs(obs) < 1e18).all() and abs(reward) < 1e38:
                return obs, reward, terminated, truncated, info
        nothing = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        return nothing, math.nan, True, False, {}


def is_scalable(space):
    """Whether the actions in this space are vectors that can be scaled from [-1, 1]."""
    if not isinstance(space, gym.spaces.Box) or space.dtype.kind != "f" or len(space.shape) != 1:
        return False
    width = np.float64(space.high) - np.float64(space.low)
    return bool(((width > 0) & (width < 1e38)).all())


def make_env(args):
    """Return one environment; end with one line if it is unknown or does not suit the algorithm."""
    try:
        env = Checked(gym.make(args.env))
    except Exception as error:
        fail(f"--env {args.env} cannot be made: {error}")
    obs_space, action_space = env.observation_space, env.action_space
    is_image = len(obs_space.shape or ()) == 3 and min(obs_space.shape[:2]) >= 3
    if not isinstance(obs_space, gym.spaces.Box) or (args.network == "cnn" and not is_image):
        fail(f"--env {args.env} observes {obs_space}: --network {args.network} cannot use it")
    if is_scalable(action_space):
        low, high = action_space.low, action_space.high
        box = gym.spaces.Box(-1, 1, low.shape)  # (8), before scaling
        env = gym.wrappers.TransformAction(env, lambda a: (low + high + a * (high - low)) / 2, box)
    elif not isinstance(action_space, gym.spaces.Discrete) or action_space.start != 0:
        fail(f"--env {args.env} acts in {action_space}: choose discrete or bounded actions")

    def as_float(obs):  # a vector, or an image with channels first
        return np.float32(np.moveaxis(obs, -1, 0) if args.network == "cnn" else np.ravel(obs))

    box = gym.spaces.Box(-np.inf, np.inf, as_float(np.zeros(obs_space.shape)).shape)
    env = gym.wrappers.TransformObservation(env, as_float, box)
    return gym.wrappers.RecordEpisodeStatistics(env)


def make_envs(args, n):
    """Return n environments that step together; each is reset by a mask when its episode ends."""
    mode = gym.vector.AutoresetMode.DISABLED  # so a step returns the true last observation
    return gym.vector.SyncVectorEnv([lambda: make_env(args)] * n, autoreset_mode=mode)


def is_finite(agent):
    """Whether every weight is a finite number."""
    return all(x.isfinite().all() for x in (*agent.actor.parameters(), *agent.critic.parameters()))


def report_evaluation(agent, envs, args, step, writer, bar):
    """Evaluate, log and show it; return (step, mean return, std over episodes).

    writer: None if the events have this evaluation already.
    """
    returns = evaluate(agent, envs)
    mean, std = float(returns.mean()), float(returns.std())
    if writer:
        writer.add_scalar("eval/return", mean, step)
        writer.add_scalar("eval/return_std", std, step)
    bar.set_postfix_str(f"return {mean:.1f} ± {std:.1f}")
    if bar.disable and step < args.total_steps:  # no terminal to draw on
        print(f"step {step} of {args.total_steps}: return {mean:.1f} ± {std:.1f}", flush=True)
    return step, mean, std


# NORM begin: report: one policy, evaluated in each mode
def report_modes(agent, args, obs, step, writer):
    """Log and print the final policy's return in eval mode, train mode, and recalibrated.

    The last needs --bn-recalibrate, and stays. All in --num-envs environments, as in training.
    """
    if args.norm_net == "critic":
        return  # the policy has no modes
    envs = make_envs(args, args.num_envs)
    in_train_mode = SimpleNamespace(**vars(agent) | {"actor": InTrainMode(agent.actor)})
    returns = {"eval": evaluate(agent, envs), "train": evaluate(in_train_mode, envs)}
    if args.bn_recalibrate:
        recalibrate(agent, obs, args.bn_recalibrate)
        returns["recalibrated"] = evaluate(agent, envs)
    for name, values in returns.items():
        writer.add_scalar(f"norm/return_{name}_mode", values.mean(), step)
    words = [f"{name} {x.mean():.1f} ± {x.std():.1f}" for name, x in returns.items()]
    print("return by mode of batch norm: " + ", ".join(words))


# NORM end
def train(args, stop=()):
    """Train a policy, and return what the run came to:

    {"run_dir": str, "eval": [(step, mean return, std over episodes), ...], "steps": int,
    "updates": int, "diverged": bool}. Raises SystemExit(2) for options that make no sense. Once
    the list stop is no longer empty, the run saves itself as soon as it can be resumed, and ends.
    """
    check(args)
    envs, eval_envs = make_envs(args, args.num_envs), make_envs(args, args.eval_episodes)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    envs.reset(seed=args.seed)
    generators = rng, *(env.unwrapped.np_random for env in envs.envs)
    agent = make_agent(envs, args, device)
    run_dir = open_run(args)
    step, updates, evaluations, diverged = 0, 0, [], False
    if args.resume:
        step, updates, evaluations = load_run(run_dir, agent, generators)
        evaluations = [e for e in evaluations if e[0] < args.total_steps]  # the last is made anew
    describe_run(run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=step + 1 if args.resume else None)
    writer.add_custom_scalars(PANELS)  # NORM report: the normalization panel comes first
    if not args.resume:  # from now on a kill loses nothing that --resume cannot bring back
        save_run(run_dir, agent, generators, (step, updates, evaluations), writer)
    print(f"run: {run_dir}", flush=True)

    bar = tqdm(total=args.total_steps, initial=step, unit="step", smoothing=0.01, disable=None)
    start_time, start_step = time.time(), step
    obs = None  # episodes are to begin
    while step < args.total_steps:
        before, steps, episodes = step, [], []
        agent.optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.total_steps)
        if obs is None:
            obs, _ = envs.reset()
            agent.obs_stat.push(obs)  # NORM obs: each observation of training counts once
            agent.reward_scale.sums[:] = 0  # NORM reward: of episodes that begin
        for _ in range(args.num_steps):
            # act
            seen, policy, value = explore(agent, obs, args)
            action = policy.sample()
            # step
            next_obs, reward, terminated, truncated, info = envs.step(action.cpu().numpy())
            agent.obs_stat.push(next_obs)  # NORM obs: those of evaluation never do
            done = terminated | truncated
            step += args.num_envs
            bar.update(args.num_envs)
            if args.reward_norm:  # NORM reward: --reward-norm
                reward = agent.reward_scale(reward, done)  # NORM reward: what is learnt from
            # store
            timed_out = truncated & ~terminated
            if timed_out.any():
                after = state_value(agent, next_obs, args).cpu().numpy()
                reward = reward + args.gamma * timed_out * after  # (2)
            arrays = torch.as_tensor(np.float32([reward, done]), device=device)
            steps.append(Rollout(seen, action, policy.log_prob(action), value, *arrays))
            if done.any():
                episodes.append((info["episode"]["r"][done], info["episode"]["l"][done]))
                next_obs, _ = envs.reset(options={"reset_mask": done})
                agent.obs_stat.push(next_obs[done])  # NORM obs: an episode's first one counts too
            obs = next_obs
        # learn
        rollout = Rollout(*map(torch.stack, zip(*steps, strict=True)))
        batch = make_batch(rollout, state_value(agent, obs, args), args)
        losses, taken = update(agent, batch, rng, args)
        updates += taken
        finite = (x.isfinite().all() for x in (rollout.reward, losses["policy"], losses["critic"]))
        diverged = not (is_finite(agent) and all(finite))
        # report
        if diverged:
            break
        writer.add_scalar("charts/SPS", (step - start_step) / (time.time() - start_time), step)
        first_ratio = losses.pop("first_ratio")  # NORM report: it is no loss
        writer.add_scalar("norm/first_ratio", first_ratio, step)  # NORM report: see update
        for name, value in losses.items():
            writer.add_scalar(f"losses/{name}", value, step)
        rows = np.random.default_rng(step).permutation(len(batch.obs))  # NORM report: not the run's
        part = batch.obs[rows[: len(rows) // args.minibatches]]  # NORM report: one minibatch
        for name, value in norm_scalars(agent, rollout, part).items():  # NORM report: a panel
            writer.add_scalar(f"norm/{name}", value, step)  # NORM report: see norm_scalars
        if episodes:
            returns, lengths = map(np.concatenate, zip(*episodes, strict=True))
            writer.add_scalar("charts/episodic_return", returns.mean(), step)
            writer.add_scalar("charts/episodic_length", lengths.mean(), step)
        due = args.eval_every and step // args.eval_every > before // args.eval_every
        if due and step < args.total_steps:
            evaluations.append(report_evaluation(agent, eval_envs, args, step, writer, bar))
            diverged = not np.isfinite(evaluations[-1]).all()
            if diverged:
                break
        stopping = bool(stop)  # read once: a signal may come at any time
        due = step // args.save_every > before // args.save_every or stopping
        if due and step < args.total_steps:
            save_run(run_dir, agent, generators, (step, updates, evaluations), writer)
            obs = None  # a resumed run cannot go on within an episode, so neither does this one
        if stopping:
            break
    if step >= args.total_steps and not diverged:
        if args.norm.startswith("batch") and step > start_step:  # NORM report: after learning
            report_modes(agent, args, batch.obs, step, writer)  # NORM report: in each mode
        events = writer if step > start_step else None  # a finished run evaluated this step before
        evaluations.append(report_evaluation(agent, eval_envs, args, step, events, bar))
        diverged = not (is_finite(agent) and np.isfinite(evaluations[-1]).all())
    if diverged:
        what = "a loss, a weight, an observation, a reward or a return is not finite"
        print(f"diverged at step {step}: {what}", file=sys.stderr)
    elif step < args.total_steps:
        print(f"stopped at step {step}: --resume {run_dir} goes on")
    else:
        save_run(run_dir, agent, generators, (step, updates, evaluations), writer)
        report_warmup(agent)  # NORM report: of batchrenorm
        print("final evaluation at step {}: return {:.1f} ± {:.1f}".format(*evaluations[-1]))
    bar.close()
    writer.close()
    result = {"run_dir": str(run_dir), "eval": evaluations, "steps": step, "updates": updates}
    result["diverged"] = diverged
    if diverged or step >= args.total_steps:
        write(run_dir / "result.json", lambda file: file.write(json.dumps(result).encode()))
    print(f"files: {run_dir}\nlook:  tensorboard --logdir {run_dir}")
    return result


if __name__ == "__main__":
    args = parse()
    if args.resume:  # options not given again are those of the run
        args = parse(default=saved_args(args.resume))
    stop = []

    def save_and_stop(number, frame):
        os.write(2, b"saving as soon as possible, then stopping; again to stop at once\n")
        signal.signal(number, signal.SIG_DFL)
        stop.append(number)

    signal.signal(signal.SIGINT, save_and_stop)
    signal.signal(signal.SIGTERM, save_and_stop)
    result = train(args, stop)
    sys.exit(3 if result["diverged"] else 1 if result["steps"] < args.total_steps else 0)
