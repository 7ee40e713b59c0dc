"""Every loop of growkit.bench.loops trains the model that the plain loop on one process trains."""

import functools
import string
from pathlib import Path

import pytest

from growkit.bench import loops

# 4 processes take 20 s of CPU time to start: `python -m growkit.bench.loops HSDP`.
CASES = [(each, cls, world) for each in loops.LOOPS for world in each.processes if world < 4 for cls in each.classes]
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


def test_the_page_says_what_the_command_writes():
    """But for the figures and versions of the run."""
    page = (Path(__file__).parents[2] / "docs/integrations.md").read_text()
    said = [text for text, *_ in string.Formatter().parse(loops.PAGE)]
    said += [f"| {k} | {v} |" for k, v in loops.OTHERS.items()] + [f"| {each.name} |" for each in loops.LOOPS]
    assert not [text for text in said if text not in page]


def test_page_holds_the_table_and_a_loop_that_failed_fails(monkeypatch, tmp_path, capsys):
    each = loops.LOOPS[0]
    rows = [(each, 2, 3e-16), (each, 3, "ValueError: no such thing")]
    monkeypatch.setattr(loops, "compare", lambda chosen: rows if each in chosen else [])
    assert loops.main([each.name, "--write", str(tmp_path / "page.md")])
    line = (
        f"| {each.name} | 2, 3 | {', '.join(cls.__name__ for cls in each.classes)} | 3e-16, ValueError: no such thing |"
    )
    assert line in capsys.readouterr().out and line in (tmp_path / "page.md").read_text()
    del rows[1]
    assert not loops.main([each.name])
