"""Known mistakes with normalization: break a script yourself, see the symptom, find the line.

python tests/failures.py           lists the symptoms
python tests/failures.py 3         writes broken.py, a script with mistake 3 in it
python tests/failures.py 3 why     says what mistake 3 is, and who met it

Each mistake is one edit, somebody met it or its sibling in public, and test_failures.py asserts its
symptom, or what causes it: the broken script has it, the script as it is has not.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent


@dataclass
class Failure:
    """One mistake: `old` becomes `new` in the script, and then shows(module, folder) is true."""

    symptom: str
    script: str
    old: str
    new: str
    why: str
    met: str  # by whom: the address of a thread
    shows: Callable


def broken(failure):
    """Return the source of the script with the mistake in it."""
    source = (ROOT / f"{failure.script}.py").read_text()
    assert source.count(failure.old) == 1, failure.old
    return source.replace(failure.old, failure.new)


# -------------------------------------------------------------------------------- The symptoms
def agent_of(script, **options):
    """Return a small agent for Pendulum-v1, its arguments, and a batch for DDPG and SAC."""
    torch.manual_seed(0)
    args = script.Args(env="Pendulum-v1", hidden_sizes=(16, 16), **options)
    agent = script.make_agent(script.make_env(args), args, "cpu")
    obs, action, reward = torch.randn(64, 3), torch.randn(64, 1), torch.randn(64)
    return agent, args, (obs, action, reward, torch.randn(64, 3), torch.zeros(64))


def run(script, folder, **options):
    """Train a small network for a moment; return the result and the checkpoint's agent."""
    run_dir = folder / script.__name__
    sizes = {"hidden_sizes": (16, 16), "eval_every": 0, "eval_episodes": 1, "device": "cpu"}
    if hasattr(script, "ReplayBuffer"):
        sizes |= {"learning_starts": 100, "batch_size": 32, "buffer_size": 1000}
    result = script.train(script.Args(**sizes | options, run_dir=str(run_dir)))
    return result, torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]


def target_values_differ(script, folder):
    agent, args, batch = agent_of(script, norm="batchnorm", tau=1.0)
    batch = script.Batch(*batch)
    script.update(agent, batch, args)
    with torch.no_grad():
        live = agent.critic.eval()(batch.obs, batch.action)
        target = agent.critic_target.eval()(batch.obs, batch.action)
    return not torch.equal(live, target)


def acting_fails(script, folder):
    agent, _, _ = agent_of(script, norm="batchnorm")
    try:
        script.act(agent, np.zeros(3, np.float32))
    except ValueError as error:
        return "more than 1 value per channel" in str(error)
    return False


def action_depends_on_company(script, folder):
    agent, _, _ = agent_of(script, norm="batchnorm", norm_position=("input",))
    obs = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    return not np.allclose(script.act(agent, obs)[:2], script.act(agent, obs[:2]), atol=1e-5)


def statistics_never_move(script, folder):
    agent, args, batch = agent_of(script, norm="batchnorm")
    agent.actor.eval()  # as acting leaves it
    script.update(agent, script.Batch(*batch), args)
    return not any(b.any() for name, b in agent.actor.named_buffers() if "running_mean" in name)


def evaluation_is_counted(script, folder):
    agent, args, _ = agent_of(script, norm="zfilter", eval_episodes=1)
    agent.obs_stat.push(np.zeros((2, 3)))
    script.evaluate(agent, script.make_env(args), args)
    return agent.obs_stat.count > 2


def replay_is_not_raw(script, folder):
    _, agent = run(script, folder, env="Countdown-v0", norm="zfilter", total_steps=200)
    time = agent["buffer"]["data"][0][:, 0]  # which is counted in whole steps
    return not torch.equal(time, time.round())


def restored_policy_differs(script, folder):
    result, _ = run(script, folder, env="Countdown-v0", norm="zfilter", total_steps=200)
    seen, nothing = [], {"eval/return": 0, "eval/return_std": 0}
    script.evaluate = lambda agent, *_: seen.append(agent.obs_filter.count) or nothing
    script.train(script.saved_args(result["run_dir"]))  # which has only this left to do
    return seen == [0]


def ratio_is_not_one(script, folder):
    options = {"env": "Countdown-v0", "norm": "zfilter", "num_envs": 4, "num_steps": 16}
    seen, log = [], script.Run.log

    def watched(self, scalars):
        seen.append(float(scalars.get("norm/first_ratio", 0)))
        log(self, scalars)

    script.Run.log = watched
    run(script, folder, **options, minibatches=2, total_steps=128)
    return max(seen) > 1e-3


