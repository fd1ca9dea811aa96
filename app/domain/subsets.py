"""Which items of a benchmark a drawn part holds: stratified by subject, the same for the same seed."""

import hashlib
from collections.abc import Sequence


def draw(ids: Sequence[str], subjects: Sequence[str | None], *, limit: int, seed: int) -> list[int]:
    """Positions of `limit` items, each subject with its share of them, in file order.

    Shares are rounded by largest remainders, ties going to the larger subject and then by name. Which items
    of a subject are taken follows from seed and id alone: a larger limit keeps nearly all of a smaller one's.

    Args:
        ids: Of all items, in file order.
        subjects: Of the same items; None is a subject of its own.
        limit: From 1 to the number of items.
        seed: Of the draw.
    """
    members: dict[str | None, list[int]] = {}
    for place, subject in enumerate(subjects):
        members.setdefault(subject, []).append(place)
    sizes = {subject: len(places) for subject, places in members.items()}
    shares = share_out(sizes, limit)

    def order(place: int) -> bytes:
        return hashlib.sha256(f"{seed}:{ids[place]}".encode()).digest()

    chosen = [
        place
        for subject, places in members.items()
        for place in sorted(places, key=order)[: shares[subject]]
    ]
    return sorted(chosen)


def share_out(sizes: dict[str | None, int], limit: int) -> dict[str | None, int]:
    """How many of `limit` items each subject gives: in proportion, rounded by largest remainders."""
    total = sum(sizes.values())
    shares = {subject: size * limit // total for subject, size in sizes.items()}
    left = limit - sum(shares.values())
    by_remainder = sorted(
        sizes,
        key=lambda subject: (
            -(sizes[subject] * limit % total),
            -sizes[subject],
            subject is None,
            subject or "",
        ),
    )
    for subject in by_remainder[:left]:
        shares[subject] += 1
    return shares
