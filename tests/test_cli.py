"""The scripts as programs: options, damaged and foreign files, copies without the markers."""

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, checkpoint, same

import ddpg_bn

OFF_POLICY, ON_POLICY = ["ddpg_bn", "sac_bn"], ["reinforce_bn", "ppo_bn"]
SCRIPTS = OFF_POLICY + ON_POLICY
SHORT = "--hidden-sizes 16 16 --eval-every 300 --eval-episodes 1 --device cpu --total-steps 500"
TINY = dict.fromkeys(OFF_POLICY, f"--env Pendulum-v1 --learning-starts 100 --batch-size 32 {SHORT}")
TINY["reinforce_bn"] = f"--env CartPole-v1 --num-envs 4 {SHORT}"
TINY["ppo_bn"] = f"--env Pendulum-v1 --num-envs 4 --num-steps 25 --minibatches 4 {SHORT}"


def play(path, words):
    """Run a script's main part in this process; return its exit code, stdout and stderr."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    handler, sys.argv = signal.getsignal(signal.SIGTERM), [str(path), *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        said = end.code if isinstance(end.code, str) else ""  # which Python prints, with code 1
        return 1 if said else end.code, out.getvalue(), err.getvalue() + said
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    raise AssertionError("a script ends with sys.exit")


def words_of(options):
    """Return options of Args as words of a command line."""
    for name, value in options.items():
        option = name.replace("_", "-")
        yield f"--no-{option}" if value is False else f"--{option}"
        if not isinstance(value, bool):
            yield from map(str, value if isinstance(value, tuple) else (value,))


# ------------------------------------------------------------------------------ Mistakes
BN = {"norm": "batchnorm"}
REFUSED = [
    (SCRIPTS, {"norm": "batch_norm"}, "--norm"),
    (SCRIPTS, {"norm": ("batchnorm", "layernorm")}, "--norm needs"),
    (SCRIPTS, {"norm": "zfilter", "norm_position": ("pre",)}, "--norm-position needs"),
    (SCRIPTS, {"norm": "fixed"}, "--norm needs"),
    (SCRIPTS, {"norm": "layernorm", "bn_momentum": 0.01}, "--bn-momentum needs"),
    (OFF_POLICY, {"bn_joint": True}, "--bn-joint needs"),
    (OFF_POLICY, {"norm": "layernorm", "bn_policy_critic": "eval"}, "--bn-policy-critic needs"),
    (OFF_POLICY, BN | {"bn_target": "train", "target_network": False}, "--bn-target needs"),
    (OFF_POLICY, {"tau": 0.5, "target_network": False}, "--tau needs"),
    (OFF_POLICY, BN | {"batch_size": 1}, "--batch-size needs"),
    (OFF_POLICY, {"weight_norm": True}, "--weight-norm needs"),
    (SCRIPTS, {"hidden_sizes": ()}, "--hidden-sizes needs"),
    (OFF_POLICY, {"buffer_size": 0}, "--buffer-size needs"),
    (ON_POLICY, {"norm": "layernorm", "bn_rollout": "train"}, "--bn-rollout needs"),
    (ON_POLICY, BN | {"num_envs": 1, "bn_rollout": "train"}, "--num-envs needs"),
    (["ppo_bn"], {"minibatches": 2048}, "--minibatches needs"),
    (["ppo_bn"], {"minibatches": 0}, "--minibatches needs"),
    (["ppo_bn"], {"epochs": 0}, "--epochs needs"),
    (["reinforce_bn"], {"critic_steps": 0}, "--critic-steps needs"),
    (["reinforce_bn"], BN | {"network": "linear"}, "--norm needs"),
    (["reinforce_bn"], {"norm": "batchrenorm", "network": "cnn"}, "--norm needs"),
    (["reinforce_bn"], BN | {"norm_net": "critic", "bn_recalibrate": 9}, "--bn-recalibrate needs"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_of_a_resumed_run_only_what_may_change_is_asked(script):
    Args = importlib.import_module(script).Args
    Args(resume="runs/of_batch_norm", bn_momentum=0.01)
    with pytest.raises(ValueError, match="--save-every needs"):
        Args(resume="runs/of_batch_norm", save_every=0)


@pytest.mark.parametrize("scripts, options, words", REFUSED, ids=str)
def test_senseless_options_are_refused_and_leave_nothing(
    scripts, options, words, tmp_path, monkeypatch
):
    """By Args, and on the command line with exit code 2."""
    monkeypatch.chdir(tmp_path)
    for script in scripts:
        with pytest.raises(ValueError, match=words):
            importlib.import_module(script).Args(**options)
    code, out, err = play(ROOT / f"{script}.py", words_of(options))
    assert (code, out) == (2, "") and words in re.sub(r"[\s│]+", " ", err), err
    assert not list(tmp_path.iterdir())


FAILS = [
    (SCRIPTS, {"env": "Nope-v9"}, "NameNotFound: "),
    (SCRIPTS, {"env": "no_such_module:Nope-v9"}, "ModuleNotFoundError: "),
    (SCRIPTS, {"norm": "fixed", "norm_stats": "no/such.npz"}, "no/such.npz"),
    (SCRIPTS, {"resume": "no/such/run"}, "no/such/run"),
    (SCRIPTS, {"run_dir": f"{__file__}/run"}, "NotADirectoryError: "),
    (SCRIPTS, {"run_dir": str(ROOT)}, "FileExistsError: "),
    (OFF_POLICY, {"env": "CartPole-v1"}, "choose bounded, continuous actions"),
    (["reinforce_bn"], {"network": "cnn"}, "--network cnn needs images"),
]


@pytest.mark.parametrize("scripts, options, words", FAILS, ids=str)
def test_what_cannot_be_done_ends_in_one_line_and_leaves_nothing(
    scripts, options, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for script in scripts:
        options = {"env": "CartPole-v1" if script == "reinforce_bn" else "Pendulum-v1"} | options
        code, out, err = play(ROOT / f"{script}.py", words_of(options))
        (line,) = err.strip().splitlines()
        assert (code, out) == (1, "") and words in line and re.search(r"\(\S+\.py:\d+\)$", line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_main_job_reaches_updates(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--norm batchnorm --env Ant-v4 --total-steps 600 --eval-episodes 1 --eval-every 0"
    options += " --max-episode-steps 100"
    options += " --learning-starts 500" if script in OFF_POLICY else " --num-envs 4"
    options += " --num-steps 60 --minibatches 8 --epochs 2" if script == "ppo_bn" else ""
    code, out, err = play(ROOT / f"{script}.py", options.split())
    assert code == 0 and re.search(r"step \d+: return ", err), err
    run_dir = out.splitlines()[0].removeprefix("run: ")
    assert re.fullmatch(rf"runs/Ant-v4/{script}/.*norm-batchnorm-.*seed1-[\d-]+", run_dir)
    assert out.endswith(f"files: {run_dir}\nlook:  tensorboard --logdir {run_dir}\n")
    result = json.loads(Path(run_dir, "result.json").read_text())
    assert result["updates"] >= 21 and result["steps"] >= 600
    assert b"Normalization" in next(Path(run_dir).glob("events*")).read_bytes()  # a page of its own


def test_a_run_that_diverges_ends_with_exit_code_3(tmp_path):
    options = f"{TINY['ddpg_bn']} --critic-lr 1e30 --run-dir {tmp_path}/run"
    code, out, _ = play(ROOT / "ddpg_bn.py", options.split())
    assert code == 3 and "diverged at step " in out


# ---------------------------------------------------------------------- Runs that go on
def test_resume_extends_and_evaluates_again(small):
    """A run that was over may go further, with the same options but for those that end it."""
    options = {"env": "ShortPendulum-v0", "norm": "batchnorm", "eval_every": 80}
    first = ddpg_bn.train(small(ddpg_bn, total_steps=160, **options))
    whole = ddpg_bn.train(small(ddpg_bn, total_steps=320, **options))
    again = ddpg_bn.saved_args(first["run_dir"])
    assert again.device == "cpu" and ddpg_bn.train(again)["eval"] == first["eval"]
    for options in ({"critic_lr": 0.5}, {"norm": ("layernorm",)}, {"env": "Pendulum-v0"}):
        with pytest.raises(ValueError, match=f"another --{next(iter(options)).replace('_', '-')}"):
            ddpg_bn.Run(replace(again, **options), None, [])
    extended = ddpg_bn.train(replace(again, total_steps=320, save_every=3, eval_episodes=1))
    assert whole["eval"] == extended["eval"] and len(whole["eval"]) == 4
    states = [checkpoint(result["run_dir"]) for result in (whole, extended)]
    assert all(same(*(state[name] for state in states)) for name in ("agent", "random", "torch"))


class Code:
    """Writes a file if it is ever unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoints_that_are_damaged_foreign_or_code_are_refused(script, small, tmp_path):
    module = importlib.import_module(script)
    other = importlib.import_module(SCRIPTS[SCRIPTS.index(script) ^ 1])
    args = small(module, env="ShortPendulum-v0", total_steps=130)
    module.train(args)
    stranger = other.train(small(other, env="ShortPendulum-v0", total_steps=130))["run_dir"]
    file = Path(args.run_dir, "checkpoint.pt")
    whole, state, code = file.read_bytes(), checkpoint(args.run_dir), Code(tmp_path / "proof")
    bad = [[state], *(state | {name: code} for name in state)]
    nan = {"count": 5, "mean": [float("nan")] * 3, "m2": [1.0] * 3}
    bad += [state | {"agent": state["agent"] | part} for part in ({"actor": {}}, {"obs_stat": nan})]
    contents = [Path(stranger, "checkpoint.pt").read_bytes(), b"", whole[:-99]]
    for content in [*contents, *bad]:
        torch.save(content, file)
        if isinstance(content, bytes):
            file.write_bytes(content)
        before = file.read_bytes()
        with pytest.raises(ValueError if content == contents[0] else Exception):
            module.train(module.saved_args(args.run_dir))
        assert file.read_bytes() == before and Path(args.run_dir, "result.json").exists()
    file.write_bytes(whole)
    assert not module.train(module.saved_args(args.run_dir))["diverged"]
    assert not (tmp_path / "proof").exists()


