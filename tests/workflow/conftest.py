"""Shared by the tests of the pipeline."""

import pytest

from tests.workflow.house import House, build


@pytest.fixture(scope="session")
def house(tmp_path_factory) -> House:
    """A finished run. Tests that change anything take a copy of it."""
    house = build(tmp_path_factory.mktemp("house") / "clone")
    result = house.snakemake()
    assert result.returncode == 0, result.stderr[-3000:]
    assert house.left() == {}
    return house
