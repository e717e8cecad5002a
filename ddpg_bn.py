"""DDPG, with and without normalization, in one file.

Paper: Lillicrap et al. 2016, Continuous control with deep reinforcement learning, arXiv 1509.02971.

Run:   python ddpg_bn.py --env Ant-v4                                          plain DDPG
       python ddpg_bn.py --env Ant-v4 --norm batchnorm                         the main job
       python ddpg_bn.py --env Ant-v4 --norm batchnorm --bn-policy-critic eval the first repair
       python ddpg_bn.py --resume runs/Ant-v4/ddpg_bn/RUN                      continue a run
       The paper's own placement, the state and every layer that has not met the action yet:
       python ddpg_bn.py --norm batchnorm --norm-position input pre --action-layer 1

Read:  grep -n "# NORM" ddpg_bn.py                                             where it enters
       sed '/# NORM begin/,/# NORM end/d; /# NORM/d' ddpg_bn.py > ddpg.py      plain DDPG, runs alone

Details, and where they come from:
  (1) Replay of raw transitions, sampled uniformly (Sec. 3).
  (2) Uniformly random actions first (not in the paper; Spinning Up, TD3).
  (3) Exploration by Gaussian noise instead of Ornstein-Uhlenbeck's (TD3, arXiv 1802.09477, Sec. 6.1).
  (4) Critic: y = r + gamma Q'(s', mu'(s')), squared error (Eq. 4 and 5).
  (5) A time-out is not a death: bootstrap through it (Pardo et al. 2018, arXiv 1712.00378).
  (6) Actor: ascend Q(s, mu(s)) through the action (Eq. 6).
  (7) Target networks follow slowly, at every update (Algorithm 1).
  (8) Small final layers, so that the first actions and values are near zero (Sec. 7).
  (9) Actions are scaled to the environment's bounds.
  (10) The action enters the critic at its input (TD3); in the paper, at the second hidden layer.

              paper (Sec. 7)                         here, and why
  rates       actor 1e-4, critic 1e-3                1e-3 both: Spinning Up and Tianshou tune to this
  networks    400, 300                               256, 256: as fast as it is common today
  batch       64                                     256: the same
  tau         0.001                                  0.005: TD3; targets lag 200 updates, not 1000
  critic      L2 decay 0.01                          none: no library at hand keeps it
  noise       Ornstein-Uhlenbeck, 0.15 and 0.2       Gaussian, 0.1: TD3 sees no gain from the former
  gamma, replay                                      0.99 and one million, as in the paper
"""

import copy
import importlib.metadata
import itertools
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from zfilter import RunningStat, ZFilter  # NORM obs: the only code that the scripts share

LOG_EVERY = 1000  # steps between two points of a loss or a diagnostic


# ------------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    env: str = "HalfCheetah-v4"
    """Gymnasium id of the environment."""
    seed: int = 1
    """Seed of the environment, its action space, torch and numpy."""
    total_steps: int = 1_000_000
    """Environment steps to train for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    eval_every: int = 10_000
    """Steps between evaluations; 0 for a final one only."""
    eval_episodes: int = 5
    """Episodes of one evaluation, without noise, always from the same starts."""
    run_dir: str = ""
    """Folder of this run; default runs/<env>/<script>/<options>-seed<k>-<time>."""
    save_every: int = 50_000
    """Steps between checkpoints, each taken at the end of an episode."""
    resume: str = ""
    """Folder of a run to continue; its options hold, and --total-steps can be raised."""
    # NORM begin: flag: what normalizes, where it stands, and whose statistics each pass uses
    norm: Literal["none", "batchnorm", "batchrenorm", "layernorm", "zfilter", "fixed"] = "none"
    """What normalizes: a layer in the networks, or (zfilter, fixed) a filter on observations."""
    norm_position: tuple[Literal["input", "pre", "post"], ...] = ()
    """Where layers stand: on the input, before or after each hidden activation; default post."""
    norm_net: Literal["both", "actor", "critic"] = "both"
    """Which network has the layers."""
    norm_stats: str = ""
    """For fixed: the obs_stats.npz of an earlier run."""
    bn_momentum: float = 0.1
    """Share of the batch in running statistics, torch's sense; 1 minus TF's and JAX's value."""
    bn_warmup: int = 100_000
    """Training passes for which batchrenorm is plain batch norm; CrossQ's value."""
    bn_target: Literal["eval", "train"] = "eval"
    """Targets normalize by a copy of the live running statistics, or (train) by their own batch."""
    bn_policy_critic: Literal["train", "eval"] = "train"
    """In the actor's loss the critic uses the statistics of (s, mu(s)), or (eval) running ones."""
    bn_joint: bool = False
    """(s, a) and (s', a') pass the critic as one batch, and so share their statistics."""
    # NORM end
    learning_starts: int = 5_000
    """Steps of uniformly random actions before learning (2)."""
    batch_size: int = 256
    """Transitions in one update."""
    buffer_size: int = 1_000_000
    """Transitions that the replay buffer keeps."""
    actor_lr: float = 1e-3
    """Adam's learning rate for the actor."""
    critic_lr: float = 1e-3
    """Adam's learning rate for the critic."""
    gamma: float = 0.99
    """Discount per step."""
    tau: float = 0.005
    """Share of the live network in a target network's update (7)."""
    noise: float = 0.1
    """Standard deviation of exploration, as a share of half the action range (3)."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Width of each hidden layer, both networks."""
    max_grad_norm: float = 0.0
    """Clip the norm of each network's gradient; 0 for no clipping."""
    target_network: bool = True
    """--no-target-network bootstraps from the live networks."""
    action_layer: Literal[0, 1] = 0
    """Hidden layer of the critic that the action enters; 1 is the paper's (10)."""


