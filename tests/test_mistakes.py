"""Command lines drawn at random, and files that are damaged or foreign: one line, nothing done."""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
SCRIPTS = ["reinforce_bn", "ppo_bn", "ddpg_bn", "sac_bn"]


def play(script, words):
    """Run a script's main part in this process; return its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, [f"{script}.py", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    except SystemExit as end:
        return end.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise AssertionError("a script ends with sys.exit")


@pytest.mark.parametrize("script", ["reinforce_bn", "ppo_bn"])
def test_of_two_mistakes_the_same_is_named_every_time(script):
    words = "--norm batchrenorm --bn-rollout eval --bn-update eval --bn-momentum 0.5 --bn-warmup 5"
    end = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", *words.split()],
        env=os.environ | {"PYTHONHASHSEED": "1"},  # a set of these two begins with --bn-warmup
        capture_output=True,
        text=True,
    )
    assert end.returncode == 2 and "--bn-momentum needs a pass in train mode" in end.stderr


def one_line(script, err):
    """Return the only line of a mistake."""
    (line,) = err.strip().splitlines()
    assert line.startswith(f"{script}.py: ") and "Traceback" not in line
    return line


# --------------------------------------------------------------------------------- Command lines


def fields(script):
    """Return {option: its type} of a script; unions and tuples by what they hold."""
    hints = typing.get_type_hints(importlib.import_module(script).Args)
    return {f"--{name.replace('_', '-')}": hint for name, hint in hints.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_words_of_another_type_get_one_line(script, tmp_path, monkeypatch):
    """parse() alone: each option that is no text, without a value and with impossible ones."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    for option, hint in fields(script).items():
        values = {str: [], bool: [["true"]]}.get(hint, [["x"], [""], ["1", "x"]])
        values += [["1.5"], ["nan"], ["inf"]] if hint is int else []
        for words in [*values, *([] if hint is bool or "tuple" in str(hint) else [[]])]:
            monkeypatch.setattr(sys, "argv", [f"{script}.py", option, *words])
            err = io.StringIO()
            with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(err):
                raise AssertionError(f"{words} pass for {option}: {module.parse()}")
            line = one_line(script, err.getvalue())
            assert end.value.code == 2, line
            assert option in line or f"Unrecognized options: {words[-1]}" in line, line
    assert not list(tmp_path.iterdir())


# Of each option some values that can be and some that cannot; no run that they allow takes long.
NUMBERS = ["0", "1", "2", "3", "-1", "nan", "inf", "1e400", "x", "", str(10**13)]
VALUES = {
    "--env": ["Pendulum-v1", "CartPole-v1", "FrozenLake-v1", "Nope-v0", "no.module:X-v0", "", "::"],
    "--total-steps": ["1", "9", "0", "-5", "nan", "x", str(10**13)],
    "--eval-every": [*NUMBERS, "7"],
    "--seed": [*NUMBERS, str(2**32)],
    "--device": ["cpu", "auto", "tpu"],
    "--run-dir": ["new", "taken", "taken/file", "taken/file/new", "/proc/new", "n" * 300],
    "--resume": ["none", "taken", "taken/file"],
    "--norm-stats": ["none.npz", "taken", "taken/file"],
    "--hidden-sizes": ["4", "4 3", "0", "", "-2", "nan", "99999"],
    "--critic-hidden-sizes": ["4", "", "0", "x"],
    "--norm-position": ["", "input", "pre", "post", "input post", "after"],
    "--network": ["mlp", "linear", "cnn", "rnn"],
    "--target-entropy": ["-1", "None", "nan", "inf", "x"],
    "--log-std-min": ["-3", "3", "-99", "nan"],
    "--minibatches": ["1", "2", "4", "5", "0", "99"],
    "--buffer-size": ["1", "50", "0", str(10**12), str(10**13)],
}


def drawn(script):
    """Return a strategy that draws {option: words} of a script."""
    choices = []
    for option, hint in fields(script).items():
        if hint is bool:
            flags = [option], ["--no-" + option[2:]]
            words = st.sampled_from(flags)
        elif typing.get_origin(hint) is typing.Literal and option not in VALUES:
            values = [*map(str, typing.get_args(hint)), "other"]
            words = st.sampled_from([[option, value] for value in values])
        else:
            values = VALUES.get(option, NUMBERS)
            words = st.sampled_from([[option, *value.split()] for value in values])
        choices.append(st.tuples(st.just(option), words))
    return st.lists(st.one_of(choices), max_size=6, unique_by=lambda choice: choice[0])


