"""The table of mutations follows the sources."""

import ast
import shutil
import subprocess
import sys

from tests.mutations import MUTATIONS, ROOT


def test_every_mutation_edits_the_present_source(tmp_path):
    for mutation in MUTATIONS:
        path = tmp_path / mutation.file
        path.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / mutation.file, path)
        before = mutation.apply(tmp_path)
        assert path.read_text() != before
        ast.parse(path.read_text())


def test_every_named_test_exists():
    names = sorted({test for mutation in MUTATIONS for test in mutation.tests})
    run = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", *names], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_names_are_unique():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
