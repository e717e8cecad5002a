"""The tests notice: each of these changes of one line makes a named test fail.

A mutation is (script, how a line begins, the line as it might be, tests that must fail).
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import unmeasured

ROOT = Path(__file__).parent.parent

MUTATIONS = [
    # zfilter.py
    (
        "zfilter",
        "self.mean = self.mean + delta * (n / total)",
        "self.mean = self.mean + delta / total",
        "test_zfilter.py::test_a_million_samples_in_uneven_batches_equal_numpy",
    ),
    (
        "zfilter",
        "return self.m2 / (self.count - 1) if self.count > 1 else np.ones_like(self.mean)",
        "return self.m2 / self.count if self.count > 1 else np.ones_like(self.mean)",
        "test_zfilter.py::test_one_sample_at_a_time_equals_numpy",
    ),
    (
        "zfilter",
        "n, batch_mean = len(batch), batch.mean(0)",
        "n, batch_mean = len(batch), batch.mean()",
        "test_zfilter.py::test_one_sample_at_a_time_equals_numpy",
    ),
    ("zfilter", "if update:", "if True:", "test_zfilter.py::test_only_update_learns"),
    (
        "zfilter",
        "with np.load(file, allow_pickle=False) as state:",
        "with np.load(file, allow_pickle=True) as state:",
        "test_zfilter.py::test_pickles_are_not_executed",
    ),
    (
        "zfilter",
        "x = np.clip(x, -self.clip, self.clip)",
        "x = np.clip(x, 0, self.clip)",
        "test_zfilter.py::test_filter_is_the_formula",
    ),
    # ddpg_bn.py
    (
        "ddpg_bn",
        "td_target = batch.reward + args.gamma * (1 - batch.terminated) * q_next  #",
        "td_target = batch.reward + args.gamma * q_next  # (4), (5)",
        "test_ddpg.py::test_critic_loss_by_hand",
    ),
    (
        "ddpg_bn",
        "buffer.add(obs, action, reward, next_obs, terminated)",
        "buffer.add(obs, action, reward, next_obs, terminated or truncated)",
        "test_runs.py::test_training_stores_raw_transitions_and_bootstraps_through_time_outs",
    ),
    (
        "ddpg_bn",
        "return -agent.critic(batch.obs, agent.actor(batch.obs)).mean()",
        "return agent.critic(batch.obs, agent.actor(batch.obs)).mean()",
        "test_ddpg.py::test_critic_loss_by_hand",
    ),
    (
        "ddpg_bn",
        'agent.critic.train(args.bn_policy_critic == "train")',
        'agent.critic.train(args.bn_policy_critic == "eval")',
        "test_ddpg.py::test_mode_of_every_forward_pass",
    ),
    (
        "ddpg_bn",
        "old.copy_(new)  # NORM target: as parameters() has",
        "pass",
        "test_ddpg.py::test_targets_get_statistics_by_copy_and_weights_by_polyak",
    ),
    (
        "ddpg_bn",
        "torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)",
        "torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - tau)",
        "test_ddpg.py::test_update_is_adam_then_polyak",
    ),
    (
        "ddpg_bn",
        "q, q_next = agent.critic.train()(*pair).chunk(2)",
        "q_next, q = agent.critic.train()(*pair).chunk(2)",
        "test_ddpg.py::test_joint_pass_is_one_batch_norm_over_both_halves",
    ),
    (
        "ddpg_bn",
        "agent.critic_target = copy.deepcopy(critic) if args.target_network else critic",
        "agent.critic_target = critic",
        "test_ddpg.py::test_update_is_adam_then_polyak",
    ),
    (
        "ddpg_bn",
        "array[self.added % self.capacity] = value",
        "array[self.added % (self.capacity - 1)] = value",
        "test_ddpg.py::test_buffer_keeps_the_newest_and_samples_uniformly",
    ),
    (
        "ddpg_bn",
        "self.running_mean.lerp_(mean, self.momentum)",
        "self.running_mean.lerp_(mean, 1 - self.momentum)",
        "test_layers.py::test_formula_by_hand_with_clipping",
    ),
    (
        "ddpg_bn",
        "warm = self.num_batches_tracked >= self.warmup",
        "warm = self.num_batches_tracked > self.warmup",
        "test_layers.py::test_warm_up_is_batch_norm_and_ends_on_time",
    ),
    (
        "ddpg_bn",
        "_, target, _ = probe(agent.critic_target",
        "_, target, _ = probe(agent.critic, batch.next_obs, agent.actor.eval()(batch.next_obs))",
        "test_ddpg.py::test_copied_statistics_of_a_unit_that_died_stretch_its_slow_copy",
    ),
    # sac_bn.py
    (
        "sac_bn",
        "log_slope = self.action_scale.log() + 2 * (math.log(2) - u - F.softplus(-2 * u))",
        "log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))",
        "test_sac.py::test_log_probability_is_that_of_torch",
    ),
    (
        "sac_bn",
        "return -(agent.log_alpha.exp() * (log_prob.detach() + agent.target_entropy)).mean()",
        "return (agent.log_alpha.exp() * (log_prob.detach() + agent.target_entropy)).mean()",
        "test_sac.py::test_temperature_moves_entropy_to_its_target",
    ),
    (
        "sac_bn",
        "q_next = q_next.amin(1) - alpha * next_log_prob",
        "q_next = q_next.amax(1) - alpha * next_log_prob",
        "test_sac.py::test_losses_by_hand",
    ),
    (
        "sac_bn",
        "return (q - td_target.unsqueeze(1)).square().mean(0).sum(), q",
        "return (q - td_target.unsqueeze(1)).square().mean(), q",
        "test_sac.py::test_losses_by_hand",
    ),
    (
        "sac_bn",
        "agent.actor.eval()  # NORM mode: a' is not learnt from, so",
        "agent.actor.train()",
        "test_sac.py::test_mode_of_every_forward_pass",
    ),
    (
        "sac_bn",
        'with torch.random.fork_rng([0] if agent.device == "cuda" else []):',
        "if True:",
        "test_sac.py::test_q_bias_by_brute_force",
    ),
    (
        "sac_bn",
        'PARTS += "obs_stat", "obs_filter" ',
        'PARTS += ("obs_stat",)',
        "test_runs.py::test_fixed_filter_uses_the_file_and_never_learns",
    ),
    # ppo_bn.py
    (
        "ppo_bn",
        "delta = reward + gamma * (1 - done) * value[1:] - value[:-1]",
        "delta = reward + gamma * value[1:] - value[:-1]",
        "test_on_policy.py::test_gae_against_brute_force",
    ),
    (
        "ppo_bn",
        "advantage[t] = after = delta[t] + gamma * gae_lambda * (1 - done[t]) * after",
        "advantage[t] = after = delta[t] + gamma * gae_lambda * after",
        "test_on_policy.py::test_gae_against_brute_force",
    ),
    (
        "ppo_bn",
        "return -torch.min(ratio * a, ratio.clamp(1 - args.clip, 1 +",
        "return -torch.max(ratio * a, ratio.clamp(1 - args.clip, 1 + args.clip) * a).mean(), ratio",
        "test_on_policy.py::test_clipped_loss_by_hand",
    ),
    (
        "ppo_bn",
        "timed_out = truncated & ~terminated",
        "timed_out = terminated & ~truncated",
        "test_on_policy.py::test_time_outs_pay_what_was_to_come_and_deaths_do_not",
    ),
    (
        "ppo_bn",
        "loss = loss_pi + args.value_coef * loss_v - args.entropy_coef * entropy ",
        "loss = loss_pi + args.value_coef * loss_v + args.entropy_coef * entropy  # (7)",
        "test_on_policy.py::test_what_ppo_descends",
    ),
    (
        "ppo_bn",
        "return Batch(*(x.flatten(0, 1) for x in parts))",
        "return Batch(rollout.obs.flatten(0, 1), *(x.mT.flatten(0, 1) for x in parts[1:]))",
        "test_on_policy.py::test_rows_of_a_ppo_batch_belong_together",
    ),
    (
        "ppo_bn",
        "obs = agent.obs_filter(obs, update=False)  # NORM obs: what a rollout",
        "obs = agent.obs_filter(obs, update=True)",
        "test_on_policy.py::test_statistics_are_those_of_all_training_observations",
    ),
    (
        "ppo_bn",
        "self.sums[done] = 0",
        "self.sums[~done] = 0",
        "test_on_policy.py::test_rewards_are_scaled_by_the_deviation_of_their_discounted_sums",
    ),
    (
        "ppo_bn",
        "obs = None  # a resumed run cannot go on within an episode, so neither does",
        "pass",
        "test_faults.py::test_a_run_goes_on_from_each_of_its_checkpoints",
    ),
    # reinforce_bn.py
    (
        "reinforce_bn",
        "returns[t] = after = reward[t] + gamma * (1 - done[t]) * after",
        "returns[t] = after = reward[t] + gamma * after",
        "test_on_policy.py::test_reward_to_go_against_brute_force",
    ),
    (
        "reinforce_bn",
        "return -(log_prob * a).mean()",
        "return (log_prob * a).mean()",
        "test_on_policy.py::test_reinforce_loss_by_hand",
    ),
    (
        "reinforce_bn",
        "return Batch(*(x[rollout.playing.bool()] for x in parts))",
        "return Batch(*(x.flatten(0, 1) for x in parts))",
        "test_on_policy.py::test_reinforce_masks_what_follows_the_first_end",
    ),
    (
        "reinforce_bn",
        "agent.actor.eval()  # NORM mode: what a policy does depends on the",
        "agent.actor.train()",
        "test_on_policy.py::test_every_pass_has_its_mode",
    ),
    (
        "reinforce_bn",
        "return copy.deepcopy(self.actor).train()(obs)",
        "return self.actor.train()(obs)",
        "test_on_policy.py::test_evaluation_in_train_mode_uses_the_batch_and_moves_nothing",
    ),
    (
        "reinforce_bn",
        "returns[playing] += reward[playing]",
        "returns += reward",
        "test_on_policy.py::test_evaluation_sums_one_episode_of_each_environment",
    ),
    (
        "reinforce_bn",
        'write(run_dir / "checkpoint.pt", lambda file: (writer.flush(), torch.save(state, file)))',
        'write(run_dir / "checkpoint.pt", lambda file: torch.save(state, file))',
        "test_faults.py::test_events_reach_the_disk_before_the_checkpoint",
    ),
    (
        "ddpg_bn",
        "diverged = not is_finite(agent)",
        "diverged = False",
        "test_runs.py::test_a_weight_that_is_not_finite_reaches_no_checkpoint",
    ),
    (
        "ddpg_bn",
        "diverged = not (is_finite(agent) and np.isfinite(evaluations[-1]).all())",
        "diverged = not np.isfinite(evaluations[-1]).all()",
        "test_hostile.py::test_weights_that_become_nan_in_the_last_step_do_not_pass",
    ),
    (
        "sac_bn",
        "losses |= update(agent, batch, updates, args)",
        "losses = update(agent, batch, updates, args)",
        "test_sac.py::test_losses_of_the_actor_are_reported_whenever_it_was_updated",
    ),
]
SAMPLE = 3, 10, 18, 27  # of each kind of script one, which takes seconds


def mutate(script, old, new):
    """Return the text of a script with the only line that begins so replaced."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    (number,) = [k for k, line in enumerate(lines) if line.strip().startswith(old)]
    indent = len(lines[number]) - len(lines[number].lstrip())
    lines[number] = " " * indent + new
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("script, old, new, tests", MUTATIONS)
def test_the_line_is_there_once(script, old, new, tests):
    compile(mutate(script, old, new), script, "exec")
    file, name = tests.split("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize(
    "script, old, new, tests",
    [
        pytest.param(*x, marks=() if k in SAMPLE else pytest.mark.slow)
        for k, x in enumerate(MUTATIONS)
    ],
)
def test_a_changed_line_makes_a_test_fail(script, old, new, tests, tmp_path):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "pyproject.toml"):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    (tmp_path / f"{script}.py").write_text(mutate(script, old, new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/{tests}"],
        cwd=tmp_path,
        env=unmeasured(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout[-2000:] + done.stderr
