"""Run what is missing in study/results, and nothing else: python -m study.run [CLAIM or CELL ...]

Without --address Ray is started on this machine, seen by nobody else; with it the runs go to a
cluster: `ray start --head` on one machine, `ray start --address=HEAD:6379` on the others, all with
this repository at the same path and the same Python packages (Linux or macOS).

Each run takes one CPU and one thread, and leaves runs/study/<cell>/<env>-seed<k>/, what it printed
beside it in a .log, and at its end study/results/<cell>/<env>-seed<k>.csv. A run is done if, and
only if, that file exists: so the results of several machines are merged by copying files. What is
in study/results/earlier, made by earlier commits, is made anew, unless its folder in runs/study is
still there and finished: remove it. A run that was stopped or killed, or whose machine went away,
is continued from its checkpoint (anew if the machines do not share the disk of the run folders).
One that diverges is a result.
"""

import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from study import cells, collect

TRIES = 10  # of a run that is killed
QUIET = 600  # seconds between two words about progress where there is no terminal
COST = {"reinforce_bn": 0.2, "ppo_bn": 1.0, "ddpg_bn": 8.0, "sac_bn": 16.0}  # of a step, roughly
COST["study.prioritized"] = 9.0


@dataclass
class Args:
    names: Positional[tuple[str, ...]] = ()  # ids of claims, or names of cells; none: all
    address: str = ""  # HOST:PORT of a Ray cluster; none: Ray on this machine
    cpus: int | None = None  # runs at a time, without --address; none: the number of cores
    dry_run: bool = False  # print the commands of the missing runs
    file: Path = cells.CLAIMS  # the claims and their cells
    results: Path = cells.RESULTS  # what is done
    runs: Path = cells.RUNS  # folders of the runs


# --------------------------------------------------------------------------- What a machine does


def version():
    """Return the commit of the scripts, with + if they were changed since."""

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=cells.ROOT, capture_output=True, text=True
        ).stdout

    return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(
        git("status", "--porcelain", "--", "*_bn.py", "zfilter.py", "study/prioritized.py")
    )


def commits(folder):
    """Return the file beside a run's folder that names the commit of each of its starts."""
    return folder.with_name(f"{folder.name}.commits")


def command(run, folder, runs):
    """Return the command that begins a run, or continues it; note the commit."""
    script = [sys.executable, *run.cell.program()]
    resumes = (folder / "checkpoint.pt").exists()
    with open(commits(folder), "a" if resumes else "w") as file:
        file.write(f"{version()}\n")
    if resumes:
        return [*script, "--resume", str(folder), "--device", "cpu"]
    shutil.rmtree(folder, ignore_errors=True)
    return [*script, *run.words(runs), "--run-dir", str(folder), "--device", "cpu"]


def execute(words, log, report):
    """Run a command, its output in an open file; return its exit code and what it printed."""
    start = log.seek(0, os.SEEK_END)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    try:
        while child.poll() is None:
            time.sleep(0.5)
            log.seek(start)
            steps = re.findall(r"^step (\d+):", log.read(), re.MULTILINE)
            if steps:
                report(int(steps[-1]))
    finally:  # if the task is cancelled, the script ends, too
        child.terminate()
        child.wait()
    log.seek(start)
    return child.returncode, log.read().strip()


def finish(run, folder, runs, log, report):
    """Bring a run to its end, however often it is killed; RuntimeError if it is a mistake."""
    for tries in itertools.count():
        if (folder / "result.json").exists():
            return
        if tries == TRIES:
            raise RuntimeError(f"{run.path()} was killed {TRIES} times, see {log.name}")
        words = command(run, folder, runs)
        report(None if "--resume" in words else 0)
        code, text = execute(words, log, report)
        if code == 2 or (code == 1 and "stopped: " not in text):
            line = text.split("\n")[-1]
            raise RuntimeError(f"{run.path()} ended with exit code {code}, see {log.name}: {line}")


