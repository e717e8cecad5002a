"""The claims under study say what they run, and what they run exists."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import tyro

STUDY = Path(__file__).parent.parent / "study"
CLAIMS = tomllib.loads((STUDY / "claims.toml").read_text())
FAMILIES = CLAIMS["family"]
CELLS = {
    "-".join(filter(None, (family, name))): (family, options)
    for family, about in FAMILIES.items()
    for name, options in about["cells"].items()
}


def test_every_claim_says_all_that_a_verdict_needs():
    ids = [claim["id"] for claim in CLAIMS["claim"]]
    expected = [f"F{k}" for k in range(1, 7)] + [f"Z{k}" for k in range(1, 11) if k != 8]
    assert ids == expected + [f"B{k}" for k in range(1, 8)]
    for claim in CLAIMS["claim"]:
        assert {"source", "says", "metric", "compare"} <= claim.keys()
        assert re.fullmatch(r"\w+/\w+ (last \d+|mean)", claim["metric"])


@pytest.mark.parametrize("claim", CLAIMS["claim"], ids=lambda claim: claim["id"])
def test_what_is_compared_is_run(claim):
    for rule in claim["compare"] + claim.get("also", []):
        if rule.startswith("order of onset: "):
            continue
        left, relation, right, *where = rule.split()
        assert relation in ("<", "<=", "=", ">=", ">", "same") and left in CELLS, rule
        assert right in CELLS or float(right) > 0, rule
        assert not where or (where[0] == "in" and where[1] in FAMILIES[CELLS[left][0]]["envs"])


@pytest.mark.parametrize("cell", CELLS)
def test_the_options_of_a_cell_make_sense(cell):
    family, options = CELLS[cell]
    about = FAMILIES[family]
    script = importlib.import_module(about["script"].removesuffix(".py"))
    words = shlex.split(f"{about['options']} {options}")
    words += ["--total-steps", str(about["steps"]), "--env", about["envs"][0]]
    script.check(tyro.cli(script.Args, args=words))
