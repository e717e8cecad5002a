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
        ("zfilter", "delta * (n / total)", "delta / total"),
        ("zfilter", "self.m2 / (self.count - 1)", "self.m2 / self.count"),
    ],
    "test_zfilter.py::test_only_update_learns": [("zfilter", "if update:", "if True:")],
    "test_on_policy.py::test_reward_norm_scales_what_is_learnt_but_no_bootstrap_and_no_report": [
        ("zfilter", "self.sums[done] = 0", "self.sums[~done] = 0")
    ],
    "test_ddpg.py::test_critic_loss_by_hand": [
        ("ddpg_bn", "args.gamma * (1 - batch.terminated) * q_next", "args.gamma * q_next"),
        ("ddpg_bn", "return -agent.critic(", "return agent.critic("),
    ],
    "test_ddpg.py::test_mode_of_every_forward_pass": [
        ("ddpg_bn", '.train(args.bn_policy_critic == "train")', ".eval()")
    ],
    "test_ddpg.py::test_update_is_adam_then_polyak": [
        ("ddpg_bn", "list(source.parameters()), tau)", "list(source.parameters()), 1 - tau)")
    ],
    "test_layers.py::test_formula_by_hand_with_clipping": [
        ("ddpg_bn", "mean.lerp_(mean, self.momentum)", "mean.lerp_(mean, 1 - self.momentum)")
    ],
    "test_hostile.py::test_actions_reach_their_bounds_and_never_leave_them[ddpg_bn]": [
        ("ddpg_bn", "low + high + checked(action)", "checked(action)")
    ],
    "test_cli.py::test_checkpoints_that_are_damaged_foreign_or_code_are_refused[ddpg_bn]": [
        ("ddpg_bn", 'weights_only=True)["args"]', 'weights_only=False)["args"]')
    ],
    "test_faults.py::test_a_file_is_replaced_as_a_whole": [
        ("ddpg_bn", "    new.replace(path)", "    path.write_bytes(new.read_bytes())")
    ],
    "test_sac.py::test_log_probability_is_that_of_torch": [
        ("sac_bn", "F.softplus(-2 * u)", "F.softplus(2 * u)")
    ],
    "test_sac.py::test_losses_by_hand": [
        ("sac_bn", "q_next = q_next.amin(1)", "q_next = q_next.amax(1)"),
        ("sac_bn", ".square().mean(0).sum(), q", ".square().mean(), q"),
        ("sac_bn", "return -(agent.log_alpha", "return (agent.log_alpha"),
    ],
    "test_faults.py::test_killed_anywhere_and_resumed_equals_never_killed[sac_bn]": [
        ("sac_bn", 'torch.set_rng_state(state["torch"][0])', "pass")
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
        ("ppo_bn", "state_value(agent, obs, args), args)", "rollout.value[-1], args)")
    ],
    "test_on_policy.py::test_rows_of_a_batch_belong_together": [
        ("ppo_bn", "x.flatten(0, 1) for x", "x.transpose(0, 1).flatten(0, 1) for x")
    ],
    "test_on_policy.py::test_minibatches_cover_the_rollout_until_the_mean_divergence_ends_it": [
        ("ppo_bn", "torch.cat(log_ratios)", "log_ratios[-1]")
    ],
    "test_faults.py::test_killed_anywhere_and_resumed_equals_never_killed[ppo_bn]": [
        ("ppo_bn", "obs = None  # a resumed run", "pass  # a resumed run")
    ],
    "test_on_policy.py::test_reinforce_learns_from_first_episodes_only": [
        ("reinforce_bn", "x[rollout.playing.bool()] for x", "x.flatten(0, 1) for x")
    ],
    "test_on_policy.py::test_every_pass_has_its_mode": [
        ("reinforce_bn", "actor.eval()  # NORM mode: what a", "actor.train()  # NORM mode: what a")
    ],
    "test_on_policy.py::test_evaluation_in_train_mode_uses_the_batch_and_moves_nothing": [
        ("reinforce_bn", "copy.deepcopy(self.actor).train()", "self.actor.train()")
    ],
}
CASES = [(*change, test) for test, changes in MUTATIONS.items() for change in changes]


@pytest.mark.slow
@pytest.mark.parametrize("script, old, new, test", CASES)
def test_a_change_makes_a_test_fail(script, old, new, test, tmp_path):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "pyproject.toml"):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    source = (ROOT / f"{script}.py").read_text()
    assert source.count(old) == 1
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
