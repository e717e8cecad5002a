"""PPO in one file (Schulman et al. 2017, Proximal Policy Optimization Algorithms).

python ppo_bn.py --env HalfCheetah-v4
python ppo_bn.py --norm zfilter --reward-norm  # NORM flag: as usual on MuJoCo
python ppo_bn.py --norm batchnorm  # NORM flag: acts by running statistics, learns by the batch's
python ppo_bn.py --norm batchnorm --bn-rollout train  # NORM flag: acts by its batch's, too
python ppo_bn.py --resume runs/HalfCheetah-v4/ppo_bn/RUN

NORM, a kind and a reason stand where normalization enters. To strip it:  # NORM flag: help
sed '/NORM [b]egin/,/NORM [e]nd/d; /[#] NORM/d' ppo_bn.py > plain.py  # NORM flag: help

Equations are those of the paper (arXiv 1707.06347). Details that it does not have:
D1  A time-out is not a death: gamma V(s') is added to the last reward, s' being the true last
    observation (Pardo et al., arXiv 1712.00378).
D2  Advantages are standardized in each minibatch, all of equal size.
D3  Orthogonal weights; a small last layer of the actor (0.01), so at first states matter little;
    first deviation 0.5, independent of the state (Andrychowicz et al., arXiv 2006.05990).
D4  Continuous actions are scaled from [-1, 1] to the environment's bounds and clipped there, but
    not in the log-probability.
D5  One Adam with epsilon 1e-5 for both networks, a gradient no longer than 0.5, and a learning
    rate that falls to zero linearly (Engstrom et al., arXiv 2005.12729).
D6  Early stop when an epoch's mean KL divergence exceeds --target-kl (CleanRL: last minibatch's).
"""

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
    eval_every: int = 50_000  # steps between evaluations; 0 for one at the end only
    eval_episodes: int = 10  # episodes of an evaluation, without noise, from the same starts
    max_episode_steps: int = 0  # 0: the environment's own limit, or 10000 where it sets none
    capture_video: bool = False  # record one environment of each evaluation in the run's videos/
    run_dir: str = ""  # folder of the run; default: a new one in runs/<env>/<script>
    save_every: int = 200_000  # steps between checkpoints, after which all episodes begin anew
    resume: str = ""  # folder of a run to continue with its options, or to a higher total_steps
    # NORM begin: flag: what normalizes, where it stands, and whose statistics each pass uses
    Norm = Literal["none", "batchnorm", "batchrenorm", "layernorm", "zfilter", "fixed"]
    norm: tuple[Norm, ...] = ("none",)  # layers, a filter (zfilter, fixed) of observations, or both
    # where layers stand: on the input, before or after each hidden activation
    norm_position: tuple[Literal["input", "pre", "post"], ...] = ("post",)
    norm_net: Literal["both", "actor", "critic"] = "both"  # which network has the layers
    norm_stats: str = ""  # fixed: the obs_stats.npz of an earlier run
    bn_momentum: float = 0.1  # weight of the newest batch in running statistics (JAX: 1 - this)
    bn_warmup: int = 10_000  # batchrenorm: passes in train mode that are plain batch norm
    # eval: act by the running statistics. train: by those of all environments at that moment, which
    # also move the running ones; values and bootstraps are computed in the same mode
    bn_rollout: Literal["eval", "train"] = "eval"
    # train: learn by the batch's statistics, which also move the running ones. eval: by the running
    # ones; if --bn-rollout is eval, too, nothing moves them from 0 and 1
    bn_update: Literal["train", "eval"] = "train"
    reward_norm: bool = False  # divide rewards by the running deviation of their discounted sums
    # NORM end
    num_envs: int = 16  # environments that act in parallel
    num_steps: int = 128  # steps of each environment in a rollout
    epochs: int = 10  # passes of learning over a rollout
    minibatches: int = 32  # gradient steps in an epoch
    learning_rate: float = 3e-4  # Adam's, at the start (D5)
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # how slowly later TD errors fade from an advantage
    clip: float = 0.2  # largest change of the ratio that is rewarded
    value_coef: float = 0.5  # weight of the critic's loss
    entropy_coef: float = 0.0  # weight of the entropy bonus
    target_kl: float = 0.0  # mean divergence that ends the epochs; 0 for never (D6)
    hidden_sizes: tuple[int, ...] = (64, 64)  # width of each hidden layer
    max_grad_norm: float = 0.5  # longest gradient of a step; 0 for any length

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
        features = net[k - 1].out_features
        if "post" in args.norm_position:
            net.insert(k + 1, norm_layer(features, args))
        if "pre" in args.norm_position:
            net.insert(k, norm_layer(features, args))
    if "input" in args.norm_position:
        net.insert(0, norm_layer(net[0].in_features, args))


