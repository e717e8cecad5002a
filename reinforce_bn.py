"""REINFORCE in one file (Williams 1992, Simple Statistical Gradient-Following Algorithms).

python reinforce_bn.py --env CartPole-v1
python reinforce_bn.py --norm batchnorm  # NORM flag: acts in eval mode, learns in train mode
python reinforce_bn.py --norm batchnorm --bn-rollout train  # NORM flag: acts in train mode, too
python reinforce_bn.py --norm batchnorm --bn-recalibrate 50  # NORM flag: renews running statistics
python reinforce_bn.py --resume runs/CartPole-v1/reinforce_bn/RUN

NORM, a kind and a reason stand where normalization enters. To strip it:  # NORM flag: help
sed '/NORM [b]egin/,/NORM [e]nd/d; /[#] NORM/d' reinforce_bn.py > plain.py  # NORM flag: help

Theorems are those of the paper (Machine Learning 8, 229). Details that it does not have:
D1  A time-out is not a death: gamma V(s') is added to the last reward, s' being the true last
    observation (Pardo et al., arXiv 1712.00378).
D2  Advantages are standardized over all steps of a batch.
D3  Orthogonal weights; a small last layer of the actor (0.01), so at first states matter little;
    first deviation 0.5, independent of the state (Andrychowicz et al., arXiv 2006.05990).
D4  Continuous actions are scaled from [-1, 1] to the environment's bounds and clipped there, but
    not in the log-probability.
D5  Adam with epsilon 1e-5; the policy's learning rate falls to zero linearly.
D6  Environments act in parallel until each has ended an episode. One that is done plays on until
    the others are: those steps count, but no gradient comes from them.
D7  Reward-to-go (Sutton et al. 2000) minus a baseline V(s), as it was when acting; afterwards
    --critic-steps gradient steps fit it (Spinning Up). The factor gamma^t is left out, as usual.
"""

import copy  # NORM report: diagnostics work on copies
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
    env: str = "CartPole-v1"  # Gymnasium id of the environment
    seed: int = 1  # of all random numbers
    total_steps: int = 500_000  # environment steps to train for
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one
    eval_every: int = 20_000  # steps between evaluations; 0 for one at the end only
    eval_episodes: int = 10  # episodes of an evaluation, without noise, from the same starts
    max_episode_steps: int = 0  # 0: the environment's own limit, or 10000 where it sets none
    capture_video: bool = False  # record one environment of each evaluation in the run's videos/
    run_dir: str = ""  # folder of the run; default: a new one in runs/<env>/<script>
    save_every: int = 50_000  # steps between checkpoints, which wait for the end of an iteration
    resume: str = ""  # folder of a run to continue with its options, or to a higher total_steps
    # NORM begin: flag: what normalizes, where it stands, and whose statistics each pass uses
    Norm = Literal["none", "batchnorm", "batchrenorm", "layernorm", "zfilter", "fixed"]
    norm: tuple[Norm, ...] = ("none",)  # layers, a filter (zfilter, fixed) of observations, or both
    # where layers stand: on the input, before or after each hidden activation
    norm_position: tuple[Literal["input", "pre", "post"], ...] = ("post",)
    norm_net: Literal["both", "actor", "critic"] = "both"  # which network has the layers
    norm_stats: str = ""  # fixed: the obs_stats.npz of an earlier run
    bn_momentum: float = 0.1  # weight of the newest batch in running statistics (JAX: 1 - this)
    bn_warmup: int = 30  # batchrenorm: passes in train mode that are plain batch norm
    # eval: act by the running statistics. train: by those of all environments at that moment, which
    # also move the running ones; values and bootstraps are computed in the same mode
    bn_rollout: Literal["eval", "train"] = "eval"
    # train: learn by the batch's statistics, which also move the running ones. eval: by the running
    # ones; if --bn-rollout is eval, too, only --bn-recalibrate moves them from 0 and 1
    bn_update: Literal["train", "eval"] = "train"
    bn_recalibrate: int = 0  # passes over the last batch in train mode at the end
    reward_norm: bool = False  # divide rewards by the running deviation of their discounted sums
    # NORM end
    network: Literal["linear", "mlp", "cnn"] = "mlp"  # cnn: a convolution, for observed images
    num_envs: int = 16  # environments that act in parallel, episodes in a batch (D6)
    actor_lr: float = 1e-2  # Adam's learning rate, at the start (D5)
    critic_lr: float = 1e-2  # Adam's learning rate
    critic_steps: int = 20  # gradient steps of the baseline for one of the policy (D7)
    gamma: float = 0.99  # discount per step
    entropy_coef: float = 0.0  # weight of an entropy bonus (Williams and Peng 1991)
    hidden_sizes: tuple[int, ...] = (64,)  # width of each hidden layer
    max_grad_norm: float = 0.0  # longest gradient of a step; 0 for any length

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


