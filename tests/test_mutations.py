"""The tests notice: each change (script, old, new) makes a named test fail."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, unmeasured

MUTATIONS = {
    "test_zfilter.py::test_a_million_samples_in_uneven_batches_equal_numpy": [
        ("zfilter", "delta * (n / total)", "delta / total")
    ],
    "test_ddpg.py::test_critic_loss_by_hand": [
        ("ddpg_bn", "args.gamma * (1 - batch.terminated) * q_next", "args.gamma * q_next")
    ],
    "test_ddpg.py::test_mode_of_every_forward_pass": [
        ("ddpg_bn", '.train(args.bn_policy_critic == "train")', ".eval()")
    ],
    "test_cli.py::test_checkpoints_that_are_damaged_foreign_or_code_are_refused[ddpg_bn]": [
        ("ddpg_bn", 'weights_only=True)["args"]', 'weights_only=False)["args"]')
    ],
    "test_sac.py::test_losses_by_hand": [
        ("sac_bn", "q_next = q_next.amin(1)", "q_next = q_next.amax(1)")
    ],
    "test_faults.py::test_killed_anywhere_and_resumed_equals_never_killed[sac_bn-2]": [
        ("sac_bn", 'torch.set_rng_state(state["torch"][0])', "pass")
    ],
    "test_on_policy.py::test_advantages_and_returns_against_brute_force": [
        ("ppo_bn", "gamma * (1 - done) * value[1:]", "gamma * value[1:]"),
        ("ppo_bn", "gae_lambda * (1 - done[t]) * after", "gae_lambda * after"),
        ("reinforce_bn", "gamma * (1 - done[t]) * after", "gamma * after"),
    ],
    "test_on_policy.py::test_time_outs_pay_what_was_to_come_and_deaths_do_not[ppo_bn]": [
        ("ppo_bn", "truncated & ~terminated", "truncated")
    ],
    "test_faults.py::test_killed_anywhere_and_resumed_equals_never_killed[ppo_bn-2]": [
        ("ppo_bn", "obs = None  # a resumed run", "pass  # a resumed run")
    ],
    "test_on_policy.py::test_evaluation_in_train_mode_uses_the_batch_and_moves_nothing": [
        ("reinforce_bn", "agent.actor = copy.deepcopy(actor)", "agent.actor = actor")
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
    command, env = [*command, f"tests/{test}"], unmeasured(PYTHONPATH=str(tmp_path))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout[-2000:] + done.stderr
