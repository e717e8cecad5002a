"""What is the same in the scripts is the same to the byte."""

import inspect

import pytest

import ddpg_bn
import sac_bn

SAME = """
    fail changed_norm_options BatchRenorm norm_layer add_norm hidden_layers make_filter filter_batch
    Batch ReplayBuffer q_values gradient_step update_target evaluate probe norm_scalars write
    save_run load_run saved_args make_run_dir open_run describe_run make_env report_evaluation
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", SAME)
def test_ddpg_and_sac_share_it(name):
    a, b = (inspect.getsource(getattr(script, name)) for script in (ddpg_bn, sac_bn))
    assert a == b


def test_banners_stand_in_the_same_order():
    banners = [
        [line for line in inspect.getsource(script).splitlines() if line.startswith("# ----")]
        for script in (ddpg_bn, sac_bn)
    ]
    assert banners[0] == banners[1] and len(banners[0]) == 8