def norm_layer(layer, args, features=None):
    """Return the layer of --norm for the outputs of `layer`, or for `features` inputs."""
    features, is_image = features or layer.weight.shape[0], isinstance(layer, nn.Conv2d)
    if "layernorm" in args.norm:
        return nn.GroupNorm(1, features) if is_image else nn.LayerNorm(features)
    if "batchnorm" in args.norm:
        kind = nn.BatchNorm2d if is_image else nn.BatchNorm1d
        return kind(features, momentum=args.bn_momentum)
    return BatchRenorm(features, args.bn_momentum, args.bn_warmup)


def add_norm(net, name, args):
    """Insert the layers of --norm into net, at --norm-position, if --norm-net has this name."""
    has_layer = {"batchnorm", "batchrenorm", "layernorm"} & {*args.norm}
    if not has_layer or args.norm_net not in ("both", name):
        return
    places = [k for k, layer in enumerate(net) if isinstance(layer, nn.ReLU)]
    for k in reversed(places):  # the last one first, as they shift
        layer = net[k - 1]
        if "post" in args.norm_position:
            net.insert(k + 1, norm_layer(layer, args))
        if "pre" in args.norm_position:
            net.insert(k, norm_layer(layer, args))
    if "input" in args.norm_position:
        net.insert(0, norm_layer(net[0], args, net[0].weight.shape[1]))


# NORM end
# --------------------------------------------------------------------------------------- Networks
def make_net(gain, obs_shape, outputs, args):
    """Return --network; weights are orthogonal, those of the last layer scaled by gain (D3)."""
    layers, sizes = [], [math.prod(obs_shape)]
    if args.network == "cnn":
        channels, height, width = obs_shape
        layers = [nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Flatten()]
        sizes = [16 * (height - 2) * (width - 2)]
    if args.network != "linear":
        sizes += args.hidden_sizes
    for size, next_size in itertools.pairwise(sizes):
        layers += [nn.Linear(size, next_size), nn.ReLU()]
    layers += [nn.Linear(sizes[-1], outputs)]
    for layer in layers:
        if hasattr(layer, "weight"):
            nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """pi(a|s): observations (n, *obs_shape) to n distributions over actions."""

    def __init__(self, obs_shape, action_space, args):
        super().__init__()
        self.is_discrete = isinstance(action_space, gym.spaces.Discrete)
        outputs = int(action_space.n) if self.is_discrete else action_space.shape[0]
        self.net = make_net(0.01, obs_shape, outputs, args)
        add_norm(self.net, "actor", args)  # NORM layer: at --norm-position
        if not self.is_discrete:
            self.log_std = nn.Parameter(torch.full((outputs,), math.log(0.5)))  # D3

    def forward(self, obs):
        outputs = self.net(obs)
        if self.is_discrete:
            return torch.distributions.Categorical(logits=checked(outputs))
        normal = torch.distributions.Normal(outputs, self.log_std.exp())
        return torch.distributions.Independent(normal, 1)


