"""The scripts as programs: mistakes, stops, copies of a stripped file."""

import errno
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro
from conftest import checkpoint, same, unmeasured

import ddpg_bn

ROOT = Path(__file__).parent.parent
OFF_POLICY, ON_POLICY = ["ddpg_bn", "sac_bn"], ["reinforce_bn", "ppo_bn"]
SCRIPTS = OFF_POLICY + ON_POLICY
SHORT = "--hidden-sizes 16 16 --eval-every 300 --eval-episodes 1 --device cpu"
TINY = dict.fromkeys(OFF_POLICY, f"--env Pendulum-v1 --learning-starts 100 --batch-size 32 {SHORT}")
TINY["reinforce_bn"] = f"--env CartPole-v1 --num-envs 4 {SHORT}"
TINY["ppo_bn"] = f"--env Pendulum-v1 --num-envs 4 --num-steps 25 --minibatches 4 {SHORT}"


def run(script, options, cwd, wait=True):
    """Start a script as a user would, in another folder."""
    process = subprocess.Popen(
        [sys.executable, script, *options.split()],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # tiny networks, and a machine may be busy
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def train(script, options):
    """Run a script's train() in this process, which saves the start of another one."""
    module = importlib.import_module(script)
    return module.train(tyro.cli(module.Args, args=options.split()))


# ------------------------------------------------------------------------------ Mistakes


def with_scripts(scripts, mistakes):
    return [(script, *mistake) for script in scripts for mistake in mistakes]


@pytest.mark.parametrize(
    "script, options, words",
    with_scripts(
        SCRIPTS,
        [
            ({"norm": "zfilter", "norm_position": ("pre",)}, ["--norm-position", "zfilter"]),
            ({"norm_position": ("pre",)}, ["--norm-position", "--norm"]),
            ({"norm": "fixed"}, ["--norm fixed", "--norm-stats"]),
            ({"norm_stats": "x.npz"}, ["--norm fixed", "--norm-stats"]),
            ({"norm": "fixed", "norm_stats": "no/such.npz"}, ["--norm-stats", "no/such.npz"]),
            ({"norm": "fixed", "norm_stats": __file__}, ["--norm-stats", "no statistics"]),
            ({"norm": "layernorm", "bn_momentum": 0.01}, ["--bn-momentum", "batchnorm"]),
            (
                {"norm": "layernorm", "norm_position": ("post", "post")},
                ["--norm-position names a place twice"],
            ),
            ({"norm": "batch_norm"}, ["--norm batch_norm", "batchnorm"]),
            (
                {"norm": "batchnorm", "norm_position": ("pre", "mid")},
                ["--norm-position mid", "post"],
            ),
            ({"norm": "batchnorm", "bn_warmup": 5}, ["--bn-warmup", "batchrenorm"]),
            ({"bn_warmup": 5}, ["--bn-warmup needs --norm batchrenorm"]),
            ({"norm": "zfilter", "norm_net": "actor"}, ["--norm-net"]),
            ({"env": "Nope-v9"}, ["--env Nope-v9"]),
            ({"env": "FrozenLake-v1"}, ["--env FrozenLake-v1", "observes"]),
            ({"resume": "no/such/run"}, ["--resume no/such/run"]),
            ({"device": "cuda"}, ["--device cuda"]),
        ],
    )
    + with_scripts(
        OFF_POLICY,
        [
            ({"bn_joint": True}, ["--bn-joint", "batchnorm"]),
            (
                {"norm": "layernorm", "bn_policy_critic": "eval"},
                ["--bn-policy-critic", "batchnorm"],
            ),
            ({"norm": "batchnorm", "norm_net": "actor", "bn_joint": True}, ["--norm-net actor"]),
            (
                {"norm": "batchnorm", "bn_target": "train", "target_network": False},
                ["--bn-target", "--no-target-network"],
            ),
            ({"tau": 0.5, "target_network": False}, ["--tau", "--no-target-network"]),
            ({"buffer_size": 10**12}, ["--buffer-size", "too large"]),
            ({"run_dir": f"{__file__}/run"}, ["--run-dir", "cannot be made"]),
            ({"norm": "batchnorm", "batch_size": 1}, ["--batch-size"]),
            ({"env": "CartPole-v1"}, ["--env CartPole-v1", "continuous"]),
        ],
    )
    + with_scripts(
        ON_POLICY,
        [
            ({"norm": "layernorm", "bn_rollout": "train"}, ["--bn-rollout", "batchnorm"]),
            ({"bn_recalibrate": 5}, ["--bn-recalibrate", "batchnorm"]),
            ({"norm": "batchnorm", "num_envs": 1}, ["--num-envs 1"]),
            (
                {"norm": "batchnorm", "bn_update": "eval", "bn_momentum": 0.5},
                ["--bn-momentum", "train mode", "--bn-update eval"],
            ),
            ({"norm": "batchnorm", "network": "linear"}, ["--norm-position input"]),
            ({"norm": "batchrenorm", "network": "cnn"}, ["--norm batchrenorm", "--network cnn"]),
            ({"network": "cnn"}, ["--network cnn", "observes"]),
            ({"network": "linear", "hidden_sizes": (5,)}, ["--hidden-sizes", "--network linear"]),
            (
                {"norm": "batchnorm", "norm_net": "critic", "bn_recalibrate": 9},
                ["--bn-recalibrate", "--norm-net critic"],
            ),
        ],
    )
    + with_scripts(
        ["ppo_bn"],
        [
            ({"minibatches": 7}, ["--minibatches 7", "2048"]),
            ({"minibatches": 2048}, ["--minibatches", "one sample"]),
        ],
    )
    + with_scripts(
        ["sac_bn"],
        [
            ({"log_std_min": 3.0}, ["--log-std-min", "--log-std-max"]),
            (
                {"norm": "batchnorm", "norm_net": "actor", "bn_target": "train"},
                ["--bn-target", "--norm-net actor"],
            ),
        ],
    ),
    ids=str,
)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    script, options, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("no mistake on this machine")
    options = {"env": "Pendulum-v1"} | options
    with pytest.raises(SystemExit) as end:
        module.train(module.Args(**options))
    assert end.value.code == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_values_out_of_range(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    tried = set()
    for low, high, names in module.LIMITS:
        for name, value in itertools.product(names.split(), (low - 1, high + 1, float("nan"))):
            if low <= value <= high:
                continue  # there is no value above infinity
            default = getattr(module.Args(), name)
            value = (16, value) if isinstance(default, tuple) else value
            with pytest.raises(SystemExit) as end:
                module.train(module.Args(**{name: value}))
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert end.value.code == 2 and line.split()[1] == f"--{name.replace('_', '-')}", line
            tried.add(name)
    kinds = int, float, tuple, type(None)
    numbers = {k for k, v in vars(module.Args()).items() if type(v) in kinds}
    assert tried == numbers - {"norm_position", "action_layer"}, numbers ^ tried
    with pytest.raises(SystemExit):
        module.train(module.Args(hidden_sizes=()))
    assert "--hidden-sizes needs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_papers_critic_needs_two_layers(capsys):
    with pytest.raises(SystemExit):
        ddpg_bn.train(ddpg_bn.Args(hidden_sizes=(16,), action_layer=1))
    assert "--action-layer 1 needs two --hidden-sizes" in capsys.readouterr().err


def test_a_mistake_on_the_command_line_has_no_traceback(tmp_path):
    """As a user sees it; test_mistakes.py makes many more."""
    code, out, err = run(ROOT / "ddpg_bn.py", "--norm zfilter --norm-position pre", tmp_path)
    assert (code, out) == (2, "") and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert err.startswith("ddpg_bn.py: --norm-position")


def test_a_run_dir_is_never_overwritten(small, capsys):
    args = small(ddpg_bn, total_steps=120)
    ddpg_bn.train(args)
    with pytest.raises(SystemExit):
        ddpg_bn.train(args)
    assert "exists" in capsys.readouterr().err


def test_a_link_to_nowhere_is_no_folder_for_runs(small, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("nowhere")
    with pytest.raises(SystemExit):
        ddpg_bn.make_run_dir(small(ddpg_bn, run_dir=""))
    assert "cannot be made" in capsys.readouterr().err


def test_runs_of_the_same_second_do_not_collide(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    args = small(ddpg_bn, run_dir="", norm="batchnorm", norm_position=("input", "pre"))
    names = [ddpg_bn.make_run_dir(args) for _ in range(3)]
    assert len(set(names)) == 3 and all(name.is_dir() for name in names)
    name = "batchnorm-norm_position=input+pre-seed1-20260101-000000"
    assert names[0] == Path("runs/Pendulum-v1/ddpg_bn") / name
    args.norm_position, args.bn_momentum = (), 0.0  # zero is a choice too
    assert ddpg_bn.make_run_dir(args).name == "batchnorm-bn_momentum=0.0-seed1-20260101-000000"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_main_job_reaches_updates(script, tmp_path):
    options = "--norm batchnorm --env Ant-v4 --total-steps 600"
    options += " --learning-starts 500" if script in OFF_POLICY else " --num-envs 4"
    options += " --num-steps 60 --minibatches 8 --epochs 2" if script == "ppo_bn" else ""
    code, out, err = run(ROOT / f"{script}.py", f"{options} --eval-episodes 1", tmp_path)
    assert code == 0, err
    lines = out.strip().splitlines()
    run_dir = lines[0].removeprefix("run: ")
    assert run_dir.startswith(f"runs/Ant-v4/{script}/batchnorm-seed1-")
    assert re.match(r"final evaluation at step \d+: return ", lines[-3])
    assert lines[-2:] == [f"files: {run_dir}", f"look:  tensorboard --logdir {run_dir}"]
    files = {path.name.split(".")[0] for path in (tmp_path / run_dir).iterdir()}
    assert files == {"args", "checkpoint", "events", "obs_stats", "result"}
    result = json.loads((tmp_path / run_dir / "result.json").read_text())
    updates = {"ddpg_bn": 100, "sac_bn": 100, "ppo_bn": 48}
    assert result["updates"] == updates.get(script, result["updates"]) >= 21
    assert result["steps"] == {"ppo_bn": 720}.get(script, result["steps"]) >= 600


# ---------------------------------------------------------------------- Stop, resume, go on


def test_resume_extends_and_evaluates_again(small, capsys):
    short = small(ddpg_bn, total_steps=600, norm="batchnorm", eval_every=200)
    first = ddpg_bn.train(short)
    again = small(ddpg_bn, total_steps=600, norm="batchnorm", eval_every=200)
    again.run_dir, again.resume = short.run_dir, short.run_dir
    assert ddpg_bn.train(again)["eval"] == first["eval"]  # saved, loaded, evaluated: to the bit
    again.total_steps = 800  # Pendulum's episodes end at 600 too
    extended = ddpg_bn.train(again)
    whole = small(ddpg_bn, total_steps=800, norm="batchnorm", eval_every=200)
    assert ddpg_bn.train(whole)["eval"] == extended["eval"]
    a, b = checkpoint(short.run_dir), checkpoint(whole.run_dir)
    assert same(a["critic"], b["critic"]) and same(a["actor_optimizer"], b["actor_optimizer"])
    again.total_steps = 700
    with pytest.raises(SystemExit):
        ddpg_bn.train(again)
    assert "--total-steps 700 is less than the run's 800" in capsys.readouterr().err
    assert json.loads(Path(short.run_dir, "result.json").read_text())["steps"] == 800
    again.total_steps, again.critic_lr = 800, 0.5
    capsys.readouterr()
    with pytest.raises(SystemExit):
        ddpg_bn.train(again)
    assert "--critic-lr cannot change" in capsys.readouterr().err


def test_where_nothing_may_be_looked_at_no_folder_is_made(small, capsys, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.chdir(tmp_path)
    for name in ("mkdir", "stat", "is_dir"):  # what pathlib says of runs/ that another user owns
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(SystemExit):
        ddpg_bn.make_run_dir(small(ddpg_bn, run_dir=""))
    assert "cannot be made (Permission denied)" in capsys.readouterr().err


def test_a_read_only_disk_ends_in_one_line(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # even of what is not there
    with pytest.raises(SystemExit, match=r"args\.json is not written.*Read-only file system"):
        ddpg_bn.write(tmp_path / "args.json", None)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A file may not grow beyond 20 kB, which stops torch's own writer in the middle."""
    path = tmp_path / "checkpoint.pt"
    code = f"""
import pathlib, resource, sys
import torch
sys.path.insert(0, {str(ROOT)!r})
import ddpg_bn
path = pathlib.Path({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
ddpg_bn.write(path, lambda file: torch.save(torch.zeros(10), file))
ddpg_bn.write(path, lambda file: torch.save(torch.ones(10_000), file))
"""
    command, env = [sys.executable, "-c", code], unmeasured()
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{path} is not written")
    assert torch.equal(torch.load(path), torch.zeros(10))
    assert [x.name for x in tmp_path.iterdir()] == ["checkpoint.pt"]


INTERRUPTS = dict.fromkeys(SCRIPTS, signal.SIGINT) | {"sac_bn": signal.SIGTERM}


@pytest.mark.parametrize("script, number", INTERRUPTS.items())
def test_ctrl_c_saves_and_says_how_to_go_on(script, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = f"{TINY[script]} --total-steps 1500 --run-dir"
    process = run(ROOT / f"{script}.py", f"{options} stopped", tmp_path, wait=False)
    deadline = time.time() + 120
    while not list(tmp_path.glob("stopped/events*")):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert "again to stop at once" in err
    step = int(re.search(r"stopped at step (\d+): --resume stopped goes on", out)[1])
    assert 0 < step < 1500 and not Path("stopped/result.json").exists()
    code, out, err = run(ROOT / f"{script}.py", "--resume stopped", tmp_path)
    assert code == 0 and "final evaluation" in out, err
    result = json.loads(Path("stopped/result.json").read_text())
    assert result["steps"] >= 1500
    if script == "ddpg_bn":  # it stopped where an episode ended
        whole = train(script, f"{options} whole")
        assert [list(point) for point in whole["eval"]] == result["eval"]
        assert same(checkpoint("whole"), checkpoint("stopped"))


# --------------------------------------------------------------------- The strip property


def strip(text):
    """Do what the sed line of the README does."""
    command = ["sed", "/# NORM begin/,/# NORM end/d; /# NORM/d"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


TRACES = r"\bnorm\b|\bnorm_|[Nn]ormaliz|NORM|BatchNorm|LayerNorm|Renorm|zfilter|ZFilter"
TRACES += r"|reward_norm|[Rr]eward_?[Ss]cale|reward_stat|moment|recalibrat|first_ratio"
TRACES += (
    r"|RunningStat|obs_filter|obs_stat|running_|\.eval\(\)|\.train\(|\.buffers\(\)|\bbn_|statistic"
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_stripped_script_is_plain_and_complete(script, tmp_path):
    path = tmp_path / f"{script.removesuffix('_bn')}.py"
    path.write_text(strip((ROOT / f"{script}.py").read_text()))
    plain = path.read_text()
    assert not re.findall(rf".*(?:{TRACES}).*", plain)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "100"]
    ruff = subprocess.run([*ruff, "--select", "E,F,W,B,UP,RUF", path], capture_output=True)
    assert ruff.returncode == 0, ruff.stdout
    options = f"{TINY[script]} --total-steps 500 --run-dir"
    empty = tmp_path / "empty"
    empty.mkdir()
    path = path.rename(empty / path.name)
    code, _, err = run(path, f"{options} {tmp_path}/plain", empty)
    assert code == 0, err
    whole = train(script, f"{options} {tmp_path}/none --norm none")
    a, b = checkpoint(tmp_path / "plain"), checkpoint(tmp_path / "none")
    statistics = {"obs_stat", "obs_filter"} | ({"reward_stat"} if script in ON_POLICY else set())
    assert b.keys() - a.keys() == statistics
    assert same(a, {key: b[key] for key in a})
    plain = json.loads((tmp_path / "plain/result.json").read_text())
    assert plain["eval"] == [list(x) for x in whole["eval"]]
    updates = {"ddpg_bn": 400, "sac_bn": 400, "ppo_bn": 5 * 10 * 4}
    assert plain["updates"] == updates.get(script, whole["updates"]) > 50


KINDS = "flag", "obs", "reward", "layer", "mode", "batch", "target", "report", "save"


@pytest.mark.parametrize("script", SCRIPTS)
def test_markers_have_the_agreed_form(script):
    for number, line in enumerate((ROOT / f"{script}.py").read_text().splitlines(), 1):
        if "NORM" in line and line.strip() != "# NORM end":
            match = re.search(r"# NORM (begin: )?(\w+): \S+", line)
            assert match and match[2] in KINDS, (number, line)


def test_the_readme_explains_each_kind_of_marker():
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)` \| [^|]+ \|$", readme, re.MULTILINE) == list(KINDS)


def test_the_function_that_the_readme_shows_stands_in_the_script():
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown.startswith("def actor_loss") and shown in (ROOT / "ddpg_bn.py").read_text()


@pytest.mark.parametrize("name", ["README.md", "study/FINDINGS.md", "study/CLAIMS.md"])
def test_links_lead_somewhere(name):
    def anchors(file):  # as GitHub makes them of headings
        heads = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}

    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\(([^)]+)\)", " ".join(text.split())):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            path = (ROOT / name).parent / file if file else ROOT / name
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link
