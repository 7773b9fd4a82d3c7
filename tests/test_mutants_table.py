"""The table of tests/mutants.py stays one that can be planted, and the command tells caught faults from others."""

import sys

import pytest

from tests import mutants
from tests.helpers.mutant_table import FAULTS, Fault, problems
from tests.helpers.paths import ROOT


def test_every_fault_can_be_planted_and_names_tests_that_exist():
    assert problems(ROOT) == []


def test_there_are_enough_of_them_and_no_two_are_one():
    assert len(FAULTS) >= 60
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"file": "llada_jax/none.py"}, "no such file"),
        ({"old": "import"}, "'import' occurs 3 times, expected once"),
        ({"new": "if isinstance(error, InputError):"}, "is not changed"),
        ({"tests": ("tests/none.py",)}, "tests/none.py does not exist"),
        ({"tests": ("tests/test_errors.py::test_none",)}, "has no test test_none"),
        ({"tests": ()}, "no test is named"),
    ],
)
def test_what_cannot_be_planted_is_said(tmp_path, changes, said):
    for name, text in (
        ("llada_jax/errors.py", "import math\nimport sys\n\nimport re\nif isinstance(error, InputError):\n"),
        ("tests/test_errors.py", "def test_one():\n    pass\n"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    fault = Fault(
        "ground",
        "llada_jax/errors.py",
        "if isinstance(error, InputError):",
        "if True:",
        ("tests/test_errors.py::test_one",),
    )
    assert problems(tmp_path, (fault,)) == []
    (found,) = problems(tmp_path, (fault._replace(**changes),))
    assert found.startswith("fault 1 (llada_jax/") and said in found


PACKAGE = "import time\n\n\ndef twice(x):\n    time.sleep(0)\n    return 2 * x\n"
TEST = "from llada_jax.errors import twice\n\n\ndef test_twice():\n    assert twice(2) == 4\n"


@pytest.mark.parametrize(
    "old, new, timeout, caught, by",
    [
        ("2 * x", "3 * x", 120, True, "tests/test_errors.py::test_twice"),
        ("def twice", "def thrice", 120, True, "tests/test_errors.py"),
        ("2 * x", "2 + x", 120, False, ""),
        ("sleep(0)", "sleep(1000)", 2, True, "no end within 2 s"),
    ],
)
def test_a_fault_is_caught_or_survives_and_is_taken_out_again(tmp_path, old, new, timeout, caught, by):
    for name, text in (("llada_jax/__init__.py", ""), ("llada_jax/errors.py", PACKAGE), ("tests/test_errors.py", TEST)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    fault = Fault("ground", "llada_jax/errors.py", old, new, ("tests/test_errors.py",))
    outcome = mutants.Runner(sys.executable, timeout).run(tmp_path, fault, 0)
    assert (outcome.caught, outcome.by) == (caught, by), outcome.output
    assert (tmp_path / "llada_jax/errors.py").read_text() == PACKAGE


def test_faults_are_chosen_by_room_and_number_and_records_compared():
    sampling = [i for i, fault in enumerate(FAULTS) if fault.room == "sampling"]
    assert mutants.selected("sampling", FAULTS) == sampling
    assert mutants.selected("3,1-2,2", FAULTS) == [2, 0, 1] and len(mutants.selected("", FAULTS)) == len(FAULTS)
    for wrong in ("0", str(len(FAULTS) + 1), "nowhere"):
        with pytest.raises(ValueError, match="is neither 1 to"):
            mutants.selected(wrong, FAULTS)

    def of(**caught):
        return {"mutants": [{"file": "f", "old": old, "new": "", "caught": each} for old, each in caught.items()]}

    assert mutants.compared(of(a=True, b=True, c=False, d=True), of(a=True, b=False, c=False)) == [
        "f: b: not caught any more",
        "f: d: not run",
    ]