class Critic(nn.Module):
    """V(s): observations (n, *obs_shape) to values, (n,)."""

    def __init__(self, obs_shape, args):
        super().__init__()
        self.net = make_net(1.0, obs_shape, 1, args)
        add_norm(self.net, "critic", args)  # NORM layer: at --norm-position

    def forward(self, obs):
        return self.net(obs).squeeze(1)


# ------------------------------------------------------------------------------ Losses and update
# What n environments met at one step: obs (n, *obs_shape), action (n, ...), the others (n,).
# Stacked, with an axis of time before that of the environments. playing: the first episode.
Rollout = namedtuple("Rollout", "obs action value reward done playing")

# What is learnt from: obs (n, *obs_shape), action (n, ...), the others (n,).
Batch = namedtuple("Batch", "obs action advantage returns")


def reward_to_go(reward, done, gamma):
    """Return discounted sums (T, n) of rewards (T, n), from each step to its episode's end (D7)."""
    returns, after = torch.empty_like(reward), 0.0
    for t in reversed(range(len(reward))):
        returns[t] = after = reward[t] + gamma * (1 - done[t]) * after
    return returns


def make_batch(rollout, args):
    """Return the Batch of the first episodes in a rollout (D6)."""
    returns = reward_to_go(rollout.reward, rollout.done, args.gamma)
    parts = rollout.obs, rollout.action, returns - rollout.value, returns
    return Batch(*(x[rollout.playing.bool()] for x in parts))


def policy_loss(log_prob, advantage):
    """Return the mean of -log pi(a|s) A (Theorem 2)."""
    if len(advantage) > 1:  # one sample has no deviation
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)  # D2
    return -(log_prob * advantage).mean()


def gradient_step(optimizer, loss, max_grad_norm):
    """Descend the loss, by a gradient no longer than max_grad_norm unless that is 0."""
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()


def update(agent, batch, args):
    """Learn from a rollout; return losses by name, and the gradient steps taken."""
    agent.actor.train(args.bn_update == "train")  # NORM mode: train: no longer the pi that acted
    agent.critic.train(args.bn_update == "train")  # NORM mode: train: moves running statistics
    policy = agent.actor(batch.obs)
    loss_pi = policy_loss(policy.log_prob(batch.action), batch.advantage)
    entropy = policy.entropy().mean()
    gradient_step(agent.actor_optimizer, loss_pi - args.entropy_coef * entropy, args.max_grad_norm)
    for _ in range(args.critic_steps):
        loss_v = (agent.critic(batch.obs) - batch.returns).square().mean()
        gradient_step(agent.critic_optimizer, loss_v, args.max_grad_norm)
    losses = {"losses/policy": loss_pi, "losses/critic": loss_v, "losses/entropy": entropy}
    return losses, 1 + args.critic_steps


# ------------------------------------------------------------------------------ Acting and memory
def as_input(agent, obs):
    """Return observations (n, *obs_shape) as the networks take them."""
    obs = agent.obs_filter(obs)  # NORM obs: applied here, learnt in train
    return torch.as_tensor(obs, dtype=torch.float32, device=agent.device)


@torch.no_grad()
def act(agent, obs):
    """Return the likeliest actions, (n, ...), for observations (n, *obs_shape)."""
    agent.actor.eval()  # NORM mode: each action by its own state alone
    return agent.actor(as_input(agent, obs)).mode.cpu().numpy()


@torch.no_grad()
def explore(agent, obs, args):
    """Return the networks' input, pi(.|s) and V(s), for observations (n, *obs_shape)."""
    # NORM obs: what the policy saw is stored, not the raw observation; filtered later, this would
    # NORM obs: get another log-probability, as if another policy had acted.
    obs = as_input(agent, obs)
    agent.actor.train(args.bn_rollout == "train")  # NORM mode: train: pi depends on all n states
    agent.critic.train(args.bn_rollout == "train")  # NORM mode: train: and so does V
    return obs, agent.actor(obs), agent.critic(obs)


