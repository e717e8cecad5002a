"""SAC in one file (Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications).

Run:
  python sac_bn.py --env Ant-v4
  python sac_bn.py --resume runs/Ant-v4/sac_bn/RUN
  From naive batch norm to CrossQ (Bhatt et al. 2024), options that add up:  # NORM flag: a ladder
  python sac_bn.py --env Ant-v4 --norm batchnorm  # NORM flag: naive
      --bn-policy-critic eval  # NORM flag: the actor's loss uses statistics that it cannot move
      --bn-joint  # NORM flag: (s, a) and (s', a') share statistics
      --no-target-network  # NORM flag: both halves of the joint pass come from one network
      --norm batchrenorm --norm-position input post --bn-momentum 0.01  # NORM flag: CrossQ's layers
      --adam-beta1 0.5 --policy-delay 3 --critic-hidden-sizes 2048 2048  # NORM flag: CrossQ
  Renormalization begins after a layer's 100000th training pass: until then  # NORM flag: warm-up
  CrossQ is batch norm, in the delayed actor for 300000 updates.  # NORM flag: warm-up

Implementation details, sections and equations of the paper (arXiv 1812.05905) unless said:
  (1) Replay of raw transitions, sampled uniformly (Algorithm 1).
  (2) Uniformly random actions at first (Spinning Up, TD3).
  (3) Exploration by the stochastic policy; evaluation by its median, tanh(mean) (SB3, Spinning Up).
  (4) Critics: squared distance from y = r + gamma (min Q'(s', a') - alpha log pi(a'|s')) (Eq. 5).
  (5) A time-out is not a death: y goes on through it (Pardo et al. 2018, arXiv 1712.00378).
  (6) Actor: descends alpha log pi(a|s) - min Q(s, a), reparameterized (Eq. 9).
  (7) Target networks follow slowly, at every update (Algorithm 1).
  (8) Temperature: descends -alpha (log pi(a|s) + target entropy) (Eq. 18).
  (9) Actions are a tanh of a Gaussian (Appendix C), scaled to the environment's bounds; the
      log-probability carries both, so that entropy is in the environment's units.

                 paper, Appendix D                  here
  learning rate  3e-4 all                           1e-3 all (the SAC beside CrossQ)
  hidden layers  256, 256                           the same
  batch, tau     256, 0.005                         the same
  gamma, replay  0.99, one million                  the same
  entropy        minus the action's dimension       the same number, but of scaled actions (9)
"""

import contextlib
import copy
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
import torch.nn.functional as F
import tyro
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from zfilter import RunningStat, ZFilter  # NORM obs: the one file that the scripts share

ACTIVATION = nn.ReLU  # of hidden layers
LOG_EVERY = 1000  # environment steps between two reports
torch.distributions.Distribution.set_default_validate_args(False)  # divergence is a result

# ------------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    env: str = "HalfCheetah-v4"  # Gymnasium id of the environment
    seed: int = 1  # seeds environment, action space, torch and numpy's generator of the run
    total_steps: int = 1_000_000  # environment steps to train for
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one
    eval_every: int = 10_000  # steps between evaluations; 0 for one at the end only
    eval_episodes: int = 5  # episodes of an evaluation, without noise, from the same starts
    run_dir: str = ""  # folder of the run; default: a new one in runs/<env>/<script>
    save_every: int = 50_000  # steps between checkpoints, which wait for the end of an episode
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
    # target networks use the running statistics, copied from the live ones, or their own batch's
    bn_target: Literal["eval", "train"] = "eval"
    # in the actor's loss the critic uses the statistics of the batch of the policy's actions, which
    # also move its running ones, or (eval) uses the running ones and moves nothing
    bn_policy_critic: Literal["train", "eval"] = "train"
    # (s, a) and (s', a') pass the critic as one batch and share its statistics (CrossNorm, CrossQ)
    bn_joint: bool = False
    # NORM end
    learning_starts: int = 5_000  # steps of random actions, before the first update (2)
    batch_size: int = 256  # transitions in an update
    buffer_size: int = 1_000_000  # transitions that the replay buffer keeps
    actor_lr: float = 1e-3  # Adam's learning rate
    critic_lr: float = 1e-3  # Adam's learning rate
    alpha_lr: float = 1e-3  # Adam's learning rate, for the temperature (8)
    adam_beta1: float = 0.9  # Adam's memory of gradients, for actor and critics
    policy_delay: int = 1  # updates of the critics for one of actor and temperature
    gamma: float = 0.99  # discount per step
    tau: float = 0.005  # weight of the live network in its target (7)
    target_entropy: float | None = None  # default: minus the dimension of an action (8)
    log_std_min: float = -20.0  # lowest logarithm of the policy's standard deviation
    log_std_max: float = 2.0  # highest logarithm of the policy's standard deviation
    hidden_sizes: tuple[int, ...] = (256, 256)  # width of each hidden layer
    critic_hidden_sizes: tuple[int, ...] = ()  # those of the critics, if they differ
    max_grad_norm: float = 0.0  # longest gradient of a network; 0 for any length
    target_network: bool = True  # no: bootstrap from the live networks


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


