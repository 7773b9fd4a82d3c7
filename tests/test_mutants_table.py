"""The table of tests/mutants.py stays one that can be planted."""

import pytest

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