def either_trains_or_says_why_not(script, choices):
    """Play a tiny run with these options in an empty folder."""
    tiny = {
        "--total-steps": "9",
        "--eval-every": "0",
        "--eval-episodes": "1",
        "--hidden-sizes": "4",
    }
    if script in ("ddpg_bn", "sac_bn"):
        tiny |= {"--env": "conftest:Countdown-v0", "--learning-starts": "5", "--batch-size": "4"}
    else:
        tiny |= {"--env": "conftest:Countdown-v0", "--num-envs": "2"}
    if script == "ppo_bn":
        tiny |= {"--num-steps": "8", "--minibatches": "2", "--epochs": "1"}
    chosen = dict(choices)
    words = [word for key, value in tiny.items() if key not in chosen for word in (key, value)]
    words += itertools.chain(*chosen.values())
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("taken").mkdir()
            Path("taken/file").write_text("mine")
            code, out, err = play(script, words)
            left = {str(path) for path in Path().rglob("*")} - {"taken", "taken/file"}
            assert Path("taken/file").read_text() == "mine"
            if code == 2:
                line = one_line(script, err)
                named = [option.replace("--no-", "--") for option in (*chosen, *tiny)]
                assert any(x in line.replace("--no-", "--") for x in named), line
                assert out == "" and not left
            else:
                assert code in (0, 3), err
                run_dir = Path(out.splitlines()[0].removeprefix("run: "))
                result = json.loads((run_dir / "result.json").read_text())
                assert result["diverged"] == (code == 3)
                assert code == 3 or np.isfinite(result["eval"]).all()
                assert ("diverged" if code else "final evaluation") in (err if code else out)
        finally:
            os.chdir(before)


RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_line_trains_or_gets_one_line(script):
    check = given(st.just(script), drawn(script))(either_trains_or_says_why_not)
    settings(max_examples=40, derandomize=True, **RELAXED)(check)()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_many_command_lines_train_or_get_one_line(script):
    check = given(st.just(script), drawn(script))(either_trains_or_says_why_not)
    settings(max_examples=500, **RELAXED)(check)()


# ---------------------------------------------------------------------------------------- Files


class Code:
    """Writes a file if it is ever unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def refused(module, args, capsys, option):
    """Assert that train(args) ends with one line that names the option; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        module.train(args)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and option in line, line
    return line