# NORM end
# --------------------------------------------------------------------------------------- Networks
def make_net(gain, *sizes):
    """Return linear layers from sizes[0] features to sizes[-1], all but the last one activated.

    Weights are orthogonal, those of the last layer scaled by gain (D3).
    """
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, gain if layer is layers[-2] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """pi(a|s): observations (n, obs_dim) to n distributions over actions."""

    def __init__(self, obs_dim, action_space, args):
        super().__init__()
        self.is_discrete = isinstance(action_space, gym.spaces.Discrete)
        outputs = int(action_space.n) if self.is_discrete else action_space.shape[0]
        self.net = make_net(0.01, obs_dim, *args.hidden_sizes, outputs)
        add_norm(self.net, "actor", args)  # NORM layer: at --norm-position
        if not self.is_discrete:
            self.log_std = nn.Parameter(torch.full((outputs,), math.log(0.5)))  # D3

    def forward(self, obs):
        outputs = self.net(obs)
        if self.is_discrete:
            return torch.distributions.Categorical(logits=checked(outputs))  # an index hides a NaN
        normal = torch.distributions.Normal(outputs, self.log_std.exp())
        return torch.distributions.Independent(normal, 1)


class Critic(nn.Module):
    """V(s): observations (n, obs_dim) to values, (n,)."""

    def __init__(self, obs_dim, args):
        super().__init__()
        self.net = make_net(1.0, obs_dim, *args.hidden_sizes, 1)
        add_norm(self.net, "critic", args)  # NORM layer: at --norm-position

    def forward(self, obs):
        return self.net(obs).squeeze(1)


# ------------------------------------------------------------------------------ Losses and update
# One step of n environments: obs (n, obs_dim), action (n, ...), the others (n,). Or T steps
# stacked: (T, n, ...).
Rollout = namedtuple("Rollout", "obs action log_prob value reward done")

# What is learnt from: obs (n, obs_dim), action (n, ...), the others (n,).
Batch = namedtuple("Batch", "obs action log_prob advantage returns")


def gae(reward, value, done, gamma, gae_lambda):
    """Return advantages (T, n) for rewards and ends, (T, n), and values, (T + 1, n) (Eq. 11)."""
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


def policy_loss(log_ratio, advantage, args):
    """Return -mean min(ratio A, clip(ratio) A), with ratios pi(a|s) / pi_old(a|s) (Eq. 7)."""
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)  # D2
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    return -torch.min(ratio * advantage, clipped * advantage).mean()


def gradient_step(optimizer, loss, max_grad_norm):
    """Descend the loss, by a gradient no longer than max_grad_norm unless that is 0."""
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()


