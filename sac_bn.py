"""SAC in one file (Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications).

python sac_bn.py --env Ant-v4
From naive batch norm to what works, each line adds to the last:  # NORM flag: the ladder
python sac_bn.py --env Ant-v4 --norm batchnorm  # NORM flag: naive, to watch it fail
    --bn-policy-critic eval  # NORM flag: the actor's loss uses statistics that it cannot move
    --bn-joint  # NORM flag: (s, a) and (s', a') share their statistics
    --bn-target train  # NORM flag: the target critic uses its batch's, too: the recipe
    --weight-norm  # NORM flag: weights of fixed length keep the learning rate that was set
    --reward-norm  # NORM flag: Q has one scale in every environment
CrossQ (Bhatt et al. 2024) is a branch after --bn-joint:  # NORM flag: without a target network
    --no-target-network  # NORM flag: both halves of the joint pass come from one network
    --norm batchrenorm --norm-position input post --bn-momentum 0.01  # NORM flag: its layers
    --adam-beta1 0.5 --policy-delay 3 --critic-hidden-sizes 2048 2048  # NORM flag: its constants
python sac_bn.py --resume runs/Ant-v4/sac_bn/RUN

NORM, a kind and a reason stand where normalization enters. To strip it:  # NORM flag: help
sed '/NORM [b]egin/,/NORM [e]nd/d; /[#] NORM/d' sac_bn.py > plain.py  # NORM flag: help

Equations and appendices are those of the paper (arXiv 1812.05905). Details that it does not have:
D1  Uniformly random actions at first. Evaluation plays the median, tanh(mean) (SB3).
D2  A time-out is not a death: the target goes on through it (Pardo et al., arXiv 1712.00378).
D3  Actions are in [-1, 1], and scaled to the environment's bounds outside the policy; so the target
    entropy means the same in all units.
D4  Learning rates are CrossQ's. SAC's paper: --actor-lr 3e-4 --critic-lr 3e-4 --alpha-lr 3e-4
"""

import copy
import itertools
import json
import math
import random
import re
import signal
import sys
import time
import traceback
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from zfilter import RewardScale, ZFilter  # NORM obs: running statistics

torch.distributions.Distribution.set_default_validate_args(False)  # NaN is for `checked` to find


# ------------------------------------------------------------------------------------------- Args
@dataclass
class Args:
    env: str = "HalfCheetah-v4"  # Gymnasium id of the environment
    seed: int = 1  # of all random numbers
    total_steps: int = 1_000_000  # environment steps to train for
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one
    eval_every: int = 10_000  # steps between evaluations; 0 for one at the end only
    eval_episodes: int = 5  # episodes of an evaluation, without noise, from the same starts
    max_episode_steps: int = 0  # 0: the environment's own limit, or 10000 where it sets none
    capture_video: bool = False  # record the episodes of evaluations in the run's videos/
    run_dir: str = ""  # folder of the run; default: a new one in runs/<env>/<script>
    save_every: int = 20_000  # steps between checkpoints, which wait for the end of an episode
    resume: str = ""  # folder of a run to continue with its options, or to a higher total_steps
    # NORM begin: flag: what normalizes, where it stands, and whose statistics each pass uses
    Norm = Literal["none", "batchnorm", "batchrenorm", "layernorm", "zfilter", "fixed"]
    norm: tuple[Norm, ...] = ("none",)  # layers, a filter (zfilter, fixed) of observations, or both
    # where layers stand: on the input, before or after each hidden activation
    norm_position: tuple[Literal["input", "pre", "post"], ...] = ("post",)
    norm_net: Literal["both", "actor", "critic"] = "both"  # which network has the layers
    norm_stats: str = ""  # fixed: the obs_stats.npz of an earlier run
    bn_momentum: float = 0.1  # weight of the newest batch in running statistics (JAX: 1 - this)
    bn_warmup: int = 100_000  # batchrenorm: passes in train mode that are plain batch norm (CrossQ)
    # eval: the target critic uses running statistics, copied from the live one. train: its batch's
    bn_target: Literal["eval", "train"] = "eval"
    # train: in the actor's loss the critic uses its batch's statistics (fails). eval: running ones
    bn_policy_critic: Literal["train", "eval"] = "train"
    bn_joint: bool = False  # (s, a) and (s', a') pass the critic as one batch (CrossNorm, CrossQ)
    weight_norm: bool = False  # keep each hidden unit's (weights, bias) at length 1 (XQC)
    reward_norm: bool = False  # divide rewards by the running deviation of their discounted sums
    # NORM end
    learning_starts: int = 5_000  # steps of random actions, before the first update (D1)
    batch_size: int = 256  # transitions in an update
    buffer_size: int = 1_000_000  # transitions that the replay buffer keeps
    actor_lr: float = 1e-3  # Adam's learning rate
    critic_lr: float = 1e-3  # Adam's learning rate
    alpha_lr: float = 1e-3  # Adam's learning rate, for the temperature
    adam_beta1: float = 0.9  # Adam's memory of gradients, for actor and critics
    policy_delay: int = 1  # updates of the critics for one of actor and temperature
    gamma: float = 0.99  # discount per step
    tau: float = 0.005  # weight of the live network in its target
    target_entropy: float | None = None  # default: minus the dimension of an action
    hidden_sizes: tuple[int, ...] = (256, 256)  # width of each hidden layer
    critic_hidden_sizes: tuple[int, ...] = ()  # those of the critics, if they differ
    max_grad_norm: float = 0.0  # longest gradient of a network; 0 for any length
    target_network: bool = True  # no: bootstrap from the live critics

    def __post_init__(self):
        if isinstance(self.norm, str):  # NORM flag: Args(norm="batchnorm") works in Python, too
            self.norm = (self.norm,)  # NORM flag: as on the command line
        check_options(self)


