"""What is the same in the scripts is the same to the byte, and the scripts stay small."""

import ast
import re
from itertools import combinations

import pytest
from conftest import ROOT, SCRIPTS

TEXTS = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}

# What two scripts may define differently under one name.
ALGORITHM = {"Args", "make_net", "Actor", "Critic", "update", "act", "make_agent", "train"}
ALGORITHM |= {"check_options"}
ACROSS = ALGORITHM | {"gradient_step", "evaluate"}
ACROSS |= {"make_env", "load_policy", "add_norm"}
IMAGES = {"norm_layer", "add_norm"}  # of REINFORCE, which knows convolutions
ON_POLICY = {"make_batch", "policy_loss", "as_input", "explore", "state_value"}
DIFFER = {pair: ACROSS | IMAGES for pair in combinations(SCRIPTS, 2)}
DIFFER["reinforce_bn", "ppo_bn"] = ALGORITHM | IMAGES | ON_POLICY | {"make_env"}
DIFFER["ppo_bn", "ddpg_bn"] = DIFFER["ppo_bn", "sac_bn"] = ACROSS
DIFFER["ddpg_bn", "sac_bn"] = ALGORITHM | {"critic_loss", "actor_loss", "q_errors"}

# Lines, kilobytes, lines stripped, where train ends, lines of its longest loop: these only fall.
LIMITS = {
    "reinforce_bn": (675, 35.8, 505, 406, 50),
    "ppo_bn": (648, 34.2, 515, 418, 50),
    "ddpg_bn": (706, 37.1, 486, 426, 50),
    "sac_bn": (751, 40, 517, 467, 50),
}


def parts(name):
    """Return the source of each function and class."""
    lines, found = TEXTS[name].splitlines(), {}
    for node in ast.parse(TEXTS[name]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min(x.lineno for x in (node, *node.decorator_list))
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("pair", DIFFER, ids=" ".join)
def test_what_two_scripts_share_is_the_same(pair):
    ours, theirs = map(parts, pair)
    differ = {x for x in ours.keys() & theirs.keys() if ours[x] != theirs[x]}
    assert differ - DIFFER[pair] == set()
    assert {"Run", "write", "BatchRenorm"} <= ours.keys() & theirs.keys()


def test_the_scripts_end_in_the_same_lines_and_have_the_same_banners():
    ends = {text[text.index("\nif __name__ == ") :] for text in TEXTS.values()}
    banners = [re.findall(r"^# -{9,}.*", text, re.M) for text in TEXTS.values()]
    assert len(ends) == 1 and all(found == banners[0] for found in banners)
    assert len(banners[0]) == 8


def stripped(text):
    """Return the lines that the command of the docstring leaves."""
    text = re.sub(r".*NORM begin(.|\n)*?NORM end.*\n", "", text)
    return [line for line in text.splitlines() if "# NORM" not in line]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_grows(name):
    (train,) = (x for x in ast.parse(TEXTS[name]).body if getattr(x, "name", "") == "train")
    found = [x for x in ast.walk(train) if isinstance(x, ast.For | ast.While)]
    loops = [loop.end_lineno - loop.lineno + 1 for loop in found]
    sizes = len(TEXTS[name].splitlines()), len(TEXTS[name].encode()) / 1000
    sizes += len(stripped(TEXTS[name])), train.end_lineno, max(loops)
    assert all(x <= limit for x, limit in zip(sizes, LIMITS[name], strict=True)), sizes