@torch.no_grad()
def state_value(agent, obs, args):
    """Return V(s), (n,), without acting, for observations (n, *obs_shape)."""
    agent.critic.train(args.bn_rollout == "train")  # NORM mode: that of the values in explore
    return agent.critic(as_input(agent, obs))


# ------------------------------------------------------------------------------------------ Train
def step_all(envs, actions):
    """Step each environment; return observations, rewards, terminated and truncated, (n, ...)."""
    steps = [env.step(action)[:4] for env, action in zip(envs, actions, strict=True)]
    obs, reward, *ends = map(np.array, zip(*steps, strict=True))
    return obs, reward, *(end.astype(bool) for end in ends)


def make_agent(env, args, device):
    """Return networks and their optimizers."""
    obs_shape = env.observation_space.shape
    agent = SimpleNamespace(device=device)
    agent.actor = Actor(obs_shape, env.action_space, args).to(device)
    agent.critic = Critic(obs_shape, args).to(device)
    agent.actor_optimizer = Adam(agent.actor.parameters(), args.actor_lr, eps=1e-5, fused=True)
    agent.critic_optimizer = Adam(agent.critic.parameters(), args.critic_lr, eps=1e-5, fused=True)
    # NORM begin: obs: what stands between an observation and the networks
    agent.obs_stat = ZFilter(obs_shape)  # learns from all states that training meets
    agent.obs_filter = nn.Identity()
    if "zfilter" in args.norm:
        agent.obs_filter = agent.obs_stat  # by running statistics
    if "fixed" in args.norm:
        agent.obs_filter = ZFilter(obs_shape)  # by --norm-stats
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
    envs = [make_env(args) for _ in range(args.num_envs)]
    eval_envs = [make_env(args, is_shown=k == 0) for k in range(args.eval_episodes)]
    for env, seed in zip(envs, seeds[2:], strict=True):
        env.unwrapped.reset(seed=seed)  # makes the generator that Run saves
    agent = make_agent(envs[0], args, device)
    run = Run(args, agent, [env.unwrapped.np_random for env in envs])
    if args.capture_video:
        folder, name = str(run.dir / "videos"), f"from-step{run.step}"
        filmed = gym.wrappers.RecordVideo(eval_envs[0], folder, lambda _: True, name_prefix=name)
        eval_envs[0] = filmed
    batch = None  # NORM report: none where no step is left
    try:
        while run.step < args.total_steps:
            before, steps, episode_returns = run.step, [], []
            rate = args.actor_lr * (1 - run.step / args.total_steps)  # D5
            agent.actor_optimizer.param_groups[0]["lr"] = rate
            obs = np.array([env.reset()[0] for env in envs])
            agent.obs_stat.push(obs)  # NORM obs: each observation of training counts once
            agent.reward_scale.sums[:] = 0  # NORM reward: of episodes that begin
            playing = np.ones(args.num_envs, bool)
            while playing.any():
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
                arrays = torch.as_tensor(np.float32([reward, done, playing]), device=device)
                steps.append(Rollout(seen, action, value, *arrays))
                for k in np.flatnonzero(done):
                    if playing[k]:
                        episode_returns.append(envs[k].return_queue[-1])
                    next_obs[k], _ = envs[k].reset()
                    agent.obs_stat.push(next_obs[k])  # NORM obs: an episode's first, too
                playing &= ~done
                obs = next_obs
            # learn
            rollout = Rollout(*map(torch.stack, zip(*steps, strict=True)))
            batch = make_batch(rollout, args)
            losses, taken = update(agent, batch, args)
            run.updates += taken
            # report
            run.log(losses | {"charts/episodic_return": np.mean(episode_returns)})
            due = args.eval_every and run.step // args.eval_every > before // args.eval_every
            last = run.step >= args.total_steps
            if due and not last:
                run.log_evaluation(evaluate(agent, eval_envs, args))
            if run.step // args.save_every > run.saved // args.save_every and not last:
                run.save()
        if batch:  # NORM report: returns by mode
            run.log(returns_by_mode(agent, args, batch))  # NORM mode: may recalibrate the policy
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