# NORM begin: layer: what --norm builds, and where --norm-position puts it
# --------------------------------------------------------------------------- Normalization layers
class BatchRenorm(nn.BatchNorm1d):
    """Batch renormalization (Ioffe 2017, arXiv 1702.03275), with CrossQ's bounds and epsilon.

    y = weight (x_hat r + d) + bias, where x_hat is batch norm's. The constants r = std_B / std and
    d = (mean_B - mean) / std (B: batch), unless clipped, give eval mode's output. rstd: 1 / std_B.
    """

    def __init__(self, features, momentum, warmup):
        super().__init__(features, eps=1e-3, momentum=momentum)
        self.warmup = warmup

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x_hat, mean, rstd = torch.native_batch_norm(x, None, None, None, None, True, 0, self.eps)
        with torch.no_grad():
            std = (self.running_var + self.eps).sqrt()
            warmed_up = self.num_batches_tracked >= self.warmup  # before: r = 1, d = 0, batch norm
            r = (1 / (rstd * std)).clamp(1 / 3, 3).where(warmed_up, 1.0)
            d = ((mean - self.running_mean) / std).clamp(-5, 5).where(warmed_up, 0.0)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(rstd**-2 - self.eps, self.momentum)
            self.num_batches_tracked += 1
        return self.weight * (x_hat * r + d) + self.bias


def norm_layer(features, args):
    """Return the layer of --norm for inputs (n, features)."""
    if "layernorm" in args.norm:
        return nn.LayerNorm(features)
    if "batchnorm" in args.norm:
        return nn.BatchNorm1d(features, momentum=args.bn_momentum)
    return BatchRenorm(features, args.bn_momentum, args.bn_warmup)


def add_norm(net, name, args):
    """Insert the layers of --norm into net, at --norm-position, if --norm-net has this name."""
    has_layer = {"batchnorm", "batchrenorm", "layernorm"} & {*args.norm}
    if not has_layer or args.norm_net not in ("both", name):
        return
    for k in reversed(range(1, len(net), 2)):  # the activations, last one first, as they shift
        hidden = net[k - 1]
        hidden.has_unit_length = args.weight_norm  # project_weights asks for it
        if "post" in args.norm_position:
            net.insert(k + 1, norm_layer(hidden.out_features, args))
        if "pre" in args.norm_position:
            net.insert(k, norm_layer(hidden.out_features, args))
    if "input" in args.norm_position:
        net.insert(0, norm_layer(net[0].in_features, args))
    project_weights(net)


@torch.no_grad()
def project_weights(net):
    """With --weight-norm, give weights and bias of a hidden unit, as one vector, length 1 (XQC).

    If batch norm follows, even after a ReLU, only their direction matters, and the longer they are,
    the less a gradient step turns them. At length 1 equal steps turn them equally.
    """
    for layer in net.modules():
        if getattr(layer, "has_unit_length", False):
            length = torch.cat([layer.weight, layer.bias.unsqueeze(1)], dim=1).norm(dim=1)
            layer.weight /= length.unsqueeze(1)
            layer.bias /= length


