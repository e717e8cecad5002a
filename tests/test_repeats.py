"""The same seed gives the same bits, however and wherever a run is made."""

import importlib
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT, SCRIPTS, all_scalars, checkpoint, same, unmeasured
from test_cli import words_of
from test_faults import options

import ddpg_bn


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_program_another_folder_and_evaluations_change_no_bit(script, tmp_path):
    command = [sys.executable, f"{ROOT}/{script}.py", "--run-dir", "run"]
    env = unmeasured(PYTHONPATH=f"{ROOT}/tests")
    command += words_of(options(script))
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    module, run_dir = importlib.import_module(script), tmp_path / "other"
    module.train(replace(module.Args(**options(script, eval_every=0)), run_dir=str(run_dir)))
    another = replace(module.Args(**options(script)), seed=99, run_dir=str(tmp_path / "another"))
    assert module.train(another)["eval"][-1] != checkpoint(run_dir)["progress"][2][-1]
    ends = [checkpoint(folder) for folder in (tmp_path / "run", run_dir)]
    assert all(same(ends[0][name], ends[1][name]) for name in ("agent", "random", "torch"))
    (step, updates, many), (*progress, one) = (end["progress"] for end in ends)
    assert [step, updates] == progress and len(many) > 2 and many[-1] == one[-1]
    found = [all_scalars(folder) for folder in (tmp_path / "run", run_dir)]
    for tag in found[0].keys() | found[1].keys():
        if not tag.startswith(("eval/", "norm/q_bias")):
            assert found[0][tag] == found[1][tag], tag


def test_fifty_runs_of_one_second_get_fifty_folders(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    args = small(ddpg_bn, run_dir="", buffer_size=10)
    agent = ddpg_bn.make_agent(ddpg_bn.make_env(args), args, "cpu")
    assert len({ddpg_bn.Run(args, agent, []).dir for _ in range(50)}) == 50
