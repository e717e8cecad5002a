"""The tests notice: each of these changes makes a named test fail.

Of each test: (script, what stands there once, what might stand there).
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import unmeasured

ROOT = Path(__file__).parent.parent

MUTATIONS = {
    "test_zfilter.py::test_a_million_samples_in_uneven_batches_equal_numpy": [
        ("zfilter", "delta * (n / total)", "delta / total")
    ],
    "test_zfilter.py::test_one_sample_at_a_time_equals_numpy": [
        ("zfilter", "self.m2 / (self.count - 1)", "self.m2 / self.count")
    ],
    "test_zfilter.py::test_only_update_learns": [("zfilter", "if update:", "if True:")],
    "test_cli.py::test_statistics_that_are_damaged_foreign_or_code_are_refused": [
        ("zfilter", "np.load(file, allow_pickle=False)", "np.load(file, allow_pickle=True)")
    ],
    "test_on_policy.py::test_reward_norm_scales_what_is_learnt_but_no_bootstrap_and_no_report": [
        ("zfilter", "self.sums[done] = 0", "self.sums[~done] = 0")
    ],
    "test_ddpg.py::test_critic_loss_by_hand": [
        ("ddpg_bn", "args.gamma * (1 - batch.terminated) * q_next", "args.gamma * q_next"),
        ("ddpg_bn", "return -agent.critic(", "return agent.critic("),
    ],
    "test_ddpg.py::test_mode_of_every_forward_pass": [
        (
            "ddpg_bn",
            'agent.critic.train(args.bn_policy_critic == "train")',
            'agent.critic.train(args.bn_policy_critic == "eval")',
        ),
        ("sac_bn", "agent.actor.eval()  # NORM mode: a'", "agent.actor.train()  # NORM mode: a'"),
    ],
    "test_ddpg.py::test_targets_get_statistics_by_copy_and_weights_by_polyak": [
        ("ddpg_bn", "old.copy_(new)  # NORM target", "pass  # NORM target")
    ],
    "test_ddpg.py::test_update_is_adam_then_polyak": [
        ("ddpg_bn", "list(source.parameters()), tau)", "list(source.parameters()), 1 - tau)")
    ],
    "test_layers.py::test_formula_by_hand_with_clipping": [
        (
            "ddpg_bn",
            "self.running_mean.lerp_(mean, self.momentum)",
            "self.running_mean.lerp_(mean, 1 - self.momentum)",
        )
    ],
    "test_runs.py::test_training_stores_raw_transitions_and_bootstraps_through_time_outs": [
        ("ddpg_bn", "next_obs, terminated)\n            obs", "next_obs, done)\n            obs")
    ],
    "test_ddpg.py::test_buffer_keeps_the_newest_and_samples_uniformly": [
        ("ddpg_bn", "array[self.added % self.capacity]", "array[self.added % (self.capacity - 1)]")
    ],
    "test_hostile.py::test_actions_reach_their_bounds_and_never_leave_them[ddpg_bn]": [
        ("ddpg_bn", "low + high + checked(action) * (high - low)", "checked(action) * (high - low)")
    ],
    "test_hostile.py::test_an_environment_may_write_into_the_array_it_gave_before[ddpg_bn]": [
        ("ddpg_bn", "gym.spaces.flatten(obs_space, obs).astype(np.float32)", "np.asarray(obs)")
    ],
    "test_cli.py::test_checkpoints_that_are_damaged_foreign_or_code_are_refused[ddpg_bn]": [
        (
            "ddpg_bn",
            'mmap=True, weights_only=True)["args"]',
            'mmap=True, weights_only=False)["args"]',
        )
    ],
    "test_cli.py::test_what_cannot_be_done_ends_in_one_line_and_leaves_nothing": [
        ("ddpg_bn", "self.dir.mkdir(parents=True)", "self.dir.mkdir(parents=True, exist_ok=True)")
    ],
    "test_faults.py::test_killed_anywhere_and_resumed_equals_never_killed[ddpg_bn]": [
        ("ddpg_bn", "    new.replace(path)", "    path.write_bytes(new.read_bytes())")
    ],
    "test_sac.py::test_log_probability_is_that_of_torch": [
        (
            "sac_bn",
            "2 * (math.log(2) - u - F.softplus(-2 * u))",
            "2 * (math.log(2) - u - F.softplus(2 * u))",
        )
    ],
    "test_sac.py::test_temperature_moves_entropy_to_its_target": [
        ("sac_bn", "return -(agent.log_alpha", "return (agent.log_alpha")
    ],
    "test_sac.py::test_losses_by_hand": [
        ("sac_bn", "q_next = q_next.amin(1)", "q_next = q_next.amax(1)"),
        ("sac_bn", ".square().mean(0).sum(), q", ".square().mean(), q"),
    ],
    "test_repeats.py::test_a_progress_bar_another_folder_and_evaluations_change_no_bit[sac_bn]": [
        ("sac_bn", "with torch.random.fork_rng():", "if True:")
    ],
    "test_faults.py::test_killed_anywhere_and_resumed_equals_never_killed[sac_bn]": [
        ("sac_bn", 'torch.set_rng_state(state["torch"][0])', "pass")
    ],
    "test_sac.py::test_losses_of_the_actor_are_reported_whenever_it_was_updated": [
        ("sac_bn", "losses |= update(", "losses = update(")
    ],
    "test_hostile.py::test_evaluation_leaves_global_generators_alone[sac_bn]": [
        ("sac_bn", "np.random.set_state(state[1])", "pass")
    ],
    "test_on_policy.py::test_advantages_and_returns_against_brute_force": [
        ("ppo_bn", "gamma * (1 - done) * value[1:]", "gamma * value[1:]"),
        ("ppo_bn", "gae_lambda * (1 - done[t]) * after", "gae_lambda * after"),
        ("reinforce_bn", "gamma * (1 - done[t]) * after", "gamma * after"),
    ],
    "test_on_policy.py::test_clipped_loss_by_hand": [
        ("ppo_bn", "return -torch.min(", "return -torch.max(")
    ],
    "test_on_policy.py::test_what_ppo_descends": [
        ("ppo_bn", "loss = loss - args.entropy_coef", "loss = loss + args.entropy_coef")
    ],
    "test_on_policy.py::test_time_outs_pay_what_was_to_come_and_deaths_do_not[ppo_bn]": [
        ("ppo_bn", "truncated & ~terminated", "truncated")
    ],
    "test_on_policy.py::test_a_rollout_bootstraps_from_the_observation_after_it": [
        (
            "ppo_bn",
            "state_value(agent, obs, args), args)",
            "state_value(agent, obs, args) * 0, args)",
        )
    ],
    "test_on_policy.py::test_rows_of_a_batch_belong_together": [
        (
            "ppo_bn",
            "x.flatten(0, 1) for x in parts",
            "x.transpose(0, 1).flatten(0, 1) for x in parts",
        )
    ],
    "test_on_policy.py::test_minibatches_cover_the_rollout_until_the_mean_divergence_ends_it": [
        ("ppo_bn", "torch.cat(log_ratios)", "log_ratios[-1]")
    ],
    "test_on_policy.py::test_ratio_before_the_first_step": [
        (
            "ppo_bn",
            "Rollout(seen, action,",
            "Rollout(torch.as_tensor(obs, dtype=torch.float32), action,",
        )
    ],
    "test_faults.py::test_killed_anywhere_and_resumed_equals_never_killed[ppo_bn]": [
        ("ppo_bn", "obs = None  # a resumed run", "pass  # a resumed run")
    ],
    "test_on_policy.py::test_what_reinforce_descends": [
        ("reinforce_bn", "return -(log_prob", "return (log_prob")
    ],
    "test_on_policy.py::test_reinforce_learns_from_first_episodes_only": [
        (
            "reinforce_bn",
            "x[rollout.playing.bool()] for x in parts",
            "x.flatten(0, 1) for x in parts",
        )
    ],
    "test_on_policy.py::test_every_pass_has_its_mode": [
        (
            "reinforce_bn",
            "agent.actor.eval()  # NORM mode: what a policy",
            "agent.actor.train()  # NORM mode: what a policy",
        )
    ],
    "test_on_policy.py::test_evaluation_in_train_mode_uses_the_batch_and_moves_nothing": [
        ("reinforce_bn", "copy.deepcopy(self.actor).train()", "self.actor.train()")
    ],
    "test_on_policy.py::test_evaluation_sums_one_episode_of_each_environment": [
        ("reinforce_bn", "returns[playing] += reward[playing]", "returns += reward")
    ],
    "test_hostile.py::test_images_of_either_layout_are_learnt_alike": [
        (
            "reinforce_bn",
            "if first else np.moveaxis(obs, 2, 0)",
            "if True else np.moveaxis(obs, 2, 0)",
        ),
        ("reinforce_bn", "255 if obs_space.dtype == np.uint8 else 1", "1"),
    ],
}
CASES = [(*change, test) for test, changes in MUTATIONS.items() for change in changes]


@pytest.mark.parametrize("script, old, new, test", CASES)
def test_what_is_changed_is_there_once_and_so_is_the_test(script, old, new, test):
    source = (ROOT / f"{script}.py").read_text()
    assert source.count(old) == 1
    compile(source.replace(old, new), script, "exec")
    file, name = test.split("[")[0].split("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script, old, new, test", CASES)
def test_a_change_makes_a_test_fail(script, old, new, test, tmp_path):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "pyproject.toml"):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    source = (ROOT / f"{script}.py").read_text()
    (tmp_path / f"{script}.py").write_text(source.replace(old, new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/{test}"],
        cwd=tmp_path,
        env=unmeasured(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout[-2000:] + done.stderr