# NORM end
# --------------------------------------------------------------------------------------- Networks
def make_net(*sizes):
    """Return linear layers from sizes[0] features to sizes[-1], all but the last one activated."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """pi(a|s), a Gaussian squashed by tanh: observations (n, obs_dim) to actions (n, dim)."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.net = make_net(obs_dim, *args.hidden_sizes, 2 * action_dim)
        add_norm(self.net, "actor", args)  # NORM layer: at --norm-position

    def forward(self, obs):
        """Return the median actions."""
        mean, _ = self.net(obs).chunk(2, dim=1)
        return torch.tanh(mean)

    def sample(self, obs):
        """Return actions that gradients flow through, and log pi(a|s), (n,) (Appendix C)."""
        mean, log_std = self.net(obs).chunk(2, dim=1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())  # as in SB3
        u = normal.rsample()
        action = torch.tanh(u)
        # log |da/du| = log(1 - tanh(u)^2), in a form that is finite also where tanh(u) rounds to 1
        log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return action, (normal.log_prob(u) - log_slope).sum(1)


class Critic(nn.Module):
    """Two Q(s, a): observations (n, obs_dim) and actions (n, action_dim) to values (n, 2)."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        sizes = args.critic_hidden_sizes or args.hidden_sizes
        self.nets = nn.ModuleList(make_net(obs_dim + action_dim, *sizes, 1) for _ in range(2))
        for net in self.nets:  # NORM layer: of both
            add_norm(net, "critic", args)  # NORM layer: on (s, a)

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=1)
        return torch.cat([net(x) for net in self.nets], dim=1)


# ------------------------------------------------------------------------------ Losses and update
# Transitions: obs and next_obs (n, obs_dim), action (n, action_dim), the others (n,).
Batch = namedtuple("Batch", "obs action reward next_obs terminated")


def q_values(agent, batch, next_action, args):
    """Return Q(s, a), and Q'(s', a') without gradient."""
    # NORM begin: batch: one pass, so that (s, a) and (s', a') share one mean and variance
    # Else the running statistics never meet (s', a'); or, with --bn-target train, each half is
    # centered on a mean of its own, which hides from the critic how the two differ.
    if args.bn_joint:
        both = torch.cat([batch.obs, batch.next_obs]), torch.cat([batch.action, next_action])
        q, q_next = agent.critic.train()(*both).chunk(2)
        if args.target_network:  # the live q_next only served the statistics
            agent.critic_target.train(args.bn_target == "train")
            inputs = both if args.bn_target == "train" else (batch.next_obs, next_action)
            with torch.no_grad():
                q_next = agent.critic_target(*inputs)[-len(q) :]  # of (s', a')
        return q, q_next.detach()
    # NORM end
    with torch.no_grad():
        agent.critic_target.train(args.bn_target == "train")  # NORM mode: whose statistics it uses
        q_next = agent.critic_target(batch.next_obs, next_action)
    agent.critic.train()  # NORM mode: learning uses the batch's statistics, and moves running ones
    return agent.critic(batch.obs, batch.action), q_next


def critic_loss(agent, batch, args):
    """Return the mean of (Q(s, a) - y)^2, summed over the critics (Eq. 5), and Q(s, a), (n, 2)."""
    with torch.no_grad():
        agent.actor.eval()  # NORM mode: a' comes from running statistics, as in acting
        next_action, next_log_prob = agent.actor.sample(batch.next_obs)
    q, q_next = q_values(agent, batch, next_action, args)
    q_next = q_next.amin(1) - agent.log_alpha.exp().detach() * next_log_prob
    td_target = batch.reward + args.gamma * (1 - batch.terminated) * q_next  # y (D2)
    return (q - td_target.unsqueeze(1)).square().mean(0).sum(), q


def actor_loss(agent, batch, args):
    """Return the mean of alpha log pi(a|s) - min Q(s, a), a ~ pi (Eq. 9), and log pi(a|s), (n,)."""
    agent.actor.train()  # NORM mode: learning uses the batch's statistics, and moves running ones
    # NORM mode: in train mode each feature's mean is beta, learnt, whatever pi does. If such a
    # NORM mode: layer feeds the output (w, b), mean Q = w beta + b: what is left is -|Q1 - Q2| / 2.
    agent.critic.train(args.bn_policy_critic == "train")  # NORM mode: train is naive, eval repairs
    action, log_prob = agent.actor.sample(batch.obs)
    alpha = agent.log_alpha.exp().detach()
    return (alpha * log_prob - agent.critic(batch.obs, action).amin(1)).mean(), log_prob


def alpha_loss(agent, log_prob):
    """Return the mean of -alpha (log pi(a|s) + target entropy) (Eq. 18)."""
    return -(agent.log_alpha.exp() * (log_prob.detach() + agent.target_entropy)).mean()