def fail(message):
    """End the program with one line on what to do."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(args):
    """End with one clear line if the options cannot work together."""
    if args.action_layer >= len(args.hidden_sizes):
        fail("--action-layer 1 needs at least two --hidden-sizes")
    # NORM begin: flag: combinations that mean nothing end here
    is_filter, has_batch = args.norm in ("zfilter", "fixed"), args.norm.startswith("batch")
    changed = [f.name for f in fields(Args) if getattr(args, f.name) != f.default]
    for name in changed:
        option = "--" + name.replace("_", "-")
        if name.startswith("bn_") and not has_batch:
            fail(f"{option} needs --norm batchnorm or batchrenorm, not --norm {args.norm}")
        if name in ("bn_target", "bn_policy_critic", "bn_joint") and args.norm_net == "actor":
            fail(f"{option} needs batch norm in the critic: leave out --norm-net actor")
        if name == "norm_net" and (args.norm == "none" or is_filter):
            fail(f"{option} needs a layer in a network, not --norm {args.norm}")
    if is_filter and args.norm_position not in ((), ("input",)):
        fail(f"--norm {args.norm} filters observations: leave out --norm-position")
    if args.norm == "none" and args.norm_position:
        fail("--norm-position needs a layer: add --norm batchnorm, batchrenorm or layernorm")
    if "bn_warmup" in changed and args.norm != "batchrenorm":
        fail("--bn-warmup needs --norm batchrenorm")
    if args.bn_target == "train" and not args.target_network:
        fail("--bn-target train needs target networks: leave out --no-target-network")
    if (args.norm == "fixed") != bool(args.norm_stats):
        fail("--norm fixed and --norm-stats runs/.../obs_stats.npz need each other")
    if args.batch_size < 2 and has_batch:
        fail("--batch-size 1 has no batch statistics: use 2 or more")
    # NORM end


# NORM begin: layer: everything that normalizes inside a network
# --------------------------------------------------------------------------- Normalization layers


class BatchRenorm(nn.BatchNorm1d):
    """Batch renormalization (Ioffe 2017, arXiv 1702.03275) of (batch, features), CrossQ's constants.

    Training: y = gamma ((x - mean_B) / std_B * r + d) + beta, where the constants r = std_B / std and
    d = (mean_B - mean) / std lead from the batch's statistics to the running ones: unclipped, train
    and eval mode agree. r = 1 and d = 0, as for the first `warmup` passes, is batch norm.
    """

    r_max, d_max = 3.0, 5.0

    def __init__(self, features, momentum, warmup, eps=1e-3):
        super().__init__(features, eps, momentum)
        self.warmup = warmup

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        # the kernel returns the biased statistics; torch.var_mean would take ten times as long
        x_hat, mean, inv_std = torch.native_batch_norm(
            x, None, None, None, None, True, 0.0, self.eps
        )
        with torch.no_grad():
            std = (self.running_var + self.eps).sqrt()
            on = self.num_batches_tracked >= self.warmup
            r = (1 / (inv_std * std)).clamp(1 / self.r_max, self.r_max).where(on, 1.0)
            d = ((mean - self.running_mean) / std).clamp(-self.d_max, self.d_max).where(on, 0.0)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(inv_std**-2 - self.eps, self.momentum)
            self.num_batches_tracked += 1
        return torch.addcmul(self.weight * d + self.bias, x_hat, self.weight * r)


def norm_layer(features, args):
    """Return one normalization layer for (batch, features) inputs."""
    if args.norm == "batchnorm":
        return nn.BatchNorm1d(features, momentum=args.bn_momentum)
    if args.norm == "batchrenorm":
        return BatchRenorm(features, args.bn_momentum, args.bn_warmup)
    return nn.LayerNorm(features)


def add_norm(net, args):
    """Return the layers of `net` with normalization layers between them, at --norm-position."""
    if args.norm not in ("batchnorm", "batchrenorm", "layernorm"):
        return net
    position, width = args.norm_position or ("post",), net[0].in_features
    layers = [norm_layer(width, args)] if "input" in position else []
    for layer in net:
        width = getattr(layer, "out_features", width)
        hidden = isinstance(layer, nn.ReLU)
        layers += [norm_layer(width, args)] if hidden and "pre" in position else []
        layers += [layer]
        layers += [norm_layer(width, args)] if hidden and "post" in position else []
    return nn.Sequential(*layers)


# NORM end
# --------------------------------------------------------------------------------------- Networks


def hidden_layers(size, hidden_sizes):
    """Return linear layers and ReLUs that lead from `size` inputs through hidden_sizes."""
    sizes = itertools.pairwise((size, *hidden_sizes))
    return [layer for pair in sizes for layer in (nn.Linear(*pair), nn.ReLU())]


def small_linear(size_in, size_out):
    """Return a final layer with weights and biases in U(-3e-3, 3e-3) (8)."""
    layer = nn.Linear(size_in, size_out)
    nn.init.uniform_(layer.weight, -3e-3, 3e-3)
    nn.init.uniform_(layer.bias, -3e-3, 3e-3)
    return layer


class Actor(nn.Module):
    """mu(s): observations (batch, obs_dim) to actions (batch, action_dim) within the bounds (9)."""

    def __init__(self, obs_dim, action_space, args):
        super().__init__()
        layers = hidden_layers(obs_dim, args.hidden_sizes)
        action_dim = action_space.shape[0]
        self.net = nn.Sequential(*layers, small_linear(args.hidden_sizes[-1], action_dim))
        if args.norm_net != "critic":  # NORM layer: --norm-net decides who is normalized
            self.net = add_norm(self.net, args)  # NORM layer: in the actor
        low, high = torch.as_tensor(action_space.low), torch.as_tensor(action_space.high)
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)

    def forward(self, obs):
        return torch.tanh(self.net(obs)) * self.action_scale + self.action_bias


class Critic(nn.Module):
    """Q(s, a): observations and actions, (batch, dim) each, to values (batch,) in reward units."""

    def __init__(self, obs_dim, action_space, args):
        super().__init__()
        before, after = np.split(args.hidden_sizes, [args.action_layer])
        self.obs_net = nn.Sequential(*hidden_layers(obs_dim, before))
        size = (before[-1] if len(before) else obs_dim) + action_space.shape[0]
        self.net = nn.Sequential(*hidden_layers(size, after), small_linear(after[-1], 1))
        if args.norm_net != "actor" and args.action_layer == 0:  # NORM layer: --norm-net decides
            self.net = add_norm(self.net, args)  # NORM layer: in the critic, on (s, a)
        if args.norm_net != "actor" and args.action_layer == 1:  # NORM layer: as in the paper,
            self.obs_net = add_norm(self.obs_net, args)  # NORM layer: only before the action

    def forward(self, obs, action):
        return self.net(torch.cat([self.obs_net(obs), action], 1)).squeeze(1)


def make_agent(env, args, device):
    """Return networks, targets (copies, or the live networks themselves) and optimizers."""
    obs_dim = env.observation_space.shape[0]
    actor = Actor(obs_dim, env.action_space, args).to(device)
    critic = Critic(obs_dim, env.action_space, args).to(device)
    agent = SimpleNamespace(actor=actor, critic=critic, actor_target=actor, critic_target=critic)
    if args.target_network:
        agent.actor_target = copy.deepcopy(actor).requires_grad_(False)
        agent.critic_target = copy.deepcopy(critic).requires_grad_(False)
    agent.actor_optimizer = torch.optim.Adam(actor.parameters(), args.actor_lr, fused=True)
    agent.critic_optimizer = torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True)
    agent.device = device
    agent.obs_stat = RunningStat(obs_dim)  # NORM obs: every run counts the states it meets
    agent.obs_filter = make_filter(args, agent.obs_stat)  # NORM obs: the identity for most --norm
    return agent


# ------------------------------------------------------------------------------------------- Data


# NORM begin: obs: what stands between an observation and the networks
def make_filter(args, obs_stat):
    """Return the filter of --norm zfilter (which learns) or fixed (which does not), or identity."""
    is_filter = args.norm in ("zfilter", "fixed")
    obs_filter = ZFilter(obs_stat.mean.shape, is_filter, is_filter, 10.0 if is_filter else None)
    if args.norm == "zfilter":
        obs_filter.stat = obs_stat
    if args.norm == "fixed" and not args.resume:
        try:
            obs_filter.load(args.norm_stats)
        except Exception as error:
            fail(f"--norm-stats {args.norm_stats} has no statistics for --env {args.env}: {error}")
    return obs_filter


def filter_batch(obs_filter, batch):
    """Return the batch with both observations filtered by the statistics of today."""
    obs, next_obs = (obs_filter(x, update=False) for x in (batch.obs, batch.next_obs))
    return batch._replace(obs=obs, next_obs=next_obs)


# NORM end
class Batch(NamedTuple):
    """Transitions: obs and next_obs (n, obs_dim), action (n, action_dim), the others (n,)."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    terminated: np.ndarray


