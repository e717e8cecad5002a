"""The README and the pages behind it: short, alive, true of the scripts; their commands run."""

import ast
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, unmeasured

import ddpg_bn

README = (ROOT / "README.md").read_text()
PAGES = {file: file.read_text() for file in (ROOT / "README.md", *ROOT.glob("study/*.md"))}
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^(?:.*&& )?python (\w+_bn\.py [^#>\n]*)", README, re.MULTILINE)
COMMANDS += re.findall(r"`python (\w+_bn\.py\s[^`]+)`", README)  # within a sentence


def test_it_is_short():
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 14 * 1024
    assert README.count("![") <= 4
    assert len(re.findall(r"^\|[ |:-]+\|$", README, re.MULTILINE)) <= 5
    assert len((ROOT / "study/FINDINGS.md").read_text().splitlines()) < 300


def test_the_first_two_commands_are_one_line_each_and_ci_runs_the_second_as_it_stands():
    (_, job), (_, tests) = [block for block in BLOCKS if block[0] == "bash"][:2]
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert job == f"{install}python ddpg_bn.py --norm batchnorm --env Ant-v4\n"
    assert tests == f"{install}python -m pytest -q\n"
    (awk,) = re.findall(r"^awk '(.*)' README.md", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert subprocess.check_output(["awk", awk, ROOT / "README.md"], text=True) == tests


def test_the_listing_is_cut_from_the_script():
    (listing,) = [text for language, text in BLOCKS if language == "python"]
    assert len(listing.splitlines()) <= 25 and ast.parse(listing)
    script = iter(line.strip() for line in (ROOT / "ddpg_bn.py").read_text().splitlines())
    for line in map(str.strip, listing.splitlines()):
        name = re.fullmatch(r"# (\w+): .+", line)
        wanted = f"def {name[1]}(" if name else line
        assert any(x.startswith(wanted) if name else x == wanted for x in script), line


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_are_alive(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), link
            assert not anchor or anchor in anchors(file.read_text()), link


def test_a_policy_is_used_elsewhere_as_shown(small, monkeypatch):
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "study/USE.md").read_text(), re.DOTALL)
    run = ddpg_bn.train(small(ddpg_bn, norm="zfilter", total_steps=150))["run_dir"]
    exec(shown.replace("RUN", run), {})


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path):
    words = shlex.split(re.sub(r"--(total-steps|eval-every) \d+", "", command))
    words += ["--eval-every", "0", "--eval-episodes", "1", "--run-dir", str(tmp_path / "run")]
    short = "60 --learning-starts 50" if words[0][:4] in ("ddpg", "sac_") else "4096"
    words += ["--total-steps", *short.split()]
    subprocess.run([sys.executable, *words], cwd=ROOT, env=unmeasured(), check=True)
