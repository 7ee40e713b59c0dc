"""The host path of a step does not grow: instructions are counted, for clocks on shared machines are too noisy.

instructions.json holds the accepted count for each build of Python and torch. A count above it by more than LIMIT
fails; a smaller one, or one of a new build, is written there by hand, from what this test prints.
"""

import json
from pathlib import Path

import pytest

from growkit.bench import instructions

STORED = Path(__file__).with_name("instructions.json")
LIMIT = 1.01  # repeated counts differ by 1e-4


def test_step_takes_no_more_instructions_than_stored(monkeypatch):
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # or tracing is counted, too
    if why_not := instructions.why_not():
        pytest.skip(f"not counted: {why_not}")
    counted = instructions.count()
    stored, key = json.loads(STORED.read_text()), instructions.key()
    print(f"{key}: {counted}")
    if key not in stored:
        pytest.skip(f"new, nothing to compare: {key}: {counted} instructions")
    assert counted <= LIMIT * stored[key], f"{counted} instructions, {counted / stored[key]:.3f} of the stored count"
