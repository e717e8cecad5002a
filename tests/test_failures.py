"""Each known mistake shows its symptom, and the script as it is does not; the README lists them."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.failures import FAILURES, ROOT, broken


def module_of(source, name, folder):
    """Import source as a module of this name."""
    path = Path(folder) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.shows.__name__)
def test_a_mistake_shows_its_symptom(failure, tmp_path, monkeypatch):
    whole = (ROOT / f"{failure.script}.py").read_text()
    for name, source, expected in (("whole", whole, False), ("broken", broken(failure), True)):
        module = module_of(source, name, tmp_path)
        monkeypatch.setitem(sys.modules, name, module)  # for its dataclass
        assert failure.shows(module, tmp_path) == expected


def test_the_readme_lists_them():
    readme = " ".join((ROOT / "README.md").read_text().split())
    for failure in FAILURES:
        for words in (failure.symptom, failure.why, failure.met):
            assert words in readme, words
