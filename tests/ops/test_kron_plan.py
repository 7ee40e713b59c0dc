"""What the planner counts for known growths, and the panels that it cuts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growkit.bench import pairs
from growkit.kron import plan

T, G = 1e12, 1e9

# Counted by hand for the blocks of four growths; floor in milliseconds at 4.3 TB/s.
KNOWN = {
    "bert-small-base": dict(
        small=18.9e6, large=84.9e6, literal=1.74 * T, mix_first=290 * G, dense=131 * G, identity_top=45 * G,
        floor=0.097, embeddings=24 * G,
    ),
    "gpt2-base-medium": dict(
        small=84.9e6, large=302e6, literal=19.5 * T, mix_first=1628 * G, dense=761 * G, identity_top=196 * G,
        floor=0.360, embeddings=81 * G,
    ),
    "gpt2-medium-xl": dict(
        small=302e6, large=1.47e9, literal=238 * T, mix_first=9934 * G, dense=4.48 * T, identity_top=1.66 * T,
        floor=1.66, embeddings=168 * G,
    ),
    "llama-1b-7b": dict(
        small=1.13e9, large=6.48e9, literal=1447 * T, mix_first=65.9 * T, dense=38.3 * T, identity_top=19.1 * T,
        floor=7.08, embeddings=1.07 * T,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_counts_of_known_pairs(name):
    counts, known = pairs.count(pairs.PAIRS[name]), dict(KNOWN[name])
    assert 1e3 * pairs.floor_seconds(counts) == pytest.approx(known.pop("floor"), rel=0.005)
    for what, expected in known.items():
        digits = 0.021 if expected in (45 * G, 24 * G, 81 * G) else 0.006  # half of the last digit given
        assert getattr(counts, what) == pytest.approx(expected, rel=digits), what
    assert counts.dense < counts.mix_first / 1.7 and counts.identity_top < counts.dense / 2


def test_largest_stack_and_backward():
    largest = [4 * pairs.count(pair).largest_stack / 1e9 for pair in pairs.PAIRS.values()]
    assert largest == pytest.approx([0.0566, 0.2013, 0.983, 3.968], rel=0.001)  # GB in fp32
    base_medium = pairs.count(pairs.PAIRS["gpt2-base-medium"])
    assert base_medium.identity_top_backward == pytest.approx(261 * G, rel=0.004)


def test_table_is_printed(capsys):
    pairs.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == list(pairs.PAIRS)
    assert "761 G" in lines[2] and "196 G" in lines[2] and "1.63 T" in lines[2]


@given(size=st.integers(0, 20000), bytes_each=st.integers(0, 2**28))
def test_panels_cover_a_range_within_their_bound(size, bytes_each):
    panels = plan.panels(size, bytes_each, plan.PENDING_BYTES)
    assert [stop for _, stop in panels[:-1]] == [start for start, _ in panels[1:]]
    assert not size or (panels[0][0], panels[-1][1]) == (0, size)
    for start, stop in panels:
        assert start < stop
        assert (stop - start) * bytes_each <= plan.PENDING_BYTES or stop == start + 1


def test_panels_of_known_stacks():
    # GPT-2 base to medium, MLP: 12 layers x 1024 floats a row: all of it is 201 MB
    assert plan.panels(4096, 12 * 1024 * 4, plan.PANEL_BYTES) == [(0, 4096)]
    # LLaMA 1B to 7B: 744 rows are 268 MB, whole tiles of them 704
    assert plan.panels(11008, 22 * 4096 * 4, plan.PANEL_BYTES)[0] == (0, 704)
    assert plan.panels(10, 1, 64) == [(0, 10)] and plan.panels(0, 5, 64) == []