def norm_layer(features, args):
    """Return a layer that normalizes inputs of shape (batch, features)."""
    if args.norm == "batchnorm":
        return nn.BatchNorm1d(features, momentum=args.bn_momentum)
    if args.norm == "batchrenorm":
        return BatchRenorm(features, args.bn_momentum, args.bn_warmup)
    return nn.LayerNorm(features)


def add_norm(net, name, args):
    """Return the layers of net with normalization layers at --norm-position, if it has any."""
    if args.norm in ("none", "zfilter", "fixed") or args.norm_net not in ("both", name):
        return net
    width, position = net[0].in_features, args.norm_position or ("post",)
    layers = [norm_layer(width, args)] if "input" in position else []
    for layer in net:
        width = getattr(layer, "out_features", width)
        is_hidden = isinstance(layer, ACTIVATION)
        layers += [norm_layer(width, args)] if is_hidden and "pre" in position else []
        layers += [layer]
        layers += [norm_layer(width, args)] if is_hidden and "post" in position else []
    return nn.Sequential(*layers)


# NORM end
# --------------------------------------------------------------------------------------- Networks


def hidden_layers(*sizes):
    """Return linear layers, each activated, that lead from sizes[0] features to sizes[-1]."""
    pairs = itertools.pairwise(sizes)
    return [layer for pair in pairs for layer in (nn.Linear(*pair), ACTIVATION())]


class Actor(nn.Module):
    """pi(a|s), a squashed Gaussian: observations (n, obs_dim) to medians, (n, action_dim) (9)."""

    def __init__(self, obs_dim, action_space, args):
        super().__init__()
        layers = hidden_layers(obs_dim, *args.hidden_sizes)
        outputs = nn.Linear(args.hidden_sizes[-1], 2 * action_space.shape[0])
        self.net = nn.Sequential(*layers, outputs)
        self.net = add_norm(self.net, "actor", args)  # NORM layer: on s
        low, high = torch.tensor(np.float32([action_space.low, action_space.high]))
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        self.log_std_bounds = args.log_std_min, args.log_std_max

    def forward(self, obs):
        mean, _ = self.net(obs).chunk(2, dim=1)
        return torch.tanh(mean) * self.action_scale + self.action_bias  # (9)

    def sample(self, obs):
        """Return actions (n, action_dim) that gradients flow through, and log pi(a|s), (n,)."""
        mean, log_std = self.net(obs).chunk(2, dim=1)
        normal = torch.distributions.Normal(mean, log_std.clamp(*self.log_std_bounds).exp())
        u = normal.rsample()
        action = torch.tanh(u) * self.action_scale + self.action_bias
        # log |da/du| = log scale + log(1 - tanh(u)^2), finite also where tanh(u) rounds to 1
        log_slope = self.action_scale.log() + 2 * (math.log(2) - u - F.softplus(-2 * u))
        return action, (normal.log_prob(u) - log_slope).sum(1)


class Critic(nn.Module):
    """Two Q(s, a): observations (n, obs_dim) and actions (n, action_dim) to values (n, 2)."""

    def __init__(self, obs_dim, action_space, args):
        super().__init__()
        sizes = obs_dim + action_space.shape[0], *(args.critic_hidden_sizes or args.hidden_sizes)
        self.nets = nn.ModuleList(
            nn.Sequential(*hidden_layers(*sizes), nn.Linear(sizes[-1], 1)) for _ in range(2)
        )
        for k, net in enumerate(self.nets):  # NORM layer: both critics
            self.nets[k] = add_norm(net, "critic", args)  # NORM layer: on (s, a)

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=1)
        return torch.cat([net(x) for net in self.nets], dim=1)