def work(run, runs, board, paths, *contents):
    """Make a run, or go on with it; return its rows, and its obs_stats.npz (None if it diverged).

    paths and contents: the obs_stats.npz of the runs that it needs; no rows if one of these
    diverged. The log is locked by this task and by the script that inherits it: no two scripts
    ever share a folder.
    """
    if None in contents:
        return [], None
    os.chdir(cells.ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray cancels by it: never ignore it
    folder = runs / run.path()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a+") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        for path, content in zip(paths, contents, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        about = folder / "args.json"
        if about.exists() and not cells.fits(json.loads(about.read_text()), run):
            raise RuntimeError(f"{folder} holds a run with other options: remove it")
        finish(run, folder, runs, log, lambda step: board.show.remote(run, step))
        started = dict.fromkeys(commits(folder).read_text().split())
        table = collect.rows(run, folder, " ".join(started))
    return table, None if table[-1]["diverged"] else (folder / cells.STATISTICS).read_bytes()


class Board:
    """Knows the step of each run that was begun; None if it was resumed and has said nothing."""

    def __init__(self):
        self.steps = {}

    def show(self, run, step):
        self.steps[run] = step

    def look(self):
        return self.steps


# ------------------------------------------------------------------------- What one driver does


def clock(seconds):
    """Return a time in words."""
    minutes = round(seconds / 60)
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"{hours}{minutes % 60} min" if minutes else f"{seconds:.0f} s"


class Screen:
    """Says how far all runs and each of them are: in place on a terminal, else now and then."""

    def __init__(self, runs):
        self.start, self.first, self.lines = time.time(), {}, 0
        self.drawn = self.start
        self.left = dict.fromkeys(runs)  # that are not done
        self.total, self.gone = len(runs), 0.0  # gone: cost of what was done since the start

    def cost(self, run):
        """Return what a run costs from where it was first seen."""
        return (run.cell.steps - self.first.get(run, (0, 0))[1]) * COST[run.cell.script]

    def draw(self, steps):
        """Draw the runs that are under way, at these steps."""
        now, lines, gone = time.time(), [], self.gone
        for run, step in steps.items():
            if run not in self.left:
                continue
            line = f"  {run.path()}"
            if step is not None:
                if run not in self.first or step < self.first[run][1]:  # or begun anew
                    self.first[run] = now, step
                since, before = self.first[run]
                gone += (step - before) * COST[run.cell.script]
                line += f"   step {step} of {run.cell.steps}"
                if step > before:
                    left = (now - since) * (run.cell.steps - step) / (step - before)
                    line += f", {clock(left)} left"
            lines.append(line)
        whole = sum(map(self.cost, self.left)) + self.gone
        left = f", {clock((now - self.start) * (whole - gone) / gone)} left" if gone else ""
        lines.insert(0, f"{self.total - len(self.left)} of {self.total} runs{left}")
        if sys.stdout.isatty():
            self.clear()
            self.lines = len(lines)
        elif now < self.drawn + QUIET:
            return
        print("\n".join(lines), flush=True)
        self.drawn = now

    def clear(self):
        print(f"\033[{self.lines}F\033[J" * bool(self.lines), end="")
        self.lines = 0

    def done(self, run, words, steps):
        """Say that a run is done, and what came of it."""
        self.left.pop(run)
        self.gone += self.cost(run)
        self.clear()
        print(f"{run.path()}: {words}", flush=True)
        self.drawn = 0
        self.draw(steps)


def choose(args):
    """Return the runs that are to be made, and all cells."""
    try:
        claims, known = cells.load(args.file)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"--file {args.file} holds no claims and cells ({error!r})")
    chosen = []
    for name in args.names or known:
        if name in claims:
            chosen += cells.cells_of(claims[name], known).values()
        elif name in known:
            chosen.append(known[name])
        else:
            sys.exit(f"{name} is no claim ({', '.join(claims)}) and no cell of {args.file}")
    # family by family as in the file, seed by seed, so that comparisons fill evenly
    order = list(dict.fromkeys(cell.family for cell in known.values()))
    every = [run for cell in chosen for run in cell.runs()]
    every.sort(key=lambda x: (order.index(x.cell.family), x.seed, x.cell.envs.index(x.env)))
    runs = {str(run.path()): run._replace(cell=known[run.cell.name]) for run in every}
    return [run for name, run in runs.items() if not (args.results / f"{name}.csv").exists()], known


def main(args):
    if args.cpus is not None and args.cpus < 1:
        sys.exit(f"--cpus {args.cpus} makes no runs: use 1 or more")
    todo, known = choose(args)
    if args.dry_run:
        for run in todo:
            print(shlex.join(["python", *run.cell.program(), *run.words(args.runs)]))
    if args.dry_run or not todo:
        return print(f"{len(todo)} runs are missing")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    if not args.address:  # the name is Ray's; the effect, that it listens on localhost only
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    try:
        import ray
    except ImportError:
        sys.exit("Ray is not installed: pip install -r study/requirements.txt")
    options = {"log_to_driver": False, "logging_level": "error"}
    if args.address:
        try:
            host, port = args.address.rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray waits for minutes
        except (OSError, ValueError) as error:
            sys.exit(f"--address {args.address}: give HOST:PORT of a cluster that runs ({error})")
        ray.init(args.address, **options)
    else:
        ray.init("local", num_cpus=args.cpus, include_dashboard=False, **options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    board = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
    task = ray.remote(num_cpus=1, num_returns=2, max_retries=TRIES)(work)
    refs = {}

    def submit(run):
        """Start a run after those it needs; return references to its rows and statistics."""
        if run not in refs:
            needs = [cells.Run(known[name], run.env, run.seed) for name in run.cell.needs()]
            paths = [args.runs / other.path() / cells.STATISTICS for other in needs]
            contents = [submit(other)[1] for other in needs]
            refs[run] = task.remote(run, args.runs, board, paths, *contents)
        return refs[run]

    for run in todo:
        submit(run)
    waiting = {rows: run for run, (rows, _) in refs.items()}
    screen = Screen(refs)
    try:
        while waiting:
            for rows in ray.wait(list(waiting), timeout=1)[0]:
                run, table = waiting.pop(rows), ray.get(rows)
                file = args.results / f"{run.path()}.csv"
                words = "not run, the one whose statistics it needs diverged"
                if table:
                    words = f"return {table[-1].get('eval/return', 'unknown')}"
                    words += ", diverged" * table[-1]["diverged"]
                if table and not file.exists():  # made again for its statistics: as it was
                    collect.write(file, table)
                screen.done(run, words, ray.get(board.look.remote()))
            screen.draw(ray.get(board.look.remote()))
    except ray.exceptions.RayError as error:
        stop(ray, waiting)
        sys.exit(str(getattr(error, "cause", error)))
    except KeyboardInterrupt:
        print("stopping; the same command goes on from the checkpoints", flush=True)
        stop(ray, waiting)
        sys.exit(1)
    finally:
        ray.shutdown()


def stop(ray, waiting):
    """Cancel tasks, and wait until their scripts have ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C is final
    for rows in waiting:
        ray.cancel(rows, recursive=False)
    ray.wait(list(waiting), num_returns=len(waiting), timeout=300)


if __name__ == "__main__":
    main(tyro.cli(Args))
