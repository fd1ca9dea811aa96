"""Drawn parts of a benchmark: proportional, deterministic, stable as the limit grows; and ids of items without one."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.benchmarks import collect_subjects, item_id
from app.domain.subsets import draw, share_out

SUBJECTS = ["law"] * 60 + ["art"] * 25 + ["maths"] * 10 + [None] * 5
IDS = [f"item-{place}" for place in range(100)]


def test_shares_are_proportional_and_rounded_by_largest_remainders() -> None:
    assert share_out({"a": 60, "b": 25, "c": 10, None: 5}, 20) == {"a": 12, "b": 5, "c": 2, None: 1}
    # quotas 4.2, 1.75, 0.7, 0.35: the two left go to the largest remainders, 0.75 and 0.7
    assert share_out({"a": 60, "b": 25, "c": 10, None: 5}, 7) == {"a": 4, "b": 2, "c": 1, None: 0}
    assert share_out({"b": 1, "a": 1, "c": 1}, 2) == {"a": 1, "b": 1, "c": 0}


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c", "d", None]), st.integers(1, 500), min_size=1),
    st.data(),
)
def test_shares_sum_to_the_limit_and_are_within_one_of_the_quota(sizes, data) -> None:
    total = sum(sizes.values())
    limit = data.draw(st.integers(1, total))
    shares = share_out(sizes, limit)
    assert sum(shares.values()) == limit
    for subject, size in sizes.items():
        assert abs(shares[subject] - size * limit / total) < 1
        assert 0 <= shares[subject] <= size


def test_a_draw_follows_from_the_seed_and_holds_every_subjects_share() -> None:
    chosen = draw(IDS, SUBJECTS, limit=20, seed=3)
    assert chosen == draw(IDS, SUBJECTS, limit=20, seed=3) == sorted(set(chosen))
    assert Counter(SUBJECTS[place] for place in chosen) == {
        "law": 12,
        "art": 5,
        "maths": 2,
        None: 1,
    }
    assert chosen != draw(IDS, SUBJECTS, limit=20, seed=4)
    assert draw(IDS, SUBJECTS, limit=100, seed=0) == list(range(100))
    # A limit whose shares are all larger keeps every item of the smaller draw.
    assert set(chosen) <= set(draw(IDS, SUBJECTS, limit=40, seed=3))


def test_a_draw_does_not_depend_on_the_order_of_the_file() -> None:
    chosen = {IDS[place] for place in draw(IDS, SUBJECTS, limit=20, seed=1)}
    turned = draw(IDS[::-1], SUBJECTS[::-1], limit=20, seed=1)
    assert {IDS[::-1][place] for place in turned} == chosen


def test_an_item_without_an_id_gets_that_of_its_contents() -> None:
    one = {"question": "q", "answer": "ä"}
    assert (
        item_id(one) == item_id({"answer": "ä", "question": "q"}) != item_id(one | {"answer": "a"})
    )
    assert len(item_id(one)) == 32
    assert item_id(one | {"id": "own"}) == "own"


def test_subjects_are_counted_and_none_are_kept_where_there_are_too_many() -> None:
    found = collect_subjects(SUBJECTS)
    assert found is not None
    assert found.counts() == {"art": 25, "law": 60, "maths": 10}
    assert collect_subjects([None, None]) is None
    assert collect_subjects([str(place) for place in range(1001)]) is None


@pytest.mark.parametrize("limit", [1, 99])
def test_the_smallest_and_the_largest_part(limit) -> None:
    assert len(draw(IDS, SUBJECTS, limit=limit, seed=0)) == limit
