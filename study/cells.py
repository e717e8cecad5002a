"""What is run: the cells of claims.toml, the command of each of their runs, its file of results."""

import dataclasses
import importlib
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import tyro

ROOT = Path(__file__).parent.parent
CLAIMS = ROOT / "study" / "claims.toml"
RESULTS = ROOT / "study" / "results"
RUNS = Path("runs", "study")  # as seen from ROOT
STATISTICS = "obs_stats.npz"
NUMBER = r"-?\d+(\.\d+)?"  # on the right of a rule
NEEDED = r"\{(.+?)\}"  # in the options of a cell: another one, whose statistics it uses
PLACE = "run_dir", "resume", "device", "norm_stats"  # where files lie, and on what a run is made


class Cell(NamedTuple):
    """Runs of one command that differ in environment and seed only."""

    name: str
    family: str
    script: str  # module
    envs: tuple[str, ...]
    steps: int
    seeds: tuple[int, ...]
    options: str  # {name}: obs_stats.npz of the run of that cell of the family, same env and seed

    def program(self):
        """Return what Python runs."""
        return ["-m", self.script] if "." in self.script else [f"{self.script}.py"]

    def within(self, *envs):
        """Return the cell, of these environments only."""
        return self._replace(envs=tuple(env for env in self.envs if env in envs))

    def runs(self):
        return [Run(self, env, seed) for env in self.envs for seed in self.seeds]

    def needs(self):
        """Return the names of the cells whose statistics this one uses."""
        return [f"{self.family}-{name}" for name in re.findall(NEEDED, self.options)]


class Run(NamedTuple):
    cell: Cell
    env: str
    seed: int

    def path(self):
        """Return <cell>/<env without namespace>-seed<k>, in the folders of runs and of results."""
        return Path(self.cell.name, re.sub(r".*[:/]", "", self.env) + f"-seed{self.seed}")

    def words(self, folder=RUNS):
        """Return the options of the command, as a shell would split them."""

        def statistics(match):
            return str(folder / f"{self.cell.family}-{match[1]}" / self.path().name / STATISTICS)

        words = [re.sub(NEEDED, statistics, x) for x in shlex.split(self.cell.options)]
        words += ["--env", self.env, "--seed", str(self.seed)]
        return [*words, "--total-steps", str(self.cell.steps)]


class Rule(NamedTuple):
    left: str
    relation: str
    factor: float  # on the right
    right: str  # a cell, or a number
    envs: tuple[str, ...]  # none: all
    metrics: tuple[str, ...]  # of the left, and of the right if that is another; none: the claim's


def parse(rule):
    """Return a Rule from its words."""
    words, _, metrics = rule.partition(" by ")
    left, relation, right, *where = words.split()
    *factor, right = right.split("*")
    return Rule(
        left,
        relation,
        float(factor[0]) if factor else 1.0,
        right,
        tuple(where[1:]),
        tuple(metrics.split(", ")) if metrics else (),
    )


def every_rule(claim):
    """Return the words of all its rules."""
    return claim["compare"] + claim.get("also", [])


def load(file=CLAIMS):
    """Return ({id: claim}, {name: Cell}) of a file of claims; ValueError if it is inconsistent."""
    data = tomllib.loads(Path(file).read_text())
    cells = {}
    for family, changes in data["family"].items():
        about = data.get("default", {}) | changes
        prefix = about.get("prefix", family)
        script = about.get("script", f"{family.split('-')[0]}_bn")
        envs, seeds = tuple(about["envs"]), tuple(range(1, about["seeds"] + 1))
        for name, options in about.get("cells", {"": ""}).items():
            cell = "-".join(filter(None, (prefix, name)))
            options = f"{about['options']} {options}".strip()
            cells[cell] = Cell(cell, prefix, script, envs, about["steps"], seeds, options)
    claims = data.get("claim", {})
    rules = [rule for claim in claims.values() for rule in map(parse, every_rule(claim))]
    asked = {x for rule in rules for x in (rule.left, rule.right) if not re.fullmatch(NUMBER, x)}
    asked |= {x for cell in cells.values() for x in cell.needs()}
    if unknown := sorted(asked - cells.keys()):
        raise ValueError(f"no cell is called {' or '.join(unknown)}")
    return claims, cells


def cells_of(claim, cells):
    """Return {name: Cell} of what a claim compares, within the environments that its rules name."""
    envs = {}
    for rule in map(parse, every_rule(claim)):
        for name in (x for x in (rule.left, rule.right) if x in cells):
            envs.setdefault(name, set()).update(rule.envs or cells[name].envs)
    return {name: cells[name].within(*envs[name]) for name in envs}


def ask_finished(folders):
    """End the program, in one line, if one of these folders holds no finished run."""
    for folder in folders:
        if not (folder / "result.json").exists():
            sys.exit(
                f"{folder} holds no finished run: `python -m study.run CELL` makes those of a cell"
            )


def plain(args):
    """Return the options of a script as args.json holds them."""
    return json.loads(json.dumps(dataclasses.asdict(args)))


def saved_options(about, script):
    """Return the options in an args.json, those that it lacks at their defaults.

    script: name of the module. Those that the script has no longer are left out.
    """
    default = plain(importlib.import_module(script).Args())
    return default | {name: value for name, value in about["args"].items() if name in default}


def fits(about, run):
    """Return whether an args.json is of this run: all its options, but for PLACE."""
    script = importlib.import_module(run.cell.script)
    asked = plain(tyro.cli(script.Args, args=run.words()))
    made = saved_options(about, run.cell.script)
    return all(made[name] == value for name, value in asked.items() if name not in PLACE)
