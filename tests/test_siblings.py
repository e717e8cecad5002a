"""What is the same in the scripts is the same to the byte."""

import inspect

import pytest

import ddpg_bn
import ppo_bn
import reinforce_bn
import sac_bn

SCRIPTS = reinforce_bn, ppo_bn, ddpg_bn, sac_bn
ALL = """
    fail parse changed_norm_options BatchRenorm hidden_layers make_filter gradient_step probe write
    report_warmup save_run load_run saved_args make_run_dir open_run describe_run Checked
    is_scalable is_finite
""".split()  # noqa: SIM905
OFF_POLICY = """
    norm_layer add_norm filter_batch ReplayBuffer q_values update_target evaluate norm_scalars
    make_env report_evaluation
""".split()  # noqa: SIM905
ON_POLICY = """
    norm_layer add_norm make_net Actor Critic RewardScale as_input act explore state_value
    evaluate moment_gap norm_scalars InTrainMode recalibrate make_env make_envs
    report_evaluation report_modes
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", ALL)
def test_all_four_share_it(name):
    assert len({inspect.getsource(getattr(script, name)) for script in SCRIPTS}) == 1


@pytest.mark.parametrize("name", OFF_POLICY)
def test_ddpg_and_sac_share_it(name):
    assert len({inspect.getsource(getattr(script, name)) for script in (ddpg_bn, sac_bn)}) == 1


def test_ddpg_and_sac_replay_the_same():
    assert ddpg_bn.Batch._fields == sac_bn.Batch._fields


@pytest.mark.parametrize("name", ON_POLICY)
def test_reinforce_and_ppo_share_it(name):
    assert len({inspect.getsource(getattr(script, name)) for script in (reinforce_bn, ppo_bn)}) == 1


def test_banners_stand_in_the_same_order():
    banners = [
        [line for line in inspect.getsource(script).splitlines() if line.startswith("# ----")]
        for script in SCRIPTS
    ]
    assert all(found == banners[0] for found in banners) and len(banners[0]) == 9
