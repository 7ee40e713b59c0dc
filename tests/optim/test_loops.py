"""Every loop of growkit.bench.loops trains the model that the plain loop on one process trains."""

import functools

import pytest

from growkit.bench import loops

CASES = [(each, cls, world) for each in loops.LOOPS for world in each.processes for cls in each.classes]
NAMES = [f"{each.name}-{cls.__name__}-{world}" for each, cls, world in CASES]


@pytest.fixture(scope="module")
def results():
    """All loops on so many processes, which are started once."""

    @functools.cache
    def of(world):
        cases = [case for case in CASES if case[2] == world]
        return dict(zip(cases, loops.spawn([loops.job(each, cls) for each, cls, _ in cases], world), strict=True))

    return of


@pytest.mark.parametrize("loop, cls, world", CASES, ids=NAMES)
def test_a_loop_is_the_plain_loop(loop, cls, world, results):
    for found in results(world)[loop, cls, world]:
        assert loops.difference(found, loops.plain(cls)) < loops.TOLERANCE
