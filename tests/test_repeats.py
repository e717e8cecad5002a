"""The same seed gives the same bits, however, wherever and with whatever display a run is made."""

import importlib
import os
import pty
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from conftest import all_scalars, checkpoint, same
from test_faults import ROOT, SCRIPTS, options


def run_on_a_terminal(script, words, folder):
    """Run a script in a folder, its messages on a terminal; return the messages."""
    folder.mkdir()
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


def words_of(options):
    for key, value in options.items():
        yield from (f"--{key.replace('_', '-')}",) if value is not False else ()
        if isinstance(value, tuple):
            yield from map(str, value)
        elif value is not True:
            yield str(value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_progress_bar_another_folder_and_evaluations_change_no_bit(
    script, tmp_path, monkeypatch, capsys
):
    chosen = options(script, "batchrenorm" if script in ("ppo_bn", "sac_bn") else "zfilter")
    said = run_on_a_terminal(script, words_of(chosen), tmp_path / "a")
    assert "step" in said and "return" in said  # the bar was drawn
    module = importlib.import_module(script)
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    module.train(module.Args(**chosen | {"eval_every": 0, "run_dir": "run"}))
    assert capsys.readouterr().err == ""
    ends = [checkpoint(Path(tmp_path, folder, "run")) for folder in "ab"]
    (step, _, many), (_, _, one) = (end.pop("progress") for end in ends)
    assert same(*ends) and len(many) > 2 and many[-1] == one[-1] and one[-1][0] == step
    found = [all_scalars(tmp_path / folder / "run") for folder in "ab"]
    for tag in found[0].keys() | found[1].keys():
        if not tag.startswith(("charts/SPS", "eval/", "norm/q_bias")):
            assert found[0][tag] == found[1][tag], tag
