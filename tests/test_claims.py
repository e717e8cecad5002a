"""The claims under study say what they run, and what they run exists."""

import csv
import importlib
import itertools
import re
import shlex

import pytest
import tyro

from study.cells import PLACE, RESULTS, every_rule, load, parse, plain
from study.collect import COLUMNS

CLAIMS, CELLS = load()
METRIC = r"(?P<a>\|?)(?P<scalar>\w+(/\w+)?) (last \d+|mean)(?P=a)|onset (?P<other>\w+/\w+)"


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_what_is_compared_is_run_and_measured(claim):
    keys = {"source", "says", "compare"}
    assert keys <= claim.keys() <= keys | {"metric", "also", "note"}
    for rule in map(parse, every_rule(claim)):
        assert rule.relation in ("<", "<=", "=", ">=", ">", "same"), rule
        sides = [set(CELLS[x].envs) for x in (rule.left, rule.right) if x in CELLS]
        assert set(rule.envs) <= set.intersection(*sides) != set(), rule
        for metric in rule.metrics or claim.get("metric", "eval/return last 5").split(", "):
            match = re.fullmatch(METRIC, metric)
            assert match and (match["scalar"] or match["other"]) in COLUMNS, metric


@pytest.mark.parametrize("folder", [RESULTS, RESULTS / "earlier"], ids=["new", "earlier"])
def test_every_result_is_of_a_cell(folder):
    runs = [run for cell in CELLS.values() for run in cell.runs()]
    files = {str(file.relative_to(folder)) for file in folder.glob("*/*.csv")}
    assert files <= {f"{run.path()}.csv" for run in runs}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_the_options_of_a_cell_make_sense_and_its_results_were_made_with_them(cell):
    script, folders = importlib.import_module(cell.script), (RESULTS, RESULTS / "earlier")
    assert all(CELLS[need].envs == cell.envs for need in cell.needs())
    tyro.cli(script.Args, args=cell.runs()[0].words())
    for run, folder in itertools.product(cell.runs(), folders):
        file = folder / f"{run.path()}.csv"
        if file.exists():
            row = next(csv.DictReader(file.read_text().splitlines()))
            assert (row["cell"], row["env"], row["seed"]) == (cell.name, run.env, str(run.seed))
            words = shlex.split(row["options"]), shlex.split(cell.options)
            made, asked = (plain(tyro.cli(script.Args, args=x)) for x in words)
            made, asked = ({k: v for k, v in x.items() if k not in PLACE} for x in (made, asked))
            assert made == asked | {"total_steps": cell.steps}
