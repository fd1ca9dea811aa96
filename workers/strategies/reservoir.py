"""The memory: unit keys with what they stand for, admission, eviction and exact search."""

# Shape letters: N entries, C candidates, Q queries, K results, D width of a key.

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.strategies.keys import APART, Similarities, herd, unit

Policy = Literal["quota_reservoir", "reservoir", "herding"]
FORMAT = 1
MIN_CENTRE_KEYS = 8  # of a domain and modality; fewer say little of its mean
BLOCK_ROWS = 256  # candidates compared with the store at once
#: Above the error of a float32 dot product of two keys of up to 8192 numbers and length at most 1.
ROUNDING = 1e-3


class EncoderChanged(ValueError):
    """The keys were made by another encoder: cosines with them mean nothing."""


@dataclass(frozen=True)
class Entry:
    """What a key stands for: a row of a store, or a text or image of its own.

    Args:
        id: Serial number of admission; ties in a search go to the lower one.
        content: Hash of the content; by this entries are deleted.
        domain: Whose quota it counts for.
        modality: `text` or `image`.
        store: Where its row lies; empty where it has none.
        row: Index there; -1 where it has none.
        text: The text itself, where it is kept.
    """

    id: int
    content: str
    domain: str
    modality: str = "text"
    store: str = ""
    row: int = -1
    text: str | None = None


class Found(NamedTuple):
    """A result of a search."""

    entry: Entry
    similarity: float


@dataclass
class Admission:
    """What became of the candidates so far."""

    offered: int = 0
    duplicates: int = 0
    forgotten: int = 0  # deleted before, so never taken again
    passed_over: int = 0  # by the reservoir or the herding
    evicted: int = 0