def gradient_step(optimizer, loss, max_grad_norm):
    """Descend the loss, by a gradient no longer than max_grad_norm unless that is 0."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)  # so the actor's loss gives the critic no gradient
    if max_grad_norm:
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()


@torch.no_grad()
def update_target(target, source, tau):
    """theta' <- (1 - tau) theta' + tau theta (Algorithm 1)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
    for old, new in zip(target.buffers(), source.buffers(), strict=True):  # NORM target: statistics
        old.copy_(new)  # NORM target: running statistics: copied, so newer than averaged weights


def update(agent, batch, updates, args):
    """Take step number `updates` with critics, actor, temperature, targets; return losses."""
    loss_q, q = critic_loss(agent, batch, args)
    gradient_step(agent.critic_optimizer, loss_q, args.max_grad_norm)
    project_weights(agent.critic)  # NORM layer: for --weight-norm: a step lengthens weights
    losses = {"losses/critic": loss_q, "losses/q": q.mean()}
    if updates % args.policy_delay == 0:
        loss_pi, log_prob = actor_loss(agent, batch, args)
        gradient_step(agent.actor_optimizer, loss_pi, args.max_grad_norm)
        project_weights(agent.actor)  # NORM layer: for --weight-norm: a step lengthens weights
        gradient_step(agent.alpha_optimizer, alpha_loss(agent, log_prob), 0.0)
        losses |= {"losses/actor": loss_pi, "losses/entropy": -log_prob.mean()}
        losses["losses/alpha"] = agent.log_alpha.exp()
    if args.target_network:
        update_target(agent.critic_target, agent.critic, args.tau)
    return losses


# ------------------------------------------------------------------------------ Acting and memory
class ReplayBuffer:
    """The newest `capacity` transitions, raw float32, in arrays that are allocated once."""

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
        rows = rng.integers(len(self), size=n)
        return Batch(*(array[rows] for array in self.data))

    def state_dict(self):
        return {"added": self.added, "data": [torch.from_numpy(x[: len(self)]) for x in self.data]}

    def load_state_dict(self, state):
        self.added = state["added"]
        for array, saved in zip(self.data, state["data"], strict=True):
            array[: len(self)] = saved


def sample_batch(agent, rng, args):
    """Return a Batch from the replay as the networks take it."""
    batch = agent.buffer.sample(rng, args.batch_size)
    # NORM begin: obs: the replay stays raw, and is normalized by current statistics
    obs, next_obs = (agent.obs_filter(x) for x in (batch.obs, batch.next_obs))
    batch = batch._replace(obs=obs, next_obs=next_obs)
    if args.reward_norm:
        batch = batch._replace(reward=agent.reward_scale(batch.reward))
    # NORM end
    return Batch(*(torch.as_tensor(x, dtype=torch.float32, device=agent.device) for x in batch))


@torch.no_grad()
def act(agent, obs, explores=False):
    """Return the median action, or a ~ pi(a|s), (action_dim,), for one observation, (obs_dim,)."""
    obs = agent.obs_filter(obs)  # NORM obs: as in sample_batch
    agent.actor.eval()  # NORM mode: one observation has no batch statistics
    obs = torch.as_tensor(obs, dtype=torch.float32, device=agent.device).unsqueeze(0)
    action = agent.actor.sample(obs)[0] if explores else agent.actor(obs)
    return action.squeeze(0).cpu().numpy()


# ------------------------------------------------------------------------------------------ Train
def make_agent(env, args, device):
    """Return networks, the critics' target (a copy, or the live ones), optimizers and replay."""
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = SimpleNamespace(device=device)
    agent.actor = Actor(obs_dim, action_dim, args).to(device)
    agent.critic = Critic(obs_dim, action_dim, args).to(device)
    agent.critic_target = copy.deepcopy(agent.critic) if args.target_network else agent.critic
    agent.temperature = nn.ParameterDict({"log_alpha": torch.zeros(())}).to(device)
    agent.log_alpha = agent.temperature["log_alpha"]  # log: alpha > 0; in a module: Run saves it
    agent.target_entropy = -action_dim if args.target_entropy is None else args.target_entropy
    betas = args.adam_beta1, 0.999
    agent.actor_optimizer = Adam(agent.actor.parameters(), args.actor_lr, betas, fused=True)
    agent.critic_optimizer = Adam(agent.critic.parameters(), args.critic_lr, betas, fused=True)
    agent.alpha_optimizer = Adam(agent.temperature.parameters(), args.alpha_lr, fused=True)
    agent.buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim)
    # NORM begin: obs: what stands between an observation and the networks
    agent.obs_stat = ZFilter(obs_dim)  # learns from all states that training meets
    agent.obs_filter = nn.Identity()
    if "zfilter" in args.norm:
        agent.obs_filter = agent.obs_stat  # by running statistics
    if "fixed" in args.norm:
        agent.obs_filter = ZFilter(obs_dim)  # by --norm-stats
        if not args.resume:  # a checkpoint holds the statistics, too
            agent.obs_filter.load(args.norm_stats, env=args.env)
    agent.reward_scale = RewardScale(1, args.gamma)  # for --reward-norm
    # NORM end
    return agent