def make_agent(env, args, device):
    """Return networks, the critics' target (a copy, or the live ones) and optimizers."""
    obs_dim, action_space = env.observation_space.shape[0], env.action_space
    actor = Actor(obs_dim, action_space, args).to(device)
    critic = Critic(obs_dim, action_space, args).to(device)
    agent = SimpleNamespace(actor=actor, critic=critic, device=device, env=args.env)
    agent.critic_target = copy.deepcopy(critic) if args.target_network else critic
    agent.temperature = nn.ParameterDict({"log_alpha": torch.zeros(())}).to(device)
    agent.log_alpha = agent.temperature["log_alpha"]  # alpha > 0, in units of reward (8)
    default = -float(action_space.shape[0])
    agent.target_entropy = default if args.target_entropy is None else args.target_entropy
    betas = args.adam_beta1, 0.999
    agent.actor_optimizer = Adam(actor.parameters(), args.actor_lr, betas, fused=True)
    agent.critic_optimizer = Adam(critic.parameters(), args.critic_lr, betas, fused=True)
    agent.alpha_optimizer = Adam(agent.temperature.parameters(), args.alpha_lr, fused=True)
    agent.obs_stat = RunningStat(obs_dim)  # NORM obs: every run counts the states it meets
    agent.obs_filter = make_filter(agent.obs_stat, args)  # NORM obs: for most --norm the identity
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


def filter_batch(obs_filter, batch):
    """Return the batch with both observations filtered by the statistics as they are now."""
    obs, next_obs = (obs_filter(x, update=False) for x in (batch.obs, batch.next_obs))
    return batch._replace(obs=obs, next_obs=next_obs)


# NORM end
# Transitions: obs and next_obs (n, obs_dim), action (n, action_dim), the others (n,).
Batch = namedtuple("Batch", "obs action reward next_obs terminated")


class ReplayBuffer:
    """The newest `capacity` transitions, raw float32, in arrays that are allocated once (1)."""

    def __init__(self, capacity, obs_dim, action_dim):
        shapes = (obs_dim,), (action_dim,), (), (obs_dim,), ()
        self.data = Batch(*(np.zeros((capacity, *shape), np.float32) for shape in shapes))
        self.capacity, self.added = capacity, 0

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, *transition):
        """Write (obs, action, reward, next_obs, terminated) over the oldest transition."""
        for array, value in zip(self.data, transition, strict=True):
            array[self.added % self.capacity] = value
        self.added += 1

    def sample(self, rng, n):
        """Return a Batch of n transitions, drawn uniformly with replacement."""
        index = rng.integers(len(self), size=n)
        return Batch(*(array[index] for array in self.data))

    def state_dict(self):
        """Return the filled part, as tensors that share its memory."""
        arrays = [torch.from_numpy(array[: len(self)]) for array in self.data]
        return {"added": self.added, "data": arrays}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned."""
        self.added = state["added"]
        for array, saved in zip(self.data, state["data"], strict=True):
            array[: len(self)] = saved


# ----------------------------------------------------------------------------- Losses and updates


@torch.no_grad()
def act(agent, obs, explores=False):
    """Return the median action or a ~ pi(a|s), (action_dim,), for one observation, (obs_dim,)."""
    obs = agent.obs_filter(obs, update=False)  # NORM obs: the policy sees what it learns from
    agent.actor.eval()  # NORM mode: one observation has no batch statistics
    obs = torch.as_tensor(obs, dtype=torch.float32, device=agent.device).unsqueeze(0)
    action = agent.actor.sample(obs)[0] if explores else agent.actor(obs)
    return action.squeeze(0).cpu().numpy()


def explore(agent, obs):
    """Return a ~ pi(a|s) (3)."""
    return act(agent, obs, explores=True)


def q_values(agent, batch, next_action, args):
    """Return Q(s, a), and Q'(s', a') without gradient."""
    # NORM begin: batch: one pass, so that (s, a) and (s', a') share one mean and variance
    # Two passes in train mode would center each on a mean of its own, and so hide from the critic
    # how a and a' differ; the running statistics would never come to know (s', a').
    if args.bn_joint:
        pair = torch.cat([batch.obs, batch.next_obs]), torch.cat([batch.action, next_action])
        q, q_next = agent.critic.train()(*pair).chunk(2)
        if args.target_network:
            with torch.no_grad():
                q_next = agent.critic_target.train(args.bn_target == "train")(*pair).chunk(2)[1]
        return q, q_next.detach()
    # NORM end
    with torch.no_grad():
        agent.critic_target.train(args.bn_target == "train")  # NORM mode: eval may not fit s', a'
        q_next = agent.critic_target(batch.next_obs, next_action)
    agent.critic.train()  # NORM mode: learning uses the batch's statistics, and moves running ones
    return agent.critic(batch.obs, batch.action), q_next