class ReplayBuffer:
    """The last `capacity` transitions, raw float32, in arrays allocated once (1)."""

    def __init__(self, capacity, obs_dim, action_dim):
        self.data = Batch(
            obs=np.zeros((capacity, obs_dim), np.float32),
            action=np.zeros((capacity, action_dim), np.float32),
            reward=np.zeros(capacity, np.float32),
            next_obs=np.zeros((capacity, obs_dim), np.float32),
            terminated=np.zeros(capacity, np.float32),
        )
        self.capacity, self.added = capacity, 0

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, *transition):
        """Store (obs, action, reward, next_obs, terminated) in the place of the oldest."""
        for array, value in zip(self.data, transition, strict=True):
            array[self.added % self.capacity] = value
        self.added += 1

    def sample(self, rng, n):
        """Return n transitions drawn uniformly, with replacement."""
        index = rng.integers(len(self), size=n)
        return Batch(*(array[index] for array in self.data))

    def state_dict(self):
        """Return the filled part, as tensors that share its memory."""
        arrays = (torch.from_numpy(array[: len(self)]) for array in self.data)
        return {"added": self.added, **dict(zip(Batch._fields, arrays, strict=True))}

    def load_state_dict(self, state):
        """Restore `state_dict()`."""
        self.added = state["added"]
        for name, array in self.data._asdict().items():
            array[: len(self)] = state[name].numpy()