def train(args):
    """Train a policy; return {"run_dir", "eval": [(step, mean, std), ...], "steps", ...}."""
    torch.set_num_threads(1)  # more are slower on busy cores, and here hardly faster
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    torch.manual_seed(seeds[0])
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    rng = np.random.default_rng(seeds[1])
    env, eval_env = make_env(args), make_env(args, is_shown=True)
    env.unwrapped.reset(seed=seeds[2])  # makes the generator that Run saves
    env.action_space.seed(seeds[3])
    agent = make_agent(env, args, device)
    run = Run(args, agent, [rng, env.unwrapped.np_random, env.action_space.np_random])
    if args.capture_video:
        folder, name = str(run.dir / "videos"), f"from-step{run.step}"
        eval_env = gym.wrappers.RecordVideo(eval_env, folder, lambda _: True, name_prefix=name)
    obs, losses = None, {}
    cpu = torch.cpu.get_capabilities()
    if cpu.get("avx512_f") and not cpu.get("amx_tile"):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # oneDNN; float32 if without AMX
    try:
        while run.step < args.total_steps:
            if obs is None:  # an episode begins
                obs, _ = env.reset()
                agent.obs_stat.push(obs)  # NORM obs: each observation of training counts once
            # act
            if run.step < args.learning_starts:
                action = env.action_space.sample()
            else:
                action = act(agent, obs, explores=True)
            # step
            next_obs, reward, terminated, truncated, _ = env.step(action)
            agent.obs_stat.push(next_obs)  # NORM obs: but none of replay or evaluation
            done = terminated or truncated
            agent.reward_scale.learn(reward, done)  # NORM reward: each reward counts once
            run.step += 1
            # store
            agent.buffer.add(obs, action, reward, next_obs, terminated)
            obs = None if done else next_obs
            # learn
            if run.step > args.learning_starts:
                batch = sample_batch(agent, rng, args)
                run.updates += 1
                losses = update(agent, batch, run.updates, args)
                # every 1000 steps, at the actor's next step
                if run.step % 1000 < args.policy_delay and "losses/actor" in losses:
                    run.log(losses)
                    run.log(norm_scalars(agent, batch))  # NORM report: no effect on learning
            # report
            if args.eval_every and run.step % args.eval_every == 0 and run.step < args.total_steps:
                run.log_evaluation(evaluate(agent, eval_env, args))
            if done:
                run.log({"charts/episodic_return": env.return_queue[-1]})
                if run.step // args.save_every > run.saved // args.save_every:
                    run.save()
        run.log(losses)  # else a NaN of the last steps would pass
        run.log_evaluation(evaluate(agent, eval_env, args))
        run.save()
    except FloatingPointError as error:
        return run.finish(f"diverged at step {run.step}: {error}")
    finally:
        env.close()
        eval_env.close()
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    return run.finish()


# --------------------------------------------------------------------- Evaluation and diagnostics
@torch.random.fork_rng()  # training keeps its own random numbers
def evaluate(agent, env, args):
    """Play without noise, learning nothing; return {name: value} of the episodes."""
    returns = []
    state = random.getstate(), np.random.get_state()
    errors = []  # NORM report: of Q
    for k in range(args.eval_episodes):
        obs, _ = env.reset(seed=1_000_000 + k)  # the same starts each time
        episode, done = [], False
        while not done:
            action = act(agent, obs)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            episode.append((obs, action, reward))
            obs, done = next_obs, terminated or truncated
        returns.append(np.sum([reward for _, _, reward in episode]))
        errors.extend(q_errors(agent, episode, terminated, args))  # NORM report: of Q
    scalars = {"eval/return": np.mean(returns), "eval/return_std": np.std(returns)}
    if errors:  # NORM report: none if every episode was cut too early
        scalars["norm/q_bias"] = np.mean(errors)  # NORM report: see q_errors
    random.setstate(state[0])
    np.random.set_state(state[1])
    return scalars


# NORM begin: report: what normalization does to a run, made visible
SCALARS = "norm/actor_grad", "norm/saturation", "norm/stat_lag", "norm/q_bias"


