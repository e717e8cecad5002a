"""Each known mistake shows its symptom, and the script as it is does not."""

import subprocess
import sys
import types

import pytest

from tests.failures import FAILURES, ROOT, broken


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.shows.__name__)
def test_a_mistake_shows_its_symptom(failure, tmp_path, monkeypatch):
    whole = (ROOT / f"{failure.script}.py").read_text()
    for name, source, expected in (("whole", whole, False), ("broken", broken(failure), True)):
        module = types.ModuleType(name)
        module.__file__ = f"{name}.py"
        exec(source, vars(module))
        monkeypatch.setitem(sys.modules, name, module)  # for its dataclass
        assert failure.shows(module, tmp_path) == expected


def test_each_is_listed_written_and_explained(tmp_path):
    def shown(*words):
        command = [sys.executable, ROOT / "tests/failures.py", *map(str, words)]
        return subprocess.check_output(command, cwd=tmp_path, text=True)

    listed, explained = shown(), shown(3, "why")
    assert all(failure.symptom in listed for failure in FAILURES)
    assert FAILURES[2].why in explained and FAILURES[2].met in explained
    assert FAILURES[2].symptom in shown(3)
    assert (tmp_path / "broken.py").read_text() == broken(FAILURES[2])