def critic_loss(agent, batch, args):
    """Return the mean of (Q(s, a) - y)^2, summed over the critics (4), and Q(s, a), (n, 2)."""
    with torch.no_grad():
        agent.actor.eval()  # NORM mode: a' is not learnt from, so it leaves no trace in statistics
        next_action, next_log_prob = agent.actor.sample(batch.next_obs)
        alpha = agent.log_alpha.exp()
    q, q_next = q_values(agent, batch, next_action, args)
    q_next = q_next.amin(1) - alpha * next_log_prob
    td_target = batch.reward + args.gamma * (1 - batch.terminated) * q_next  # (4), (5)
    return (q - td_target.unsqueeze(1)).square().mean(0).sum(), q


def actor_loss(agent, batch, args):
    """Return the mean of alpha log pi(a|s) - min Q(s, a), a ~ pi (6), and log pi(a|s), (n,)."""
    agent.actor.train()  # NORM mode: learning uses the batch's statistics, and moves running ones
    # NORM begin: mode: train mode here hides from the actor what Q makes of its actions
    # In train mode batch norm gives each feature the mean beta, whatever pi does. If it stands
    # last before the output, mean Q = w beta + b: only the choice of the smaller Q has a gradient.
    agent.critic.train(args.bn_policy_critic == "train")
    # NORM end
    action, log_prob = agent.actor.sample(batch.obs)
    alpha = agent.log_alpha.exp().detach()
    return (alpha * log_prob - agent.critic(batch.obs, action).amin(1)).mean(), log_prob


def alpha_loss(agent, log_prob):
    """Return the mean of -alpha (log pi(a|s) + target entropy) (8)."""
    return -(agent.log_alpha.exp() * (log_prob.detach() + agent.target_entropy)).mean()


def gradient_step(optimizer, loss, max_grad_norm):
    """Descend the loss, by a gradient no longer than max_grad_norm unless that is 0."""
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()