@torch.no_grad()
def q_errors(agent, episode, terminated, args):
    """Return (Q(s, a) - G) / max(|G|, 10) for the states of an episode, after REDQ's code.

    G is the discounted return that followed, with alpha times the entropy of all later actions; Q
    is the critics' mean. Actions are the policy's medians, REDQ draws them: where noise costs
    reward, Q is below G without error. After a time-out only those states count whose discount up
    to the cut is at most 0.01.
    """
    obs, action, rewards = map(np.array, zip(*episode, strict=True))
    floor = 10
    if args.reward_norm:  # Q is of scaled rewards
        rewards, floor = agent.reward_scale(rewards), agent.reward_scale(floor)
    inputs = agent.obs_filter(obs), action
    inputs = [torch.as_tensor(x, dtype=torch.float32, device=agent.device) for x in inputs]
    _, log_prob = agent.actor.eval().sample(inputs[0])
    bonus = -(agent.log_alpha.exp() * log_prob).cpu().numpy()
    q, g = agent.critic.eval()(*inputs).mean(1).cpu().numpy(), np.array([*rewards, 0.0])
    for t in reversed(range(len(q) - 1)):
        g[t] += args.gamma * (g[t + 1] + bonus[t + 1])
    known = np.logical_or(terminated, args.gamma ** np.arange(len(q), 0, -1) <= 0.01)
    return ((q - g[:-1]) / np.maximum(np.abs(g[:-1]), floor))[known]


@torch.no_grad()
def norm_scalars(agent, batch):
    """Return {name: value} about the last update, from its batch:

    actor_grad: norm of the actor's last gradient, as clipped.
    saturation: share of the components of the actor's actions with |a| > 0.98.
    stat_lag: mean over all layers of |running mean - batch mean| / batch std, for s or (s, a).
    """
    grads = [p.grad for p in agent.actor.parameters() if p.grad is not None]
    scalars, lags = {"norm/actor_grad": nn.utils.get_total_norm(grads)}, []
    scalars["norm/saturation"] = (agent.actor.eval()(batch.obs).abs() > 0.98).float().mean()
    for net, inputs in ((agent.actor, [batch.obs]), (agent.critic, [batch.obs, batch.action])):
        fresh = copy.deepcopy(net).train()
        for layer in fresh.modules():
            layer.momentum = 1.0  # a pass makes running statistics those of its batch
        fresh(*inputs)
        for old, new in zip(net.modules(), fresh.modules(), strict=True):
            if hasattr(old, "running_mean"):
                std = (new.running_var + new.eps).sqrt()
                lags.append(((old.running_mean - new.running_mean).abs() / std).mean())
    if lags:
        scalars["norm/stat_lag"] = torch.stack(lags).mean()
    return scalars


# NORM end
# ----------------------------------------------------------------- Environment and files of a run
def checked(values):
    """Return values if all are finite; raise FloatingPointError, which ends the run as diverged."""
    if not torch.as_tensor(values).isfinite().all():
        raise FloatingPointError("a number of the environment or of the policy is not finite")
    return values


def make_env(args, is_shown=False):
    """Return an environment of float32 vectors and actions in [-1, 1]; is_shown: for videos."""
    video = {"render_mode": "rgb_array"} if is_shown and args.capture_video else {}
    env = gym.make(args.env, max_episode_steps=args.max_episode_steps or None, **video)
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 10_000)
        if is_shown:  # one environment says it for both
            print(f"{args.env} sets no time limit: episodes end after 10000 steps", flush=True)
    obs_space, space = env.observation_space, env.action_space
    if not isinstance(space, gym.spaces.Box) or not space.is_bounded():
        raise ValueError(f"--env {args.env} acts in {space}: choose bounded, continuous actions")
    low, high = np.float64(space.low).ravel(), np.float64(space.high).ravel()

    def to_vector(obs):
        return checked(gym.spaces.flatten(obs_space, obs).astype(np.float32))

    def to_bounds(action):  # rounding may cross them, hence the clip
        action = np.clip((low + high + checked(action) * (high - low)) / 2, low, high)
        return action.reshape(space.shape).astype(space.dtype)

    env = gym.wrappers.TransformObservation(env, to_vector, gym.spaces.flatten_space(obs_space))
    env = gym.wrappers.TransformAction(env, to_bounds, gym.spaces.Box(-1, 1, low.shape))
    env = gym.wrappers.TransformReward(env, lambda reward: float(checked(np.squeeze(reward))))
    return gym.wrappers.RecordEpisodeStatistics(env, stats_key="ours")  # some fill "episode"


