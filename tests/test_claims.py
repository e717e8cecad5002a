"""The claims under study say what they run, and what they run exists."""

import csv
import importlib
import re
import shlex

import pytest
import tyro

from study.cells import BY_HAND, RESULTS, load, plain

CLAIMS, CELLS = load()


def test_every_claim_says_all_that_a_verdict_needs():
    names = [f"F{k}" for k in range(1, 7)] + [f"Z{k}" for k in range(1, 11) if k != 8]
    assert list(CLAIMS) == names + [f"B{k}" for k in range(1, 22)]
    for claim in CLAIMS.values():
        assert {"source", "says", "metric", "compare"} <= claim.keys()
        assert re.fullmatch(r"\w+/\w+ (last \d+|mean)", claim["metric"])


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_what_is_compared_is_run(claim):
    for rule in claim["compare"] + claim.get("also", []):
        if rule.startswith("order of onset: "):
            continue
        left, relation, right, *where = rule.split()
        assert relation in ("<", "<=", "=", ">=", ">", "same") and left in CELLS, rule
        assert right in CELLS or re.fullmatch(r"-?\d+(\.\d+)?", right), rule
        envs = set(where[1:] or CELLS[left].envs)
        assert where[:1] in ([], ["in"]) and envs <= set(CELLS[left].envs), rule
        assert right not in CELLS or envs <= set(CELLS[right].envs), rule


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_the_options_of_a_cell_make_sense(cell):
    assert all(CELLS[need].envs == cell.envs for need in cell.needs())
    tyro.cli(importlib.import_module(cell.script).Args, args=cell.runs()[0].words())


def test_every_result_is_of_a_cell():
    runs = [run for cell in CELLS.values() for run in cell.runs()]
    files = {str(file.relative_to(RESULTS)) for file in RESULTS.glob("*/*")}
    assert files <= {f"{run.path()}.csv" for run in runs}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_results_were_made_with_the_options_of_their_cell(cell):
    script = importlib.import_module(cell.script)
    for run in cell.runs():
        file = RESULTS / f"{run.path()}.csv"
        if file.exists():
            row = next(csv.DictReader(file.read_text().splitlines()))
            assert (row["cell"], row["env"], row["seed"]) == (cell.name, run.env, str(run.seed))
            words = shlex.split(row["options"]), shlex.split(cell.options)
            made, asked = (plain(tyro.cli(script.Args, args=x)) for x in words)
            made, asked = ({k: v for k, v in x.items() if k not in BY_HAND} for x in (made, asked))
            assert made == asked | {"total_steps": cell.steps}