@pytest.mark.parametrize("name", SCRIPTS)
def test_checkpoints_that_are_damaged_foreign_or_code_are_refused(name, small, tmp_path, capsys):
    module = importlib.import_module(name)
    twin = importlib.import_module(SCRIPTS[SCRIPTS.index(name) ^ 1])  # the sibling of its kind
    args = small(module, total_steps=130, env="ShortPendulum-v0")
    first = module.train(args)
    strangers = {
        "another algorithm": (twin, {}),
        "another environment": (module, {"env": "Countdown-v0"}),
        "other shapes": (module, {"hidden_sizes": (8, 16)}),
        "other layers": (module, {"norm": "batchnorm"}),
    }
    file, foreign = Path(args.run_dir, "checkpoint.pt"), {}
    for about, (script, options) in strangers.items():
        stranger = small(script, **{"total_steps": 130, "env": "ShortPendulum-v0"} | options)
        script.train(stranger)
        foreign[about] = Path(stranger.run_dir, "checkpoint.pt").read_bytes()
    whole, state = file.read_bytes(), checkpoint(args.run_dir)
    nan = {"count": torch.tensor(5), "mean": torch.full((3,), torch.nan), "m2": torch.ones(3)}
    changed = {
        "NaN statistics": state | {"obs_stat": nan},
        "negative variance": state | {"obs_filter": nan | {"mean": -nan["m2"], "m2": -nan["m2"]}},
        "no progress": {key: value for key, value in state.items() if key != "progress"},
        "strange progress": state | {"progress": "abc"[:2]},
        "strange generators": state | {"generators": [1, 2, 3]},
        "a list": [state],
        "code": {"actor": Code(tmp_path / "proof")},
        "code inside": state | {"progress": Code(tmp_path / "proof")},
    }
    for about, content in changed.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        foreign[about] = buffer.getvalue()
    for part in (0.0, 0.1, 0.5, 0.99):
        foreign[f"truncated to {part}"] = whole[: int(part * len(whole))]
    args.resume = args.run_dir
    for about, content in foreign.items():
        file.write_bytes(content)
        before = snapshot(args.run_dir)
        line = refused(module, args, capsys, f"--resume {args.resume}")
        assert "checkpoint.pt" in line and snapshot(args.run_dir) == before, about
    file.unlink()
    assert "FileNotFoundError" in refused(module, args, capsys, "--resume")
    assert not (tmp_path / "proof").exists()

    rng = np.random.default_rng(0)
    for _ in range(8):  # a flipped bit is found, or stands where nothing is read from
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        try:
            assert module.train(args)["eval"] == first["eval"]
        except SystemExit as end:
            assert end.code == 2
    file.write_bytes(whole)
    assert module.train(args)["eval"] == first["eval"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_that_are_damaged_or_foreign_are_refused(name, small, capsys):
    module = importlib.import_module(name)
    args = small(module, total_steps=130, env="ShortPendulum-v0")
    module.train(args)
    file = Path(args.run_dir, "args.json")
    about = json.loads(file.read_text())
    saved = about["args"]
    contents = [about | {"args": saved | {"seed": seed}} for seed in ("1", None, -1, [1, "x"])]
    contents += [about | {"args": saved | {"norm": 5}}, about | {"args": saved | {"more": 1}}]
    contents += [about | {"args": None}, about | {"args": []}, {}, [], None]
    texts = [file.read_text()[:100], "", *map(json.dumps, contents)]
    before = snapshot(args.run_dir)
    for text in texts:
        file.write_text(text)
        code, out, err = play(name, ["--resume", args.run_dir])
        line = one_line(name, err)
        assert code == 2 and out == "", text
        assert any(word in line for word in ("--resume", "--seed", "--norm 5")), (text, line)
        assert snapshot(args.run_dir) == before | {"args.json": text.encode()}
    other = importlib.import_module(SCRIPTS[SCRIPTS.index(name) ^ 1])
    strange = dataclasses.asdict(other.Args(run_dir=args.run_dir))
    file.write_text(json.dumps(about | {"args": strange}))
    code, _, err = play(name, ["--resume", args.run_dir])
    assert code == 2 and f"no run of {name}.py" in one_line(name, err)


@pytest.mark.parametrize("name", SCRIPTS)
def test_statistics_that_are_damaged_foreign_or_code_are_refused(name, small, tmp_path, capsys):
    module = importlib.import_module(name)
    file, good = tmp_path / "stats.npz", {"count": 9, "mean": np.zeros(3), "m2": np.ones(3)}
    options = {"norm": "fixed", "norm_stats": str(file), "total_steps": 130}

    def written(**changes):
        np.savez(file, **good | changes)
        return file.read_bytes()

    whole, code = written(env="ShortPendulum-v0"), np.array([Code(tmp_path / "proof")], object)
    lists = io.BytesIO()
    np.save(lists, np.zeros(3))
    contents = {
        "no archive": b"mean",
        "an array": lists.getvalue(),
        "code": written(mean=code),
        "code about it": written(env=code),
        "another environment": written(env="Countdown-v0"),
        "other shapes": written(mean=np.zeros(4), m2=np.ones(4)),
        "a row": written(mean=np.zeros((1, 3)), m2=np.ones((1, 3))),
        "NaN": written(mean=np.full(3, np.nan)),
        "infinite": written(m2=np.full(3, np.inf)),
        "negative": written(m2=np.full(3, -1.0)),
        "words": written(mean=np.array(["a", "b", "c"])),
        "of nothing": written(count=0),
        "count NaN": written(count=np.nan),
    }
    for part in (0.0, 0.2, 0.9):
        contents[f"truncated to {part}"] = whole[: int(part * len(whole))]
    for about, content in contents.items():
        file.write_bytes(content)
        args = small(module, env="ShortPendulum-v0", **options)
        line = refused(module, args, capsys, f"--norm-stats {file}")
        assert not Path(args.run_dir).exists(), (about, line)
    for path in (tmp_path, tmp_path / "none.npz"):
        args = small(module, env="ShortPendulum-v0", **options | {"norm_stats": str(path)})
        refused(module, args, capsys, f"--norm-stats {path}")
    assert not (tmp_path / "proof").exists()
    file.write_bytes(whole)
    args = small(module, env="ShortPendulum-v0", **options)
    assert not module.train(args)["diverged"]
    kept = checkpoint(args.run_dir)["obs_filter"]
    assert kept["mean"] == [0, 0, 0] and kept["m2"] == [1, 1, 1]