def check_options(args):
    """Raise ValueError, which tyro shows, for options that cannot work or would change nothing."""
    # NORM begin: flag: what --norm asks for
    layers = [x for x in args.norm if x in ("batchnorm", "batchrenorm", "layernorm")]
    filters = [x for x in args.norm if x in ("zfilter", "fixed")]
    one_each = max(len(layers), len(filters)) <= 1 and len(layers + filters) == len(args.norm)
    is_batch = layers not in ([], ["layernorm"])
    # NORM end
    positive = "eval_episodes", "save_every", "batch_size", "buffer_size", "policy_delay"
    needs = [  # (options, what they need, whether it is met), for those that are not the default
        *((name, "1 or more", getattr(args, name) > 0) for name in positive),
        ("device", "a GPU", args.device != "cuda" or torch.cuda.is_available()),
        ("hidden_sizes", "a hidden layer", args.hidden_sizes),
        ("tau", "target networks", args.target_network),
        # NORM begin: flag: an option that would change nothing is a mistake
        ("norm", "one layer, one filter, or one of each", one_each),
        ("norm_position norm_net weight_norm", "a normalization layer", layers),
        ("weight_norm", "--norm-position pre or post", {"pre", "post"} & {*args.norm_position}),
        ("norm_position", "input, pre or post", {*args.norm_position} & {"input", "pre", "post"}),
        ("bn_momentum bn_target bn_policy_critic bn_joint", "batch norm", is_batch),
        ("bn_policy_critic bn_joint bn_target", "a critic with layers", args.norm_net != "actor"),
        ("bn_target", "target networks", args.target_network),
        ("bn_warmup", "--norm batchrenorm", "batchrenorm" in args.norm),
        ("batch_size", "2 or more for batch norm", args.batch_size > 1 or not is_batch),
        ("norm_stats", "--norm fixed", "fixed" in args.norm),
        ("norm", "--norm-stats if it is fixed", args.norm_stats or "fixed" not in args.norm),
        # NORM end
    ]
    for names, what, is_met in needs:
        for name in names.split():
            is_asked = name in FREE or not args.resume  # on resume, load compares the others
            if is_asked and getattr(args, name) != getattr(Args, name) and not is_met:
                raise ValueError(f"--{name.replace('_', '-')} needs {what}")


FREE = "total_steps", "device", "eval_every", "eval_episodes"  # what a resumed run may change
FREE += "save_every", "resume", "capture_video"


def write(path, save):
    """Let save fill a new file, then move it to path: a kill leaves the old one or the new."""
    new = path.with_name(f"new-{path.name}")
    save(new)
    new.replace(path)