def update(agent, batch, rng, args):
    """Learn from a rollout; return losses (KL: of the last epoch) and steps taken."""
    agent.actor.train(args.bn_update == "train")  # NORM mode: train: no longer the pi that acted
    agent.critic.train(args.bn_update == "train")  # NORM mode: train: moves running statistics
    taken, losses = 0, {}
    for _ in range(args.epochs):
        log_ratios, order = [], torch.as_tensor(rng.permutation(len(batch.obs)))
        for rows in order.chunk(args.minibatches):
            part = Batch(*(x[rows] for x in batch))
            policy = agent.actor(part.obs)
            log_ratio = policy.log_prob(part.action) - part.log_prob
            loss_pi = policy_loss(log_ratio, part.advantage, args)
            loss_v = (agent.critic(part.obs) - part.returns).square().mean()
            loss = loss_pi + args.value_coef * loss_v  # Eq. 9
            if args.entropy_coef:
                loss = loss - args.entropy_coef * policy.entropy().mean()
            gradient_step(agent.optimizer, loss, args.max_grad_norm)
            log_ratios.append(log_ratio.detach())
            taken += 1
            # NORM begin: report: max |ratio - 1| before any step: 0 if acting had these statistics
            if taken == 1:
                losses["norm/first_ratio"] = (log_ratios[0].exp() - 1).abs().max().clamp(max=1e6)
            # NORM end
        log_ratio = torch.cat(log_ratios)
        kl = (log_ratio.exp() - 1 - log_ratio).mean()  # Schulman's estimate
        if args.target_kl and kl > args.target_kl:  # D6
            break
    losses |= {"losses/policy": loss_pi, "losses/critic": loss_v, "losses/kl": kl}
    return losses | {"losses/entropy": policy.entropy().mean()}, taken


# ------------------------------------------------------------------------------ Acting and memory
def as_input(agent, obs):
    """Return observations (n, obs_dim) as the networks take them."""
    obs = agent.obs_filter(obs)  # NORM obs: applied here, learnt in train
    return torch.as_tensor(obs, dtype=torch.float32, device=agent.device)


@torch.no_grad()
def act(agent, obs):
    """Return the likeliest actions, (n, ...), for observations (n, obs_dim)."""
    agent.actor.eval()  # NORM mode: each action by its own state alone
    return agent.actor(as_input(agent, obs)).mode.cpu().numpy()


@torch.no_grad()
def explore(agent, obs, args):
    """Return the networks' input, pi(.|s) and V(s), for observations (n, obs_dim)."""
    # NORM obs: what the policy saw is stored, not the raw observation; filtered later, this would
    # NORM obs: get another log-probability, as if another policy had acted.
    obs = as_input(agent, obs)
    agent.actor.train(args.bn_rollout == "train")  # NORM mode: train: pi depends on all n states
    agent.critic.train(args.bn_rollout == "train")  # NORM mode: train: and so does V
    return obs, agent.actor(obs), agent.critic(obs)


@torch.no_grad()
def state_value(agent, obs, args):
    """Return V(s), (n,), without acting, for observations (n, obs_dim)."""
    agent.critic.train(args.bn_rollout == "train")  # NORM mode: that of the values in explore
    return agent.critic(as_input(agent, obs))


# ------------------------------------------------------------------------------------------ Train
def step_all(envs, actions):
    """Step each environment; return observations, rewards, terminated and truncated, (n, ...)."""
    steps = [env.step(action)[:4] for env, action in zip(envs, actions, strict=True)]
    obs, reward, *ends = map(np.array, zip(*steps, strict=True))
    return obs, reward, *(end.astype(bool) for end in ends)


def make_agent(env, args, device):
    """Return networks and their optimizer."""
    obs_dim = env.observation_space.shape[0]
    agent = SimpleNamespace(device=device)
    agent.actor = Actor(obs_dim, env.action_space, args).to(device)
    agent.critic = Critic(obs_dim, args).to(device)
    parameters = [*agent.actor.parameters(), *agent.critic.parameters()]
    agent.optimizer = Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    # NORM begin: obs: what stands between an observation and the networks
    agent.obs_stat = ZFilter(obs_dim)  # learns from all states that training meets
    agent.obs_filter = nn.Identity()
    if "zfilter" in args.norm:
        agent.obs_filter = agent.obs_stat  # by running statistics
    if "fixed" in args.norm:
        agent.obs_filter = ZFilter(obs_dim)  # by --norm-stats
        if not args.resume:  # a checkpoint holds the statistics, too
            agent.obs_filter.load(args.norm_stats, env=args.env)
    agent.reward_scale = RewardScale(args.num_envs, args.gamma)  # for --reward-norm
    # NORM end
    return agent