# --------------------------------------------------------------------- The strip property
TRACES = r"(?<!\.)\bnorm\b|\bnorm_|[Nn]ormaliz|NORM|BatchNorm|LayerNorm|Renorm|[Zz]-?[Ff]ilter"
TRACES += r"|recalibrat|reward_norm|[Rr]eward_?[Ss]cale|moment|first_ratio|RunningStat"
TRACES += r"|obs_filter|obs_stat|running_|\.eval\(\)|\.train\(|\.buffers\(\)|\bbn_|statistic"
TRACES += r"|weight_norm"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stripped_script_is_plain_and_complete(script, tmp_path):
    """The command is that of the docstring; its copy runs alone, and gives the same numbers."""
    text = (ROOT / f"{script}.py").read_text()
    (command,) = re.findall(r"^(sed .* > plain\.py)", text, re.MULTILINE)
    (tmp_path / f"{script}.py").write_text(text)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    (tmp_path / "alone").mkdir()
    plain = (tmp_path / "plain.py").rename(tmp_path / "alone/plain.py")
    assert not re.findall(rf".*(?:{TRACES}).*", plain.read_text())
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "100"]
    assert not subprocess.run([*ruff, "--select", "E,F,W,B,UP,RUF", plain]).returncode
    runs = (plain, "plain"), (ROOT / f"{script}.py", "none")
    for path, name in runs:  # in processes of their own, as importing a script may set up torch
        command = [sys.executable, path, *TINY[script].split(), "--run-dir", tmp_path / name]
        subprocess.run(command, check=True, cwd=plain.parent, capture_output=True)
    a, b = (checkpoint(tmp_path / run) for run in ("plain", "none"))
    assert b["agent"].keys() - a["agent"].keys() == {"obs_stat", "obs_filter", "reward_scale"}
    b["agent"] = {key: b["agent"][key] for key in a["agent"]}
    assert all(same(a[name], b[name]) for name in a if name != "args")
    assert a["progress"][1] > 50 and len(a["progress"][2]) == 2


KINDS = "flag", "obs", "reward", "layer", "mode", "batch", "target", "report", "save"


@pytest.mark.parametrize("script", SCRIPTS)
def test_markers_have_the_agreed_form(script):
    for number, line in enumerate((ROOT / f"{script}.py").read_text().splitlines(), 1):
        if "NORM" in line and line.strip() != "# NORM end":
            match = re.search(r"# NORM (begin: )?(\w+): \S+", line)
            assert match and match[2] in KINDS, (number, line)