class Run:
    """The files of a run, and its progress, whatever the algorithm."""

    def __init__(self, args, agent, generators):
        self.args, self.agent = args, agent
        self.generators = [x for x in generators if isinstance(x, np.random.Generator)]
        self.step, self.updates, self.evals = 0, 0, []
        shown = {k: v for k, v in vars(args).items() if k not in (*FREE, "env", "seed", "run_dir")}
        words = [f"{k} {v}" for k, v in shown.items() if v != getattr(Args, k)]
        words += [f"seed{args.seed}", time.strftime("%Y%m%d-%H%M%S"), str(time.time_ns() % 10**9)]
        name = re.sub(r"[^\w.]+", "-", " ".join(words))[-200:]
        new = args.run_dir or Path("runs", args.env.replace(":", "-"), Path(__file__).stem, name)
        self.dir = Path(args.resume or new)
        if args.resume:
            self.load()
        self.dir.mkdir(parents=True, exist_ok=bool(args.resume))
        names = "torch", "gymnasium", "mujoco", "numpy"
        about = {"script": Path(__file__).stem, "args": vars(args)}
        about["versions"] = {x: sys.modules[x].__version__ for x in names if x in sys.modules}
        write(self.dir / "args.json", lambda file: file.write_text(json.dumps(about, indent=2)))
        (self.dir / "result.json").unlink(missing_ok=True)  # of a run that now goes further
        self.writer = SummaryWriter(self.dir, purge_step=self.step + 1)
        panel = {name: ["Multiline", [name]] for name in SCALARS}  # NORM report: a chart for each
        self.writer.add_custom_scalars({"Normalization": panel})  # NORM report: on the first page
        self.bar = tqdm(total=args.total_steps, initial=self.step, unit="step", disable=None)
        print(f"run: {self.dir}", flush=True)
        if len(self.generators) < len(generators):
            print("np_random cannot be saved: --resume will go on, but not to the bit")
        self.save()  # from now on --resume can go on from the last checkpoint

    def log(self, scalars):
        """Write {name: value} to the events; raise FloatingPointError if one is not finite."""
        self.bar.update(self.step - self.bar.n)
        for name, value in scalars.items():
            value = torch.as_tensor(value).item()
            self.writer.add_scalar(name, value, self.step)
            if not np.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")

    def log_evaluation(self, scalars):
        """Show, keep and log what `evaluate` returned."""
        mean, std = float(scalars["eval/return"]), float(scalars["eval/return_std"])
        self.bar.write(f"step {self.step}: return {mean:.1f} ± {std:.1f}", sys.stderr)
        self.log(scalars)
        self.evals = [e for e in self.evals if e[0] < self.step] + [(self.step, mean, std)]

    def save(self):
        """Write all that the run needs to go on, from the start of an episode."""
        parts = {k: part for k, part in vars(self.agent).items() if hasattr(part, "state_dict")}
        state = {"args": vars(self.args), "progress": (self.step, self.updates, self.evals)}
        state["agent"] = {name: part.state_dict() for name, part in parts.items()}
        numbers = [generator.bit_generator.state for generator in self.generators]
        numbers = [random.getstate(), np.random.get_state(legacy=False), *numbers]
        state["random"] = json.dumps(numbers, default=np.ndarray.tolist)
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        state["torch"] = torch.get_rng_state(), gpus
        stats = self.dir / "obs_stats.npz"  # NORM save: for --norm fixed
        write(stats, lambda x: self.agent.obs_stat.save(x, env=self.args.env))  # NORM save: its id
        self.writer.flush()  # a resumed run writes only the events that follow
        write(self.dir / "checkpoint.pt", lambda file: torch.save(state, file))
        self.saved = self.step

    def load(self):
        """Restore what `save` wrote; nothing in the file is executed."""
        state = torch.load(self.dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        for name, value in vars(self.args).items():
            if name not in FREE and state["args"].get(name) != value:
                raise ValueError(f"{self.dir} is a run with another --{name.replace('_', '-')}")
        for name, part in state["agent"].items():
            getattr(self.agent, name).load_state_dict(part)
        self.step, self.updates, self.evals = state["progress"]
        torch.set_rng_state(state["torch"][0])
        torch.cuda.set_rng_state_all(state["torch"][1][: torch.cuda.device_count()])
        (version, words, gauss), numpy_state, *numbers = json.loads(state["random"])
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(numpy_state)
        for generator, saved in zip(self.generators, numbers, strict=True):
            generator.bit_generator.state = saved

    def finish(self, *diverged):
        """Close the run, and return what it came to; diverged: words about a divergence."""
        result = {"run_dir": str(self.dir), "eval": self.evals, "steps": self.step}
        result |= {"updates": self.updates, "diverged": bool(diverged)}
        write(self.dir / "result.json", lambda file: file.write_text(json.dumps(result)))
        self.bar.close()
        self.writer.close()
        print(*diverged, f"files: {self.dir}", f"look:  tensorboard --logdir {self.dir}", sep="\n")
        return result


def saved_args(run_dir):
    """Return the options of a run, to resume it."""
    saved = torch.load(Path(run_dir, "checkpoint.pt"), "cpu", mmap=True, weights_only=True)["args"]
    if saved.keys() - vars(Args()).keys():
        raise ValueError(f"{run_dir} is of another script, or of another version of this one")
    device = "auto" if saved["device"] == "cuda" else saved["device"]  # a GPU may be gone
    return Args(**saved | {"resume": str(run_dir), "device": device})


def load_policy(run_dir):
    """Return a function from an observation of the plain environment to an action in its units."""
    args = saved_args(run_dir)
    env = make_env(args)
    agent = make_agent(env, args, "cpu")
    parts = torch.load(Path(run_dir, "checkpoint.pt"), "cpu", mmap=True, weights_only=True)["agent"]
    agent.actor.load_state_dict(parts["actor"])
    agent.obs_filter.load_state_dict(parts["obs_filter"])  # NORM save: the policy's statistics
    observe, execute = env.get_wrapper_attr("observation"), env.get_wrapper_attr("action")
    return lambda obs: execute(act(agent, observe(obs)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends as Ctrl-C does
    try:
        args = tyro.cli(Args)
        if args.resume:  # the rest is as in that run
            args = tyro.cli(Args, default=saved_args(args.resume))
        sys.exit(3 if train(args)["diverged"] else 0)
    except (ImportError, OSError, ValueError, gym.error.Error) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        sys.exit(f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})")
    except KeyboardInterrupt:
        sys.exit("stopped: --resume goes on from the last checkpoint")
