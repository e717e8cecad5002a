"""The same seed gives the same bits, however, wherever and with whatever display a run is made."""

import importlib
import os
import pty
import subprocess
import sys
import termios
import threading
from dataclasses import replace

import pytest
from conftest import all_scalars, checkpoint, same
from test_cli import words_of
from test_faults import ROOT, SCRIPTS, options


def run_on_a_terminal(script, words, folder):
    """Run a script in a folder, its messages on a terminal; return the messages."""
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    said = []

    def listen():
        while True:
            try:
                said.append(os.read(outer, 4096))
            except OSError:  # a terminal ends so
                return

    listener = threading.Thread(target=listen)
    listener.start()
    command = [sys.executable, f"{ROOT}/{script}.py", "--run-dir", "run", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}/tests"}
    done = subprocess.run(command, cwd=folder, env=env, stderr=inner, stdout=subprocess.DEVNULL)
    os.close(inner)
    listener.join()
    os.close(outer)
    assert done.returncode == 0, said
    return b"".join(said).decode()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_progress_bar_another_folder_and_evaluations_change_no_bit(script, tmp_path, capsys):
    said = run_on_a_terminal(script, words_of(options(script)), tmp_path)
    assert "step/s" in said and "return" in said  # the bar was drawn
    module, run_dir = importlib.import_module(script), tmp_path / "other"
    module.train(replace(module.Args(**options(script, eval_every=0)), run_dir=str(run_dir)))
    assert "step/s" not in capsys.readouterr().err
    ends = [checkpoint(folder) for folder in (tmp_path / "run", run_dir)]
    assert all(same(ends[0][name], ends[1][name]) for name in ("agent", "random", "torch"))
    (step, updates, many), (*progress, one) = (end["progress"] for end in ends)
    assert [step, updates] == progress and len(many) > 2 and many[-1] == one[-1]
    found = [all_scalars(folder) for folder in (tmp_path / "run", run_dir)]
    for tag in found[0].keys() | found[1].keys():
        if not tag.startswith(("eval/", "norm/q_bias")):
            assert found[0][tag] == found[1][tag], tag
