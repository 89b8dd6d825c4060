"""The parts of an iteration: a row each, whose shares add up."""

from __future__ import annotations

from benchmarks.peers import iteration_parts


def test_every_part_has_a_row_and_the_shares_add_up():
    rows = iteration_parts.table("sin1_iteration", 20)
    assert [part for part, *_ in rows] == list(iteration_parts.PARTS)
    shares = [int(share.rstrip("%")) for *_, share in rows[:-1]]
    assert all(shares) and 98 <= sum(shares) <= 102
