"""What every benchmark has: `--json`, and a `--help` with an example."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", minversion="5.5")
testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from benchmarks.__main__ import PROGRAMS, app  # noqa: E402


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_has_an_example_and_json(name: str) -> None:
    done = testing.CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert f"Example: python -m benchmarks {name}" in done.output
    assert "--json" in done.output