def train(args):
    """Train a policy; return {"run_dir", "eval": [(step, mean, std), ...], "steps", ...}."""
    torch.set_num_threads(1)  # more are slower on busy cores, and here hardly faster
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    seeds = np.random.SeedSequence(args.seed).generate_state(2 + args.num_envs).tolist()
    torch.manual_seed(seeds[0])
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    rng = np.random.default_rng(seeds[1])
    envs = [make_env(args) for _ in range(args.num_envs)]
    eval_envs = [make_env(args, is_shown=k == 0) for k in range(args.eval_episodes)]
    for env, seed in zip(envs, seeds[2:], strict=True):
        env.unwrapped.reset(seed=seed)  # makes the generator that Run saves
    agent = make_agent(envs[0], args, device)
    run = Run(args, agent, [rng, *(env.unwrapped.np_random for env in envs)])
    if args.capture_video:
        folder, name = str(run.dir / "videos"), f"from-step{run.step}"
        filmed = gym.wrappers.RecordVideo(eval_envs[0], folder, lambda _: True, name_prefix=name)
        eval_envs[0] = filmed
    obs = None
    try:
        while run.step < args.total_steps:
            before, steps, episode_returns = run.step, [], []
            rate = args.learning_rate * (1 - run.step / args.total_steps)  # D5
            agent.optimizer.param_groups[0]["lr"] = rate
            if obs is None:  # all episodes begin
                obs = np.array([env.reset()[0] for env in envs])
                agent.obs_stat.push(obs)  # NORM obs: each observation of training counts once
                agent.reward_scale.sums[:] = 0  # NORM reward: of episodes that begin
            for _ in range(args.num_steps):
                # act
                seen, policy, value = explore(agent, obs, args)
                action = policy.sample()
                # step
                next_obs, reward, terminated, truncated = step_all(envs, action.cpu().numpy())
                agent.obs_stat.push(next_obs)  # NORM obs: but none of evaluation
                done = terminated | truncated
                run.step += args.num_envs
                if args.reward_norm:  # NORM reward: --reward-norm
                    agent.reward_scale.learn(reward, done)  # NORM reward: before it is used
                    reward = agent.reward_scale(reward)  # NORM reward: what is learnt from
                # store
                timed_out = truncated & ~terminated
                if timed_out.any():  # D1
                    next_value = state_value(agent, next_obs, args).cpu().numpy()
                    reward = reward + args.gamma * timed_out * next_value
                arrays = torch.as_tensor(np.float32([reward, done]), device=device)
                steps.append(Rollout(seen, action, policy.log_prob(action), value, *arrays))
                for k in np.flatnonzero(done):
                    episode_returns.append(envs[k].return_queue[-1])
                    next_obs[k], _ = envs[k].reset()
                    agent.obs_stat.push(next_obs[k])  # NORM obs: an episode's first, too
                obs = next_obs
            # learn
            rollout = Rollout(*map(torch.stack, zip(*steps, strict=True)))
            batch = make_batch(rollout, state_value(agent, obs, args), args)
            losses, taken = update(agent, batch, rng, args)
            run.updates += taken
            # report
            run.log(losses)
            if episode_returns:
                run.log({"charts/episodic_return": np.mean(episode_returns)})
            due = args.eval_every and run.step // args.eval_every > before // args.eval_every
            last = run.step >= args.total_steps
            if due and not last:
                run.log_evaluation(evaluate(agent, eval_envs, args))
            if run.step // args.save_every > run.saved // args.save_every and not last:
                run.save()
                obs = None  # a resumed run cannot go on within an episode, so neither does this one
        run.log_evaluation(evaluate(agent, eval_envs, args))
        run.save()
    except FloatingPointError as error:
        return run.finish(f"diverged at step {run.step}: {error}")
    finally:
        for env in envs + eval_envs:
            env.close()
    return run.finish()