# -------------------------------------------------------------------------------- The mistakes
SB3 = "https://github.com/DLR-RM/stable-baselines3"
FAILURES = [
    Failure(
        "With --tau 1 a target network is a copy of the live one, yet with batch norm their values"
        " differ.",
        "ddpg_bn",
        "        old.copy_(new)  # NORM target:",
        "        pass  # NORM target:",
        "`parameters()` leaves out buffers: the target's statistics stay at 0 and 1.",
        f"{SB3}/issues/996",
        target_values_differ,
    ),
    Failure(
        "The first action after the random ones ends in `ValueError: Expected more than 1 value per"
        " channel when training`.",
        "ddpg_bn",
        "agent.actor.eval()  # NORM mode: one observation",
        "agent.actor.train()  # NORM mode: one observation",
        "Acting in train mode: one observation has no batch statistics.",
        "https://github.com/thu-ml/tianshou/issues/773",
        acting_fails,
    ),
    Failure(
        "No error, but what the policy does in a state depends on the other environments, and"
        " evaluating more often changes the training.",
        "ppo_bn",
        "agent.actor.eval()  # NORM mode: each action",
        "agent.actor.train()  # NORM mode: each action",
        "Evaluation in train mode: with several observations at once torch does not complain, and"
        " `torch.no_grad` stops gradients, not running statistics.",
        f"{SB3}/issues/535",
        action_depends_on_company,
    ),
    Failure(
        "The actor learns as if it had no batch norm: its running statistics are 0 and 1 to the end"
        " of the run.",
        "ddpg_bn",
        "    agent.actor.train()  # NORM mode: learning uses the batch's statistics, and moves"
        " running ones\n",
        "",
        "Nobody calls its train() again after acting has called eval().",
        "https://github.com/huggingface/lerobot/issues/3668",
        statistics_never_move,
    ),
    Failure(
        "The count in obs_stats.npz is larger than the number of observations in training, and the"
        " numbers of a run depend on --eval-every.",
        "ddpg_bn",
        "    obs = agent.obs_filter(obs)  # NORM obs: as in",
        "    agent.obs_stat.push(obs)\n    obs = agent.obs_filter(obs)  # NORM obs: as in",
        "The filter learns from evaluation (and, in DDPG, twice from each state it acts in).",
        "https://github.com/DLR-RM/rl-baselines3-zoo/issues/275",
        evaluation_is_counted,
    ),
    Failure(
        "With --norm zfilter the replay does not hold what the environment returned.",
        "ddpg_bn",
        "agent.buffer.add(obs, action, reward, next_obs, terminated)",
        "agent.buffer.add(agent.obs_filter(obs), action, reward, next_obs, terminated)",
        "The replay must stay raw: what it holds was normalized by statistics of long ago.",
        "https://github.com/hill-a/stable-baselines/issues/200",
        replay_is_not_raw,
    ),
    Failure(
        "A policy that was good when it was saved is bad after --resume, until the filter has seen"
        " enough again.",
        "ddpg_bn",
        'if hasattr(part, "state_dict")}',
        "if isinstance(part, nn.Module | torch.optim.Optimizer | ReplayBuffer)}",
        "Weights come back, the statistics that they were learnt with do not.",
        "https://github.com/hill-a/stable-baselines/issues/228",
        restored_policy_differs,
    ),
    Failure(
        "With --norm zfilter `norm/first_ratio` is not 0, although the network has no batch norm.",
        "ppo_bn",
        "Rollout(seen, action,",
        "Rollout(torch.as_tensor(obs, dtype=torch.float32), action,",
        "The rollout stores another observation than the policy saw, so learning asks a policy"
        " that nobody followed.",
        "https://github.com/openai/coinrun/issues/41",
        ratio_is_not_one,
    ),
]

if __name__ == "__main__":
    numbers = [str(number) for number in range(1, len(FAILURES) + 1)]
    if len(sys.argv) == 1:
        for number, failure in zip(numbers, FAILURES, strict=True):
            print(f"{number:>2} {failure.script}.py: {failure.symptom}")
    elif sys.argv[1] not in numbers:
        sys.exit(f"failures.py: {sys.argv[1]} is none of the mistakes: choose 1 to {numbers[-1]}")
    elif sys.argv[2:] == ["why"]:
        failure = FAILURES[int(sys.argv[1]) - 1]
        print(f"{failure.why}\nMet in {failure.met}")
    else:
        failure = FAILURES[int(sys.argv[1]) - 1]
        Path("broken.py").write_text(broken(failure))
        print(f"broken.py is {failure.script}.py with a mistake. {failure.symptom}")
