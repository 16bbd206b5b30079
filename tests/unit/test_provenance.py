"""What run.json says of the code."""

import pytest

from mixflow.runtime import provenance


@pytest.mark.parametrize(
    ("written", "commit", "dirty"), [("a" * 40, "a" * 40, False), ("b" * 40 + "-dirty", "b" * 40, True)]
)
def test_an_image_says_what_it_was_built_from(tmp_path, monkeypatch, written, commit, dirty):
    folder = tmp_path / "mixflow/runtime"
    folder.mkdir(parents=True)
    (tmp_path / "COMMIT").write_text(written + "\n")
    monkeypatch.setattr(provenance, "__file__", str(folder / "provenance.py"))
    code = provenance.code_version()
    assert (code["commit"], code["dirty"]) == (commit, dirty)