# ----------------------------------------------------------------------------- Losses and updates


@torch.no_grad()
def act(agent, obs):
    """Return the action mu(s), (action_dim,), for one observation, (obs_dim,)."""
    obs = agent.obs_filter(obs, update=False)  # NORM obs: acting and evaluation only look
    agent.actor.eval()  # NORM mode: one observation has no batch statistics
    obs = torch.as_tensor(obs, dtype=torch.float32, device=agent.device)
    return agent.actor(obs.unsqueeze(0)).squeeze(0).cpu().numpy()


def explore(agent, obs, action_space, rng, noise):
    """Return mu(s) + Gaussian noise, clipped to the bounds (3)."""
    scale = (action_space.high - action_space.low) / 2
    action = act(agent, obs) + rng.normal(0.0, noise * scale).astype(np.float32)
    return action.clip(action_space.low, action_space.high)


def q_values(agent, batch, next_action, args):
    """Return Q(s, a), and Q'(s', a') without gradient, (n,) each."""
    # NORM begin: batch: one pass over both halves, so that one mean and variance serve both
    # Separate passes center (s, a) and (s', a') each on its own mean, and hide from the critic how
    # they differ; the running statistics would know one of them only (CrossNorm, CrossQ).
    if args.bn_joint:
        obs, action = torch.cat([batch.obs, batch.next_obs]), torch.cat([batch.action, next_action])
        agent.critic.train()
        q, q_next = agent.critic(obs, action).chunk(2)
        if args.target_network:
            agent.critic_target.train(args.bn_target == "train")
            with torch.no_grad():
                q_next = agent.critic_target(obs, action).chunk(2)[1]
        return q, q_next.detach()
    # NORM end
    with torch.no_grad():
        agent.critic_target.train(args.bn_target == "train")  # NORM mode: --bn-target
        q_next = agent.critic_target(batch.next_obs, next_action)
    agent.critic.train()  # NORM mode: learning normalizes by the batch and moves running statistics
    return agent.critic(batch.obs, batch.action), q_next


