"""The partition: slices cover every element once, fit slots, and have their edges on the grain."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpcomm.errors import UsageError
from dpcomm.schedule import Partition


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    grain = draw(st.sampled_from([1, 2, 16, 64, 128, 512]))
    slot_elems = grain * draw(st.integers(1, 5))
    chunks = draw(st.integers(1, 9))
    slices = draw(st.integers(1, 4))
    per_round = chunks * slices * slot_elems
    count = draw(
        st.one_of(
            st.integers(0, 4 * per_round),
            st.integers(0, 3).map(lambda n: n * per_round),
            st.integers(-3, 3).map(lambda n: max(0, 2 * per_round + n)),
        )
    )
    return Partition(count, chunks, slices, slot_elems, grain, draw(st.booleans()))


@settings(max_examples=400, deadline=None)
@given(partitions())
def test_slices_cover_every_element_once_in_order(cut: Partition) -> None:
    if cut.blocked:
        for chunk in range(cut.chunks):
            end = 0
            for _, c, _, first, count in cut:
                if c == chunk:
                    assert first == end or count == 0
                    end = max(end, first + count)
            assert end == cut.count
    else:
        end = 0
        for _, _, _, first, count in cut:
            assert first == end or count == 0
            end = max(end, first + count)
        assert end == cut.count


@settings(max_examples=400, deadline=None)
@given(partitions())
def test_slices_fit_slots_and_edges_fall_on_the_grain(cut: Partition) -> None:
    for _, _, _, first, count in cut:
        assert 0 <= count <= cut.slot_elems
        if count:
            assert first % cut.grain == 0
            assert (first + count) % cut.grain == 0 or first + count == cut.count


@settings(max_examples=200, deadline=None)
@given(partitions())
def test_rounds_are_as_few_as_slots_allow(cut: Partition) -> None:
    per_round = (1 if cut.blocked else cut.chunks) * cut.slices * cut.slot_elems
    assert cut.rounds() == -(-cut.count // per_round)


@settings(max_examples=200, deadline=None)
@given(partitions())
def test_a_short_round_is_shared_evenly(cut: Partition) -> None:
    """Chunks of the last round are full but for the last ones, and none is larger than needed."""
    if cut.blocked or cut.rounds() == 0:
        return
    last = cut.rounds() - 1
    sizes = [
        sum(cut.slice(last, chunk, s)[1] for s in range(cut.slices)) for chunk in range(cut.chunks)
    ]
    assert sorted(sizes, reverse=True) == sizes
    filled = -(-sum(sizes) // cut.chunks)
    assert sizes[0] < filled + cut.grain


def test_counts_beyond_32_bits() -> None:
    cut = Partition((1 << 33) + 5, 4, 2, 1 << 16, 512)
    last = cut.rounds() - 1
    ends = [sum(cut.slice(last, chunk, s)) for chunk in range(4) for s in range(2)]
    assert max(ends) == (1 << 33) + 5


@pytest.mark.parametrize(
    "arguments",
    [(10, 0, 1, 4, 4), (10, 1, 0, 4, 4), (10, 1, 1, 6, 4), (10, 1, 1, 0, 4), (10, 1, 1, 4, 0)],
)
def test_what_makes_no_sense_is_a_usage_error(arguments: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        Partition(*arguments).rounds()