# NORM begin: report: what normalization does to a run, made visible
SCALARS = "norm/return_eval_mode", "norm/return_train_mode", "norm/return_recalibrated_mode"


@torch.no_grad()
def returns_by_mode(agent, args, batch):
    """Return {name: value}: the policy's return in eval mode, in train mode, and recalibrated.

    Returns are means of --num-envs episodes. With --bn-recalibrate the policy stays recalibrated.
    """
    if args.norm_net == "critic" or not {"batchnorm", "batchrenorm"} & {*args.norm}:
        return {}  # the policy has no modes
    envs, actor, scalars = [make_env(args) for _ in range(args.num_envs)], agent.actor, {}
    scalars["norm/return_eval_mode"] = evaluate(agent, envs, args)["eval/return"]
    agent.actor = copy.deepcopy(actor)
    agent.actor.eval = agent.actor.train  # act calls eval(), which now means train()
    scalars["norm/return_train_mode"] = evaluate(agent, envs, args)["eval/return"]
    agent.actor = actor
    for _ in range(args.bn_recalibrate):
        agent.actor.train()(batch.obs)
    if args.bn_recalibrate:
        scalars["norm/return_recalibrated_mode"] = evaluate(agent, envs, args)["eval/return"]
    for env in envs:
        env.close()
    return scalars


# NORM end
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
    if args.network == "cnn" and len(obs_space.shape or ()) != 3:
        raise ValueError(f"--env {args.env} observes {obs_space}, --network cnn needs images")

    def to_input(obs):
        if args.network != "cnn":
            return checked(gym.spaces.flatten(obs_space, obs).astype(np.float32))
        if obs_space.shape[0] >= obs_space.shape[2]:  # channels are fewer than rows and columns
            obs = np.moveaxis(obs, 2, 0)
        return checked(np.float32(obs) / (255 if obs_space.dtype == np.uint8 else 1))

    def to_env(action):
        if isinstance(space, gym.spaces.Discrete):
            return action + space.start
        action = np.clip((low + high + checked(action) * (high - low)) / 2, low, high)  # D4
        return action.reshape(space.shape).astype(space.dtype)

    inputs = gym.spaces.flatten_space(obs_space)
    if args.network == "cnn":
        inputs = gym.spaces.Box(-np.inf, np.inf, to_input(np.zeros(obs_space.shape)).shape)
    env = gym.wrappers.TransformObservation(env, to_input, inputs)
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
    inputs = args.network != "linear" or args.norm_position == ("input",)
    modes = args.bn_rollout, args.bn_update
    # NORM end
    positive = "eval_episodes", "save_every", "num_envs", "critic_steps"
    needs = [  # (options, what they need, whether it is met), for those that are not the default
        *((name, "1 or more", getattr(args, name) > 0) for name in positive),
        ("device", "a GPU", args.device != "cuda" or torch.cuda.is_available()),
        ("hidden_sizes", "hidden layers", args.hidden_sizes and args.network != "linear"),
        # NORM begin: flag: an option that would change nothing is a mistake
        ("norm", "one layer, one filter, or one of each", one_each),
        ("norm_position norm_net", "a normalization layer", layers),
        ("norm_position", "input, pre or post", {*args.norm_position} & {"input", "pre", "post"}),
        ("bn_momentum bn_rollout bn_update bn_recalibrate", "batch norm", is_batch),
        ("bn_momentum bn_warmup", "train mode", args.bn_recalibrate or "train" in modes),
        ("bn_recalibrate", "an actor with layers", args.norm_net != "critic"),
        ("norm", "--norm-position input in a linear network", inputs or not layers),
        ("norm", "another one for images", args.network != "cnn" or "batchrenorm" not in args.norm),
        ("bn_warmup", "--norm batchrenorm", "batchrenorm" in args.norm),
        ("num_envs", "2 or more for batch norm", args.num_envs > 1 or not is_batch),
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