def critic_loss(agent, batch, args):
    """Return mean (Q(s, a) - y)^2 with y = r + gamma (1 - terminated) Q'(s', mu'(s')) (4), and Q."""
    with torch.no_grad():
        agent.actor_target.train(args.bn_target == "train")  # NORM mode: --bn-target
        next_action = agent.actor_target(batch.next_obs)
    q, q_next = q_values(agent, batch, next_action, args)
    td_target = batch.reward + args.gamma * (1 - batch.terminated) * q_next  # (5)
    return F.mse_loss(q, td_target), q


def actor_loss(agent, batch, args):
    """Return -mean Q(s, mu(s)) (6)."""
    agent.actor.train()  # NORM mode: learning normalizes by the batch and moves running statistics
    # NORM begin: mode: the line on which most of "batch norm fails in off-policy RL" hangs
    # In train mode the mean of each feature over the batch is beta, whatever mu does. If that layer
    # is the last before the output, mean Q = w beta + b: no gradient but rounding, and Adam scales.
    agent.critic.train(args.bn_policy_critic == "train")
    # NORM end
    return -agent.critic(batch.obs, agent.actor(batch.obs)).mean()


def gradient_step(optimizer, loss, max_grad_norm):
    """Descend the loss; clip the gradient's norm if max_grad_norm is not 0."""
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()


@torch.no_grad()
def update_target(target, source, tau):
    """theta' <- (1 - tau) theta' + tau theta (7)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
    for old, new in zip(target.buffers(), source.buffers(), strict=True):  # NORM target: buffers,
        old.copy_(new)  # NORM target: which parameters() leaves out, are copied, never averaged


def update(agent, batch, args):
    """One step of critic and actor, then the targets. Returns {name: loss or value, a tensor}."""
    loss_q, q = critic_loss(agent, batch, args)
    gradient_step(agent.critic_optimizer, loss_q, args.max_grad_norm)
    agent.critic.requires_grad_(False)  # the actor's loss needs no gradient of the critic's weights
    loss_pi = actor_loss(agent, batch, args)
    gradient_step(agent.actor_optimizer, loss_pi, args.max_grad_norm)
    agent.critic.requires_grad_(True)
    if args.target_network:
        update_target(agent.actor_target, agent.actor, args.tau)
        update_target(agent.critic_target, agent.critic, args.tau)
    return {"critic": loss_q.detach(), "actor": loss_pi.detach(), "q": q.detach().mean()}


# --------------------------------------------------------------------- Evaluation and diagnostics


class Episode(NamedTuple):
    """One evaluated episode: obs (n, obs_dim), action (n, action_dim), reward (n,)."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: bool


def evaluate(agent, env, episodes):
    """Return episodes played without noise, the same starts at every call; learns nothing."""
    played = []
    for k in range(episodes):
        obs, _ = env.reset(seed=1_000_000 + k)
        steps, terminated, truncated = [], False, False
        while not (terminated or truncated):
            action = act(agent, obs)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            steps.append((obs, action, reward))
            obs = next_obs
        played.append(Episode(*map(np.array, zip(*steps, strict=True)), terminated))
    return played


# NORM begin: report: what normalization does to a run, made visible
PANELS = {
    "Normalization": {
        "statistics lag": ["Multiline", ["norm/stat_lag"]],
        "train-eval gap": ["Multiline", ["norm/train_eval_gap_.*"]],
        "bias of Q": ["Multiline", ["norm/q_bias.*"]],
        "gradient of the actor": ["Multiline", ["norm/actor_grad"]],
        "saturation, dead units": ["Multiline", ["norm/saturation", "norm/dead_units"]],
    },
    "Learning": {"return": ["Multiline", ["eval/return$", "charts/episodic_return"]]},
}