# --------------------------------------------------------------------- Evaluation and diagnostics
@torch.random.fork_rng()  # training keeps its own random numbers
def evaluate(agent, envs, args):
    """Play without noise, learning nothing; return {name: value} of the episodes."""
    state = random.getstate(), np.random.get_state()
    obs = np.array([env.reset(seed=1_000_000 + k)[0] for k, env in enumerate(envs)])
    returns, playing = np.zeros(len(envs)), np.ones(len(envs), bool)
    while playing.any():
        obs, reward, terminated, truncated = step_all(envs, act(agent, obs))
        returns[playing] += reward[playing]
        done = terminated | truncated
        playing &= ~done
        for k in np.flatnonzero(done & playing.any()):  # while others play, it plays on, uncounted
            obs[k], _ = envs[k].reset()
    random.setstate(state[0])
    np.random.set_state(state[1])
    return {"eval/return": np.mean(returns), "eval/return_std": np.std(returns)}


# ----------------------------------------------------------------- Environment and files of a run
def checked(values):
    """Return values if all are finite; raise FloatingPointError, which ends the run as diverged."""
    if not torch.as_tensor(values).isfinite().all():
        raise FloatingPointError("a number of the environment or of the policy is not finite")
    return values


def make_env(args, is_shown=False):
    """Return an environment with actions in [-1, 1], or discrete ones; is_shown: for videos."""
    video = {"render_mode": "rgb_array"} if is_shown and args.capture_video else {}
    env = gym.make(args.env, max_episode_steps=args.max_episode_steps or None, **video)
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 10_000)
        if is_shown:  # one environment says it for all
            print(f"{args.env} sets no time limit: episodes end after 10000 steps", flush=True)
    obs_space, space = env.observation_space, env.action_space
    if isinstance(space, gym.spaces.Discrete):
        actions = gym.spaces.Discrete(space.n)
    elif isinstance(space, gym.spaces.Box) and space.is_bounded():
        low, high = np.float64(space.low).ravel(), np.float64(space.high).ravel()
        actions = gym.spaces.Box(-1, 1, low.shape)
    else:
        raise ValueError(f"--env {args.env} acts in {space}: choose discrete or bounded actions")

    def to_input(obs):
        return checked(gym.spaces.flatten(obs_space, obs).astype(np.float32))

    def to_env(action):
        if isinstance(space, gym.spaces.Discrete):
            return action + space.start
        action = np.clip((low + high + checked(action) * (high - low)) / 2, low, high)  # D4
        return action.reshape(space.shape).astype(space.dtype)

    env = gym.wrappers.TransformObservation(env, to_input, gym.spaces.flatten_space(obs_space))
    env = gym.wrappers.TransformAction(env, to_env, actions)
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
    steps, parts = args.num_envs * args.num_steps, args.minibatches
    equal = args.epochs > 0 and parts > 0 and steps % parts == 0 and steps >= 2 * parts
    positive = "eval_episodes", "save_every"
    needs = [  # (options, what they need, whether it is met), for those that are not the default
        *((name, "1 or more", getattr(args, name) > 0) for name in positive),
        ("device", "a GPU", args.device != "cuda" or torch.cuda.is_available()),
        ("hidden_sizes", "a hidden layer", args.hidden_sizes),
        ("epochs num_envs num_steps minibatches", "equal minibatches of 2 or more", equal),
        # NORM begin: flag: an option that would change nothing is a mistake
        ("norm", "one layer, one filter, or one of each", one_each),
        ("norm_position norm_net", "a normalization layer", layers),
        ("norm_position", "input, pre or post", {*args.norm_position} & {"input", "pre", "post"}),
        ("bn_momentum bn_rollout bn_update", "batch norm", is_batch),
        ("bn_momentum bn_warmup", "train mode", "train" in (args.bn_rollout, args.bn_update)),
        ("bn_warmup", "--norm batchrenorm", "batchrenorm" in args.norm),
        ("num_envs", "2 to act in train mode", args.num_envs > 1 or args.bn_rollout == "eval"),
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
SCALARS = ("norm/first_ratio",)  # NORM report: the charts of the panel


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
    return lambda obs: execute(act(agent, observe(obs)[None])[0])


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
