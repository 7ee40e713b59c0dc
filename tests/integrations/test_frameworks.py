"""Every loop of growkit.bench.frameworks trains the model that the plain loop trains: make test-integrations.

Not part of make test, where test_examples.py has Trainer: importing frameworks on three processes takes its time.
"""

import os

import pytest

from growkit.bench import frameworks, loops

if not os.environ.get("GROWKIT_ALL_INTEGRATIONS"):
    pytest.skip("run by make test-integrations", allow_module_level=True)


def test_all_frameworks_are_here():
    assert {each.name.split()[0] for each in frameworks.LOOPS} == {
        "Hugging",
        "Accelerate",
        "Lightning,",
        "torchtitan's",
    }


@pytest.mark.parametrize("world", [1, 2])
def test_every_loop_is_the_plain_loop(world):
    cases = [(each, cls) for each in frameworks.LOOPS if world in each.processes for cls in each.classes]
    for (each, cls), results in zip(cases, loops.spawn([loops.job(*case) for case in cases], world), strict=True):
        for found in results:
            assert loops.difference(found, loops.plain(cls)) < loops.TOLERANCE, (each.name, cls)