@torch.no_grad()
def probe(net, *inputs):
    """Run a copy of net on one batch, in eval and then in train mode. Returns a dict:

    gap: mean |train-mode output - eval-mode output|, in the output's units.
    dead_units: for each hidden layer the share of units that no sample activates, in train mode.
    stat_lag: for each batch norm, |running mean - batch mean| / batch std, mean over its features.
    """
    net, dead, lag = copy.deepcopy(net), [], []

    def count_dead(layer, _, output):
        dead.append((output <= 0).all(0).float().mean().item())

    def measure_lag(layer, inputs):
        var, mean = torch.var_mean(inputs[0], 0, correction=0)
        lag.append(((layer.running_mean - mean).abs() / (var + layer.eps).sqrt()).mean().item())

    eval_output = net.eval()(*inputs)
    for layer in net.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(count_dead)
        if isinstance(layer, nn.BatchNorm1d):
            layer.register_forward_pre_hook(measure_lag)
    gap = (net.train()(*inputs) - eval_output).abs().mean().item()
    return {"gap": gap, "dead_units": dead, "stat_lag": lag}


def norm_scalars(agent, batch):
    """Return the scalars of the normalization panel that one training batch shows:

    actor_grad: norm of the actor's gradient in the last update.
    saturation: share of action components within 1 % of their range of a bound.
    train_eval_gap_policy, train_eval_gap_q: see `probe`.
    dead_units, stat_lag: see `probe`, means over the layers of both networks.
    """
    pi, q = probe(agent.actor, batch.obs), probe(agent.critic, batch.obs, batch.action)
    grads = [p.grad.norm() for p in agent.actor.parameters()]
    with torch.no_grad():
        action = (
            agent.actor.eval()(batch.obs) - agent.actor.action_bias
        ) / agent.actor.action_scale
    lags = pi["stat_lag"] + q["stat_lag"]
    return {
        **({"stat_lag": np.mean(lags)} if lags else {}),
        "train_eval_gap_policy": pi["gap"],
        "train_eval_gap_q": q["gap"],
        "actor_grad": torch.stack(grads).norm().item(),
        "saturation": (action.abs() > 0.98).float().mean().item(),
        "dead_units": np.mean(pi["dead_units"] + q["dead_units"]),
    }


@torch.no_grad()
def q_bias(agent, episodes, gamma):
    """Return q_bias and q_bias_std, over states, of (Q(s, a) - G) / max(|G|, 10), REDQ's form.

    G is the discounted return that followed. Of an episode that a time-out cut, the last states,
    where more than 1 % of G's weights is missing, are left out; {} if no state is left.
    """
    errors = []
    for episode in episodes:
        g = list(itertools.accumulate(episode.reward[::-1], lambda g, r: r + gamma * g))[::-1]
        cut = 0 if episode.terminated else math.ceil(math.log(0.01) / math.log(gamma))
        obs, action, g = (
            x[: max(len(g) - cut, 0)] for x in (episode.obs, episode.action, np.array(g))
        )
        obs = agent.obs_filter(obs, update=False)
        inputs = (
            torch.as_tensor(x, dtype=torch.float32, device=agent.device) for x in (obs, action)
        )
        q = agent.critic.eval()(*inputs).cpu().numpy()
        errors.append((q - g) / np.maximum(np.abs(g), 10))
    errors = np.concatenate(errors)
    return {"q_bias": errors.mean(), "q_bias_std": errors.std()} if len(errors) else {}


# NORM end
# ------------------------------------------------------------------------------------- Checkpoint

PARTS = "actor", "critic", "actor_target", "critic_target", "actor_optimizer", "critic_optimizer"