@torch.no_grad()
def update_target(target, source, tau):
    """theta' <- (1 - tau) theta' + tau theta (7)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
    for old, new in zip(target.buffers(), source.buffers(), strict=True):  # NORM target: a copy,
        old.copy_(new)  # NORM target: as parameters() has no buffers, which would stay at 0 and 1


def update(agent, batch, updates, args):
    """Take one step, number `updates` of the run; return losses and mean Q as tensors."""
    loss_q, q = critic_loss(agent, batch, args)
    gradient_step(agent.critic_optimizer, loss_q, args.max_grad_norm)
    losses = {"critic": loss_q.detach(), "q": q.detach().mean()}
    if updates % args.policy_delay == 0:
        agent.critic.requires_grad_(False)  # the actor's loss has no use for the critic's gradient
        loss_pi, log_prob = actor_loss(agent, batch, args)
        gradient_step(agent.actor_optimizer, loss_pi, args.max_grad_norm)
        agent.critic.requires_grad_(True)
        gradient_step(agent.alpha_optimizer, alpha_loss(agent, log_prob), 0.0)
        losses |= {"actor": loss_pi.detach(), "entropy": -log_prob.detach().mean()}
        losses["alpha"] = agent.log_alpha.exp().detach()
    if args.target_network:
        update_target(agent.critic_target, agent.critic, args.tau)
    return losses


# --------------------------------------------------------------------- Evaluation and diagnostics


def evaluate(agent, env, episodes):
    """Play without noise, from the same starts at every call, and learn nothing.

    Returns for each episode obs (n, obs_dim), action (n, action_dim), reward (n,) and terminated.
    """
    played = []
    for k in range(episodes):
        steps, terminated, truncated = [], False, False
        obs, _ = env.reset(seed=1_000_000 + k)
        while not (terminated or truncated):
            action = act(agent, obs)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            steps.append((obs, action, reward))
            obs = next_obs
        played.append((*map(np.array, zip(*steps, strict=True)), terminated))
    return played


# NORM begin: report: what normalization does to a run, made visible
PANELS = {
    "Normalization": {
        "lag of running statistics": ["Multiline", ["norm/stat_lag"]],
        "stretch of the target's features": ["Multiline", ["norm/target_stretch"]],
        "gap between train and eval mode": ["Multiline", ["norm/train_eval_gap_.*"]],
        "bias of Q": ["Multiline", ["norm/q_bias.*"]],
        "gradient of the actor": ["Multiline", ["norm/actor_grad"]],
        "saturation and dead units": ["Multiline", ["norm/saturation", "norm/dead_units"]],
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


@torch.no_grad()
def norm_scalars(agent, batch):
    """Return {name: value} of the normalization panel, from the last training batch:

    train_eval_gap_policy, _q and dead_units: see `probe`, means over layers, on the batch's (s, a).
    stat_lag: |running mean - batch mean| / batch deviation, mean over features, then layers, on the
    same; what else passed the critic in train mode moved its statistics, too.
    target_stretch: deviation of a feature of the target critic on s' and the live actor's action,
    over its running deviation, by which eval mode divides; the largest of all features, with the
    layers before it in train mode. Near 1 if these fit, hundreds if a unit was dead.
    actor_grad: norm of the actor's gradient in the last update, as clipped.
    saturation: share of the components of the actor's action in the outer 1 % at either bound.
    """
    gap_policy, found, dead = probe(agent.actor, batch.obs)
    gap_q, more, more_dead = probe(agent.critic, batch.obs, batch.action)
    _, target, _ = probe(agent.critic_target, batch.next_obs, agent.actor.eval()(batch.next_obs))
    grads = [p.grad.norm() for p in agent.actor.parameters() if p.grad is not None]
    action = (agent.actor.eval()(batch.obs) - agent.actor.action_bias) / agent.actor.action_scale
    scalars = {"train_eval_gap_policy": gap_policy, "train_eval_gap_q": gap_q}
    lags = [((old - mean).abs() / std).mean().item() for old, _, mean, std in found + more]
    if lags:
        scalars["stat_lag"] = np.mean(lags)
    if target:
        scalars["target_stretch"] = max((std / old).max().item() for _, old, _, std in target)
    if dead + more_dead:
        scalars["dead_units"] = np.mean(dead + more_dead)
    if grads:
        scalars["actor_grad"] = torch.stack(grads).norm().item()
    scalars["saturation"] = (action.abs() > 0.98).float().mean().item()
    return scalars


@torch.no_grad()
def q_bias(agent, episodes, gamma):
    """Return mean and std over states of (Q(s, a) - G) / max(|G|, 10), after REDQ's code.

    Here actions are the policy's medians, REDQ draws them: where noise costs reward, Q, which is of
    the noisy policy, lies below G without any error.
    G is the discounted return that followed, with alpha times the entropy of all later actions,
    one draw for each; Q is the mean of the two. Where a time-out cut an episode, the states are
    left out that have more than 1 % of G's weight behind the cut; {} if none remains.
    """
    errors = []
    for obs, action, reward, terminated in episodes:
        inputs = agent.obs_filter(obs, update=False), action
        inputs = [torch.as_tensor(x, dtype=torch.float32, device=agent.device) for x in inputs]
        with torch.random.fork_rng([0] if agent.device == "cuda" else []):  # training keeps its own
            _, log_prob = agent.actor.eval().sample(inputs[0])
        bonus = -(agent.log_alpha.exp() * log_prob).cpu().numpy()
        later = reward + gamma * np.append(bonus[1:], 0)
        g = list(itertools.accumulate(later[::-1], lambda g, r: r + gamma * g))[::-1]
        n = len(g) if terminated else (gamma ** np.arange(len(g), 0, -1) <= 0.01).sum()
        q, g = agent.critic.eval()(*inputs).mean(1).cpu().numpy()[:n], np.array(g[:n])
        errors.extend((q - g) / np.maximum(np.abs(g), 10))
    return {"q_bias": np.mean(errors), "q_bias_std": np.std(errors)} if errors else {}


def report_warmup(agent):
    """Say so if layers of batch renormalization never left their warm-up."""
    modules = *agent.actor.modules(), *agent.critic.modules()
    layers = [layer for layer in modules if isinstance(layer, BatchRenorm)]
    warming = sum(0 < int(layer.num_batches_tracked) <= layer.warmup for layer in layers)
    if warming:
        print(f"{warming} of {len(layers)} layers were batch norm to the end: lower --bn-warmup")


# NORM end
# ------------------------------------------------------------------------------------- Checkpoint

PARTS = "actor", "critic", "critic_target", "temperature", "buffer"
PARTS += "actor_optimizer", "critic_optimizer", "alpha_optimizer"
PARTS += "obs_stat", "obs_filter"  # NORM save: a policy needs its statistics


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
    (0, 10**12, "eval_every learning_starts"),
    (1, 10**12, "total_steps save_every buffer_size"),
    (1, 10**6, "batch_size"),
    (1, 10**4, "eval_episodes hidden_sizes critic_hidden_sizes policy_delay"),
    (0, 1, "actor_lr critic_lr alpha_lr gamma tau"),
    (0, 0.9999, "adam_beta1"),
    (0, 1e6, "max_grad_norm"),
    (-1e6, 1e6, "target_entropy"),
    (-40, 40, "log_std_min log_std_max"),  # float32 holds such a variance
    (0, 1, "bn_momentum"),  # NORM flag: a weight
    (0, 10**12, "bn_warmup"),  # NORM flag: a count
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
            if getattr(args, name) == getattr(Args, name):
                continue  # a default may also be None
            if not all(low <= value <= high for value in np.atleast_1d(getattr(args, name))):
                fail(f"--{name.replace('_', '-')} is out of range: choose from {low} to {high}")
    if not args.hidden_sizes:
        fail("--hidden-sizes needs at least one width")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda finds no GPU: use --device cpu")
    if not args.target_network and args.tau != Args.tau:
        fail("--tau needs target networks: drop --no-target-network")
    if args.log_std_min > args.log_std_max:
        fail("--log-std-min is above --log-std-max: lower it")
    # NORM begin: flag: a switch that could change nothing is a mistake
    is_batch, changed = args.norm.startswith("batch"), changed_norm_options(args)
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
        if name in ("bn_policy_critic", "bn_joint", "bn_target") and args.norm_net == "actor":
            fail(f"{option} needs batch norm in the critic: drop --norm-net actor")
    if args.bn_target == "train" and not args.target_network:
        fail("--bn-target train needs target networks: drop --no-target-network")
    if (args.norm == "fixed") != bool(args.norm_stats):
        fail("--norm fixed and --norm-stats runs/.../obs_stats.npz need each other")
    if is_batch and args.batch_size < 2:
        fail("--batch-size 1 has no batch statistics: use 2 or more")
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
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        fail(f"--env {args.env} observes {obs_space}: choose one that observes a vector")
    if not is_scalable(action_space):
        fail(f"--env {args.env} acts in {action_space}: choose one with bounded continuous actions")
    # a copy, since an environment may write its next observation into the same array
    env = gym.wrappers.TransformObservation(env, lambda x: np.array(x, np.float32), obs_space)
    return gym.wrappers.RecordEpisodeStatistics(env)


def is_finite(agent):
    """Whether every weight is a finite number."""
    return all(x.isfinite().all() for x in (*agent.actor.parameters(), *agent.critic.parameters()))


def report_evaluation(agent, env, args, step, writer, bar):
    """Evaluate, log and show it; return (step, mean return, std over episodes).

    writer: None if the events have this evaluation already.
    """
    episodes = evaluate(agent, env, args.eval_episodes)
    returns = [float(reward.sum()) for _, _, reward, _ in episodes]
    mean, std = float(np.mean(returns)), float(np.std(returns))
    if writer:
        writer.add_scalar("eval/return", mean, step)
        writer.add_scalar("eval/return_std", std, step)
        for name, value in q_bias(agent, episodes, args.gamma).items():  # NORM report: see q_bias
            writer.add_scalar(f"norm/{name}", value, step)  # NORM report: mean and std
    bar.set_postfix_str(f"return {mean:.1f} ± {std:.1f}")
    if bar.disable and step < args.total_steps:  # no terminal to draw on
        print(f"step {step} of {args.total_steps}: return {mean:.1f} ± {std:.1f}", flush=True)
    return step, mean, std


def train(args, stop=()):
    """Train a policy, and return what the run came to:

    {"run_dir": str, "eval": [(step, mean return, std over episodes), ...], "steps": int,
    "updates": int, "diverged": bool}. Raises SystemExit(2) for options that make no sense. Once
    the list stop is no longer empty, the run saves itself as soon as it can be resumed, and ends.
    """
    check(args)
    env, eval_env = make_env(args), make_env(args)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    env.reset(seed=args.seed)
    env.action_space.seed(args.seed)
    generators = rng, env.unwrapped.np_random, env.action_space.np_random
    agent = make_agent(env, args, device)
    try:
        sizes = *env.observation_space.shape, *env.action_space.shape
        buffer = agent.buffer = ReplayBuffer(args.buffer_size, *sizes)
    except MemoryError as error:
        fail(f"--buffer-size {args.buffer_size} is too large: {error}")
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
    start_time, start_step, save_step = time.time(), step, step + args.save_every
    obs, losses = None, {}  # an episode is to begin
    while step < args.total_steps:
        # act
        if obs is None:
            obs, _ = env.reset()
            agent.obs_stat.push(obs)  # NORM obs: each observation of training counts once
        if step < args.learning_starts:
            action = env.action_space.sample()
        else:
            action = explore(agent, obs)
        # step
        next_obs, reward, terminated, truncated, info = env.step(action)
        agent.obs_stat.push(next_obs)  # NORM obs: those of evaluation and of the replay never do
        step += 1
        bar.update()
        # store
        buffer.add(obs, action, reward, next_obs, terminated)
        obs = next_obs
        # learn
        diverged = math.isnan(reward)
        if step > args.learning_starts and not diverged:
            batch = buffer.sample(rng, args.batch_size)
            batch = filter_batch(agent.obs_filter, batch)  # NORM obs: the replay stays raw
            batch = Batch(*(torch.as_tensor(x, dtype=torch.float32, device=device) for x in batch))
            updates += 1
            losses |= update(agent, batch, updates, args)
            diverged = not all(map(math.isfinite, losses.values()))
        # report
        if diverged:
            break
        if updates and step % LOG_EVERY == 0:
            writer.add_scalar("charts/SPS", (step - start_step) / (time.time() - start_time), step)
            for name, value in losses.items():
                writer.add_scalar(f"losses/{name}", value, step)
            for name, value in norm_scalars(agent, batch).items():  # NORM report: changes nothing
                writer.add_scalar(f"norm/{name}", value, step)  # NORM report: see norm_scalars
        if args.eval_every and step % args.eval_every == 0 and step < args.total_steps:
            evaluations.append(report_evaluation(agent, eval_env, args, step, writer, bar))
            diverged = not np.isfinite(evaluations[-1]).all()
            if diverged:
                break
        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", info["episode"]["r"], step)
            writer.add_scalar("charts/episodic_length", info["episode"]["l"], step)
            stopping = bool(stop)  # read once: a signal may come at any time
            if step < args.total_steps and (step >= save_step or stopping):
                diverged = not is_finite(agent)
                if diverged:  # the checkpoint before stays
                    break
                save_run(run_dir, agent, generators, (step, updates, evaluations), writer)
                save_step = step + args.save_every
            obs = None
            if stopping:
                break
    if step >= args.total_steps and not diverged:
        events = writer if step > start_step else None  # a finished run evaluated this step before
        evaluations.append(report_evaluation(agent, eval_env, args, step, events, bar))
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