class MemoryStore:
    """Up to `capacity` entries with unit keys of width `dim`, float32.

    Texts and images lie in cones of their own (the modality gap), and so do the rows of a narrow domain. A
    search therefore compares keys minus the mean of their modality's entries. Duplicates are looked for
    within a domain and modality, in keys minus its mean, which its first offer with enough keys settles.

    Args:
        capacity: Entries at most.
        dim: Width of a key.
        policy: `reservoir`: uniform over all that was offered; `quota_reservoir`: capacity is shared
            equally among domains, uniform within each; `herding`: the same shares, filled with the
            entries whose running mean stays closest to their domain's.
        dup_threshold: A candidate with at least this cosine to an entry is a duplicate; above 1: only where
            their contents are the same.
        encoder: Hash of what makes the keys.
        seed: Of the choices.
    """

    def __init__(
        self,
        *,
        capacity: int,
        dim: int,
        encoder: str,
        seed: int,
        policy: Policy = "quota_reservoir",
        dup_threshold: float = 0.95,
    ) -> None:
        self.capacity = capacity
        self.dim = dim
        self.encoder = encoder
        self.policy = policy
        self.dup_threshold = dup_threshold
        self.entries: list[Entry] = []
        self.centres: dict[str, Tensor] = {}  # for duplicates, by `_group`
        self.seen: dict[str, int] = {}  # admitted to the choice, by domain, in order of appearance
        self.deleted: set[str] = set()  # contents
        self.counts = Admission()
        self._next_id = 0
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._buffer_ND = torch.zeros(0, dim)  # grown by doubling; the entries' keys come first
        self._places: dict[str, list[int]] = {}  # of a domain's entries; not kept up by `reservoir`
        self._contents: set[str] = set()
        self._index: tuple[Tensor, dict[str, Tensor]] | None = None  # for searches

    @property
    def keys_ND(self) -> Tensor:
        """Keys in the order of `entries`."""
        return self._buffer_ND[: len(self.entries)]

    def __len__(self) -> int:
        return len(self.entries)

    def offer(self, keys_CD: Tensor, candidates: Sequence[Entry]) -> None:
        """Takes in candidates one after the other; their ids are given here.

        Args:
            keys_CD: Their keys; brought to unit length.
            candidates: What they stand for, of one domain.

        Raises:
            ValueError: The keys have another shape.
        """
        if keys_CD.shape != (len(candidates), self.dim):
            raise ValueError(
                f"keys of shape {tuple(keys_CD.shape)} for {len(candidates)} of {self.dim}"
            )
        keys_CD = unit(keys_CD.detach().float().cpu())
        self._settle_centres(keys_CD, candidates)
        self.counts.offered += len(candidates)
        for domain in dict.fromkeys(c.domain for c in candidates):
            if domain not in self.seen:
                self.seen[domain] = 0
                self._shrink()
        if self.policy == "herding":
            self._herd(keys_CD, candidates)
            return
        for start in range(0, len(candidates), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            self._offer_block(keys_CD[block], candidates[block])

    def search(
        self, queries_QD: Tensor, k: int, *, modality: str = "text", among: str | None = None
    ) -> list[list[Found]]:
        """The k most similar entries of each query, exactly: as in float64, ties to the lower id.

        One float32 matrix product finds whatever could be among them; those few are compared in float64.

        Args:
            queries_QD: Keys of the same encoder.
            k: Results a query, as far as there are entries.
            modality: Of the queries.
            among: Modality of the entries; None: all.
        """
        keys_ND, centres = self._searchable()
        places: Sequence[int] = range(len(self))
        if among is not None:
            places = [i for i, e in enumerate(self.entries) if e.modality == among]
            keys_ND = keys_ND[places]
        if not places or not len(queries_QD):
            return [[] for _ in range(len(queries_QD))]
        queries_QD = unit(queries_QD.detach().float().cpu())
        if modality in centres:
            queries_QD = unit(queries_QD - centres[modality])
        sims_QN = queries_QD @ keys_ND.T
        k = min(k, len(places))
        floor_Q = sims_QN.topk(k, dim=1).values[:, -1] - ROUNDING
        results = []
        for query_D, sims_N, floor in zip(queries_QD, sims_QN, floor_Q, strict=True):
            near = torch.nonzero(sims_N >= floor)[:, 0]
            exact = (keys_ND[near].double() * query_D.double()).sum(1).tolist()
            found = [
                Found(self.entries[places[i]], sim)
                for i, sim in zip(near.tolist(), exact, strict=True)
            ]
            results.append(sorted(found, key=lambda f: (-f.similarity, f.entry.id))[:k])
        return results

    def delete(self, contents: Sequence[str]) -> int:
        """Takes entries out for good, by the hash of their content; how many there were."""
        gone = set(contents)
        self.deleted |= gone
        return self._keep([i for i, e in enumerate(self.entries) if e.content not in gone])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which the store goes on as if nothing had happened."""
        tensors = {"keys": self.keys_ND.clone()}
        tensors |= {f"centres/{name}": centre.clone() for name, centre in self.centres.items()}
        scalars = {
            "format": FORMAT,
            "capacity": self.capacity,
            "dim": self.dim,
            "policy": self.policy,
            "dup_threshold": self.dup_threshold,
            "encoder": self.encoder,
            "entries": [asdict(entry) for entry in self.entries],
            "seen": dict(self.seen),
            "deleted": sorted(self.deleted),
            "counts": asdict(self.counts),
            "next_id": self._next_id,
            "random": self._random.bit_generator.state,
        }
        return tensors, scalars

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Takes up a saved state.

        Raises:
            EncoderChanged: Another encoder made its keys.
            ValueError: It is of a store with other settings, or its parts do not fit each other.
        """
        if scalars["encoder"] != self.encoder:
            raise EncoderChanged(
                f"the memory's keys were made by encoder {str(scalars['encoder'])[:12]}, not"
                f" {self.encoder[:12]}: encode its rows anew"
            )
        for name in ("capacity", "dim", "policy", "dup_threshold"):
            if scalars[name] != getattr(self, name):
                raise ValueError(
                    f"the memory's {name} is {scalars[name]}, not {getattr(self, name)}"
                )
        entries = [Entry(**entry) for entry in scalars["entries"]]
        if tensors["keys"].shape != (len(entries), self.dim):
            raise ValueError("the memory's keys and entries do not fit")
        self.entries = entries
        self._buffer_ND = tensors["keys"].detach().float().cpu().clone()
        self._reorder()
        self.centres = {
            name.removeprefix("centres/"): centre.detach().float().cpu().clone()
            for name, centre in tensors.items()
            if name.startswith("centres/")
        }
        self.seen = dict(scalars["seen"])
        self.deleted = set(scalars["deleted"])
        self.counts = Admission(**scalars["counts"])
        self._next_id = scalars["next_id"]
        self._random.bit_generator.state = scalars["random"]

    # how a candidate gets in
    def _offer_block(self, keys_CD: Tensor, candidates: Sequence[Entry]) -> None:
        alike = self._similar(keys_CD, candidates)
        for index, candidate in enumerate(candidates):
            if not self._is_new(candidate, alike, index):
                continue
            self.seen[candidate.domain] += 1
            place = self._choose_place(candidate.domain)
            if place is None:
                self.counts.passed_over += 1
                continue
            self._put(place, keys_CD[index], candidate)
            alike.put(place, index)

    def _is_new(self, candidate: Entry, alike: Similarities, index: int) -> bool:
        if candidate.content in self.deleted:
            self.counts.forgotten += 1
            return False
        if candidate.content in self._contents or alike.highest(index) >= self.dup_threshold:
            self.counts.duplicates += 1
            return False
        return True

    def _choose_place(self, domain: str) -> int | None:
        """Algorithm R: the n-th candidate gets in with probability quota / n, in place of a random one."""
        own: Sequence[int]
        if self.policy == "reservoir":
            own, quota, seen = range(len(self)), self.capacity, sum(self.seen.values())
        else:
            own = self._places.get(domain, [])
            quota, seen = self._quota(domain), self.seen[domain]
        if len(own) < quota and seen <= quota:
            return len(self)
        drawn = int(self._random.integers(seen))
        if drawn >= quota:
            return None
        return own[drawn] if drawn < len(own) else len(self)

    def _quota(self, domain: str) -> int:
        """Its share of the capacity; the remainder goes to those that came first."""
        share, rest = divmod(self.capacity, len(self.seen))
        return share + (list(self.seen).index(domain) < rest)

    def _shrink(self) -> None:
        """Makes room for another domain: a random part of a uniform sample is one, too."""
        if self.policy == "reservoir":
            return
        kept: list[int] = []
        for domain in self.seen:
            own, quota = self._places.get(domain, []), self._quota(domain)
            if len(own) > quota:
                if self.policy == "herding":
                    order = herd(self.keys_ND[own], quota)
                else:
                    order = self._random.permutation(len(own))[:quota].tolist()
                own = [own[i] for i in order]
            kept += own
        self.counts.evicted += self._keep(sorted(kept))

    def _herd(self, keys_CD: Tensor, candidates: Sequence[Entry]) -> None:
        """Each domain's entries and candidates are chosen among anew."""
        for start in range(0, len(candidates), BLOCK_ROWS):  # duplicates go first
            block = slice(start, start + BLOCK_ROWS)
            alike = self._similar(keys_CD[block], candidates[block])
            for index, candidate in enumerate(candidates[block]):
                if self._is_new(candidate, alike, index):
                    self.seen[candidate.domain] += 1
                    place = len(self)
                    self._put(place, keys_CD[start + index], candidate)
                    alike.put(place, index)
        before = len(self)
        kept: list[int] = []
        for domain in self.seen:
            own = self._places.get(domain, [])
            kept += [own[i] for i in herd(self.keys_ND[own], self._quota(domain))]
        self._keep(sorted(kept))
        self.counts.passed_over += before - len(self)

    def _put(self, place: int, key_D: Tensor, candidate: Entry) -> None:
        entry = replace(candidate, id=self._next_id)
        self._next_id += 1
        self._index = None
        self._contents.add(entry.content)
        if place == len(self):
            if place == len(self._buffer_ND):
                room = torch.zeros(max(place, BLOCK_ROWS), self.dim)
                self._buffer_ND = torch.cat([self._buffer_ND, room])
            self.entries.append(entry)
            self._places.setdefault(entry.domain, []).append(place)
        else:
            self._contents.discard(self.entries[place].content)
            self.entries[place] = entry
            self.counts.evicted += 1
        self._buffer_ND[place] = key_D

    def _keep(self, places: Sequence[int]) -> int:
        """Leaves only these entries, in this order; how many went."""
        before = len(self)
        self._buffer_ND = self.keys_ND[list(places)].clone()
        self.entries = [self.entries[i] for i in places]
        self._reorder()
        return before - len(self)

    def _reorder(self) -> None:
        """What follows from the entries."""
        self._index = None
        self._contents = {entry.content for entry in self.entries}
        self._places = {}
        for place, entry in enumerate(self.entries):
            self._places.setdefault(entry.domain, []).append(place)

    # similarity
    def _searchable(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Keys minus the mean of their modality, and the means."""
        if self._index is None:
            keys_ND, centres = self.keys_ND.clone(), {}
            for modality in sorted({entry.modality for entry in self.entries}):
                own = [i for i, e in enumerate(self.entries) if e.modality == modality]
                if len(own) >= MIN_CENTRE_KEYS:
                    centres[modality] = keys_ND[own].double().mean(0).float()
                    keys_ND[own] = unit(keys_ND[own] - centres[modality])
            self._index = keys_ND, centres
        return self._index

    def _settle_centres(self, keys_CD: Tensor, candidates: Sequence[Entry]) -> None:
        for group in sorted({_group(c) for c in candidates} - self.centres.keys()):
            own = [i for i, c in enumerate(candidates) if _group(c) == group]
            if len(own) >= MIN_CENTRE_KEYS:
                self.centres[group] = keys_CD[own].double().mean(0).float()

    def _centred(self, keys_ND: Tensor, entries: Sequence[Entry]) -> Tensor:
        """Keys minus the mean of their domain and modality, where there is one."""
        keys_ND = keys_ND.clone()
        groups = [_group(entry) for entry in entries]
        for group, centre in self.centres.items():
            own = torch.tensor([g == group for g in groups], dtype=torch.bool)
            keys_ND[own] = unit(keys_ND[own] - centre)
        return keys_ND

    def _similar(self, keys_CD: Tensor, candidates: Sequence[Entry]) -> Similarities:
        """Cosines within a domain and modality; below any threshold elsewhere."""
        own_CD = self._centred(keys_CD, candidates)
        stored_ND = self._centred(self.keys_ND, self.entries)
        number: dict[str, int] = {}
        group_C = torch.tensor([number.setdefault(_group(c), len(number)) for c in candidates])
        group_N = torch.tensor([number.get(_group(e), -1) for e in self.entries])
        sims_CN = (own_CD @ stored_ND.T).masked_fill(group_C[:, None] != group_N, APART)
        sims_CC = (own_CD @ own_CD.T).masked_fill(group_C[:, None] != group_C, APART)
        return Similarities(sims_CN.numpy(), sims_CC.numpy())


def _group(entry: Entry) -> str:
    """Within what duplicates are looked for."""
    return f"{entry.modality}/{entry.domain}"