def write(path, save):
    """Let save(file) write a new file and move it into place, so that a kill leaves old or new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        save(file)
    os.replace(temporary, path)


def save_run(run_dir, agent, buffer, generators, progress):
    """Write all that `load_run` needs to go on as if the run had never stopped."""
    state = {part: getattr(agent, part).state_dict() for part in PARTS}
    state |= {"buffer": buffer.state_dict(), "progress": progress, "torch": torch.get_rng_state()}
    state["generators"] = [generator.bit_generator.state for generator in generators]
    # NORM begin: save: statistics go with the weights; the buffers of layers are in state_dict()
    for name, stat in (("obs_stat", agent.obs_stat), ("obs_filter", agent.obs_filter.stat)):
        state[name] = {key: torch.from_numpy(value) for key, value in stat.state_dict().items()}
    write(run_dir / "obs_stats.npz", agent.obs_stat.save)
    # NORM end
    write(run_dir / "checkpoint.pt", lambda file: torch.save(state, file))


def load_run(run_dir, agent, buffer, generators):
    """Restore what `save_run` wrote and return its progress; nothing in the file is executed."""
    state = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    for part in PARTS:
        getattr(agent, part).load_state_dict(state[part])
    buffer.load_state_dict(state["buffer"])
    torch.set_rng_state(state["torch"])
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.bit_generator.state = saved
    agent.obs_stat.load_state_dict(state["obs_stat"])  # NORM save: the statistics come back
    agent.obs_filter.stat.load_state_dict(state["obs_filter"])  # NORM save: with the weights
    return state["progress"]


# ------------------------------------------------------------------------------------------ Train


def make_env(args):
    """Return the environment; end with one line if it is unknown or of a kind that DDPG cannot use."""
    try:
        env = gym.wrappers.RecordEpisodeStatistics(gym.make(args.env))
    except gym.error.Error as error:
        fail(f"--env {args.env}: {error}")
    obs_space, action_space = env.observation_space, env.action_space
    if not isinstance(action_space, gym.spaces.Box) or not action_space.is_bounded():
        fail(
            f"--env {args.env} has actions {action_space}: choose one with bounded continuous ones"
        )
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        fail(f"--env {args.env} has observations {obs_space}: choose one with a vector of numbers")
    return env


def make_run_dir(args):
    """Make and return the folder of a new run; no two runs get the same."""
    name = f"seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    # NORM begin: flag: the name of a run says what normalizes it
    changed = [f for f in fields(Args) if f.name.startswith(("norm_", "bn_"))]
    changed = [
        (f.name, getattr(args, f.name)) for f in changed if getattr(args, f.name) != f.default
    ]
    words = [
        f"{k}={'+'.join(v) if k == 'norm_position' else v}" for k, v in changed if k != "norm_stats"
    ]
    name = "-".join([args.norm, *words, name])
    # NORM end
    parent = Path("runs") / args.env / Path(__file__).stem
    names = itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2)))
    for run_dir in [Path(args.run_dir)] if args.run_dir else (parent / name for name in names):
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            continue
    fail(f"--run-dir {args.run_dir} exists: choose another, or continue it with --resume")


def saved_args(run_dir):
    """Return the options of the run in run_dir, or end with one line if there is none of ours."""
    try:
        saved = json.loads((Path(run_dir) / "args.json").read_text())["args"]
        saved = Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
        return replace(saved, resume=str(run_dir))
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"--resume {run_dir} is no run of {Path(__file__).name}: {error}")


def open_run(args):
    """Return the folder of a new run, or of the one to resume, with its options in args.json."""
    if args.resume:
        run_dir = Path(args.resume)
        fixed = {f.name for f in fields(Args)} - {"total_steps", "eval_every", "eval_episodes"}
        fixed -= {"save_every", "device", "run_dir"}
        for name in fixed:
            if getattr(args, name) != getattr(saved_args(run_dir), name):
                fail(f"--{name.replace('_', '-')} cannot change in a resumed run: leave it out")
    else:
        run_dir = make_run_dir(args)
    versions = {x: importlib.metadata.version(x) for x in ("torch", "gymnasium", "mujoco", "numpy")}
    about = {"args": asdict(replace(args, resume="")), "versions": versions}
    about["versions"]["python"] = platform.python_version()
    write(run_dir / "args.json", lambda file: file.write(json.dumps(about, indent=2).encode()))
    return run_dir


def say(bar, args, step, mean, std):
    """Show an evaluation at the progress bar, or as a line where there is no terminal."""
    bar.set_postfix_str(f"eval {mean:.1f} ± {std:.1f}")
    if bar.disable:
        print(f"step {step} of {args.total_steps}: eval {mean:.1f} ± {std:.1f}", flush=True)


def report_evaluation(agent, env, args, writer, step):
    """Play the evaluation episodes, log what they show, and return (step, mean return, std)."""
    episodes = evaluate(agent, env, args.eval_episodes)
    returns = [float(episode.reward.sum()) for episode in episodes]
    for name, value in q_bias(agent, episodes, args.gamma).items():  # NORM report: does the critic
        writer.add_scalar(f"norm/{name}", value, step)  # NORM report: still tell the truth?
    writer.add_scalar("eval/return", np.mean(returns), step)
    writer.add_scalar("eval/return_std", np.std(returns), step)
    return step, float(np.mean(returns)), float(np.std(returns))


def train(args):
    """Train a policy; every file of the run lies in the folder that is returned.

    Returns {"run_dir": str, "eval": [(step, mean return, std over episodes), ...], "steps": int,
    "updates": int, "diverged": bool}. Options that cannot work raise SystemExit(2).
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
    buffer = ReplayBuffer(args.buffer_size, *env.observation_space.shape, *env.action_space.shape)
    run_dir = open_run(args)
    step, updates, evaluations, diverged = 0, 0, [], False
    if args.resume:
        step, updates, evaluations = load_run(run_dir, agent, buffer, generators)
        evaluations = [e for e in evaluations if e[0] < args.total_steps]  # the last is made anew
    writer = SummaryWriter(run_dir, purge_step=step + 1 if args.resume else None)
    writer.add_custom_scalars(PANELS)  # NORM report: the normalization panel comes first
    print(f"run: {run_dir}", flush=True)

    started, first_step, saved_step = time.time(), step, step
    bar = tqdm(total=args.total_steps, initial=step, unit="step", smoothing=0.01, disable=None)
    obs, _ = env.reset()
    agent.obs_stat.push(obs)  # NORM obs: each observation of training counts once, here and below
    while step < args.total_steps and not diverged:
        # act
        if step < args.learning_starts:
            action = env.action_space.sample()
        else:
            action = explore(agent, obs, env.action_space, rng, args.noise)
        # step
        next_obs, reward, terminated, truncated, info = env.step(action)
        agent.obs_stat.push(next_obs)  # NORM obs: evaluation and replay never count
        step += 1
        bar.update()
        # store
        buffer.add(obs, action, reward, next_obs, terminated)
        obs = next_obs
        # learn
        if step > args.learning_starts:
            batch = buffer.sample(rng, args.batch_size)
            batch = filter_batch(agent.obs_filter, batch)  # NORM obs: the replay holds raw ones
            batch = Batch(*(torch.as_tensor(x, dtype=torch.float32, device=device) for x in batch))
            losses = update(agent, batch, args)
            updates += 1
            diverged = not torch.isfinite(losses["critic"])
        # report
        if updates and step % LOG_EVERY == 0:
            writer.add_scalar("charts/SPS", (step - first_step) / (time.time() - started), step)
            for name, value in losses.items():
                writer.add_scalar(f"losses/{name}", value, step)
            for name, value in norm_scalars(agent, batch).items():  # NORM report: once in a while
                writer.add_scalar(f"norm/{name}", value, step)  # NORM report: each has a docstring
        if args.eval_every and step % args.eval_every == 0 and step < args.total_steps:
            evaluations.append(report_evaluation(agent, eval_env, args, writer, step))
            say(bar, args, *evaluations[-1])
        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", info["episode"]["r"], step)
            writer.add_scalar("charts/episodic_length", info["episode"]["l"], step)
            if step - saved_step >= args.save_every and not diverged:
                writer.flush()
                save_run(run_dir, agent, buffer, generators, (step, updates, evaluations))
                saved_step = step
            obs, _ = env.reset()
            agent.obs_stat.push(obs)  # NORM obs: the first of an episode counts like the others
    bar.close()
    if not diverged:
        evaluations.append(report_evaluation(agent, eval_env, args, writer, step))
        save_run(run_dir, agent, buffer, generators, (step, updates, evaluations))
    writer.close()
    result = {"run_dir": str(run_dir), "eval": evaluations, "steps": step, "updates": updates}
    result["diverged"] = diverged
    write(run_dir / "result.json", lambda file: file.write(json.dumps(result).encode()))
    if diverged:
        print(f"diverged: the critic's loss is not finite at step {step}", file=sys.stderr)
    else:
        print("final evaluation: step {}, return {:.1f} ± {:.1f}".format(*evaluations[-1]))
    print(f"files: {run_dir}\nlook:  tensorboard --logdir {run_dir}")
    return result


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.resume:  # what is not given again is as it was
        args = tyro.cli(Args, default=saved_args(args.resume))
    try:
        sys.exit(3 if train(args)["diverged"] else 0)
    except KeyboardInterrupt:
        sys.exit("stopped: --resume continues from the last checkpoint")
