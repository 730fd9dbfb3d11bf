"""The table of mutations follows the sources."""

import ast
import shutil

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
    for test in {test for mutation in MUTATIONS for test in mutation.tests}:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test


def test_names_are_unique():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
