"""The memory's store: admission, eviction, exact search, deletion, and the form on disk."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from scipy import stats

from workers.strategies.keys import herd
from workers.strategies.memory_files import MANIFEST, load_memory, save_memory
from workers.strategies.reservoir import EncoderChanged, Entry, MemoryStore

DIM = 16


def keys_of(count, seed=0, dim=DIM):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def entries_of(count, domain="a", start=0, **more):
    return [Entry(0, f"{domain}{start + n}", domain, row=start + n, **more) for n in range(count)]


def store_of(**more):
    values = {"capacity": 20, "dim": DIM, "encoder": "e", "seed": 3, "dup_threshold": 1.1}
    return MemoryStore(**{**values, **more})


def filled(**more):
    store = store_of(**more)
    store.offer(keys_of(50), entries_of(50))
    return store


@pytest.mark.parametrize("among", [None, "text", "image"])
def test_a_search_is_brute_force_in_float64_with_ties_to_the_lower_id(among):
    store = store_of(capacity=400)
    twins = keys_of(60, seed=1).repeat_interleave(3, dim=0)  # every key three times
    nearly = twins[:60] + 1e-7 * keys_of(60, seed=2)  # closer than float32 tells
    both = torch.cat([twins, nearly])
    both = both[torch.randperm(len(both), generator=torch.Generator().manual_seed(0))]
    store.offer(both[:140], entries_of(140))
    store.offer(both[140:], entries_of(100, "b", modality="image"))
    queries = keys_of(12, seed=3)
    found = store.search(queries, 9, among=among)

    stored, centres = store._searchable()
    for query, results in zip(queries, found, strict=True):
        shifted = query / query.norm() - centres["text"]
        sims = (stored.double() * (shifted / shifted.norm()).double()).sum(1).tolist()
        ranked = sorted(
            (-sim, entry.id)
            for sim, entry in zip(sims, store.entries, strict=True)
            if among in (None, entry.modality)
        )
        assert [r.entry.id for r in results] == [i for _, i in ranked[:9]]
        assert [r.similarity for r in results] == pytest.approx([-s for s, _ in ranked[:9]])


def test_the_keys_that_are_searched_are_unit_and_without_their_modalitys_mean():
    store = store_of(capacity=200)
    texts, images = keys_of(60) + 4.0, keys_of(60, seed=1) - 4.0
    store.offer(texts, entries_of(60))
    store.offer(images, entries_of(60, "b", modality="image"))
    own = images[7] / images[7].norm()
    assert store.keys_ND.norm(dim=1).tolist() == pytest.approx([1.0] * 120)
    # raw, every text is closer to any text than to any image; without the means an image is found by its like
    unit_texts = texts / texts.norm(dim=1, keepdim=True)
    assert float((unit_texts @ own).max()) < 0
    ((best, *_),) = store.search(images[7:8], 3, modality="image")
    assert best.entry.content == "b7"
    gap = [store.search(keys_of(1, seed=s) - 4.0, 120, modality="image")[0] for s in range(9, 14)]
    modalities = [r.entry.modality for results in gap for r in results[:20]]
    assert 20 < modalities.count("text") < 80  # about half: the modality itself decides nothing


def test_a_search_of_nothing_finds_nothing():
    assert store_of().search(keys_of(2), 3) == [[], []]
    assert filled().search(keys_of(1), 3, among="image") == [[]]
    assert filled().search(keys_of(0), 3) == []


@pytest.mark.parametrize("policy", ["reservoir", "quota_reservoir"])
def test_every_candidate_stays_with_the_same_probability(policy):
    candidates, capacity, runs = 40, 10, 1200
    counts = np.zeros(candidates)
    keys = keys_of(candidates)
    for run in range(runs):
        store = store_of(capacity=capacity, seed=run, policy=policy)
        store.offer(keys[:25], entries_of(25))
        store.offer(keys[25:], entries_of(15, start=25))
        counts[[e.row for e in store.entries]] += 1
        assert len(store) == capacity
    expected = runs * capacity / candidates
    variance = expected * (1 - capacity / candidates)
    statistic = ((counts - expected) ** 2).sum() / variance * (candidates - 1) / candidates
    assert stats.chi2.sf(statistic, candidates - 1) > 1e-3


def test_a_quota_that_shrinks_leaves_a_uniform_sample():
    counts, keys = np.zeros(30), keys_of(30)
    for run in range(1000):
        store = store_of(capacity=12, seed=run)
        store.offer(keys, entries_of(30))
        store.offer(keys_of(9, seed=1), entries_of(9, "b"))
        own = [e.row for e in store.entries if e.domain == "a"]
        assert len(own) == 6
        counts[own] += 1
    variance = 1000 * 0.2 * 0.8
    statistic = ((counts - 200) ** 2).sum() / variance * 29 / 30
    assert stats.chi2.sf(statistic, 29) > 1e-3


def test_the_capacity_is_shared_among_domains_whatever_their_sizes():
    store = store_of(capacity=10)
    for n, domain in enumerate("abc"):
        store.offer(keys_of(200 // (n + 1), seed=n), entries_of(200 // (n + 1), domain))
    assert [sum(e.domain == d for e in store.entries) for d in "abc"] == [4, 3, 3]
    plain = store_of(capacity=10, policy="reservoir")
    plain.offer(keys_of(2000), entries_of(2000))
    plain.offer(keys_of(4, seed=1), entries_of(4, "b"))
    assert sum(e.domain == "a" for e in plain.entries) >= 9


def test_herding_takes_the_subset_that_brute_force_takes():
    keys = keys_of(9, dim=3).double()
    mean = keys.mean(0)
    order = herd(keys, 9)
    assert order[0] == int((keys - mean).norm(dim=1).argmin())
    for step in range(9):  # each pick is the best of all that were left, by enumeration
        chosen = order[:step]
        left = [n for n in range(9) if n not in chosen]
        distances = [(mean - keys[[*chosen, n]].mean(0)).norm() for n in left]
        assert left[int(torch.stack(distances).argmin())] == order[step]


def test_a_herding_store_holds_what_lies_closest_to_the_mean():
    store = store_of(capacity=6, policy="herding")
    keys = keys_of(30)
    keys = keys / keys.norm(dim=1, keepdim=True)
    store.offer(keys, entries_of(30))
    assert {e.row for e in store.entries} == set(herd(keys, 6))
    whole = keys.double().mean(0)
    own = (store.keys_ND.double().mean(0) - whole).norm()
    others = [
        (keys[list(pick)].double().mean(0) - whole).norm()
        for pick in itertools.islice(itertools.combinations(range(30), 6), 0, 500_000, 997)
    ]
    assert own < np.quantile(others, 0.01)
    store.offer(keys_of(30, seed=1), entries_of(30, "b"))
    assert [sum(e.domain == d for e in store.entries) for d in "ab"] == [3, 3]


def test_near_duplicates_are_refused_within_a_modality_alone():
    store = store_of(capacity=100, dup_threshold=0.95)
    keys = keys_of(30)
    store.offer(keys, entries_of(30))
    assert len(store) == 30
    store.offer(keys + 0.01, entries_of(30, start=50))
    assert (len(store), store.counts.duplicates) == (30, 30)
    store.offer(keys, entries_of(30, start=90, modality="image"))
    assert len(store) == 60
    fresh = keys_of(1, seed=5).repeat(3, 1)  # and within one offer
    store.offer(fresh, entries_of(3, start=200))
    assert len(store) == 61


@pytest.mark.parametrize("policy", ["quota_reservoir", "reservoir"])
def test_duplicates_are_those_of_one_comparison_after_the_other(policy):
    """Blocks of candidates are compared at once, while entries come and go: the result is the plain one."""
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(12, DIM, generator=generator)
    keys = torch.cat(
        [
            centres[n % 12 : n % 12 + 1] + 0.12 * torch.randn(1, DIM, generator=generator)
            for n in range(700)
        ]
    )
    store = store_of(capacity=9, dup_threshold=0.9, policy=policy)
    store.offer(keys, entries_of(700))

    unit = keys / keys.norm(dim=1, keepdim=True)
    centred = unit - unit.double().mean(0).float()
    centred = centred / centred.norm(dim=1, keepdim=True)
    random = np.random.Generator(np.random.PCG64(3))
    held: list[int] = []
    seen = duplicates = 0
    for row in range(700):
        if held and float((centred[held] @ centred[row]).max()) >= 0.9:
            duplicates += 1
            continue
        seen += 1
        if len(held) < 9:
            held.append(row)
            continue
        drawn = int(random.integers(seen))
        if drawn < 9:
            held[drawn] = row
    assert [e.row for e in store.entries] == held
    assert store.counts.duplicates == duplicates > 100
    assert store.counts.evicted > 10


def test_what_was_deleted_is_gone_and_never_comes_back():
    store = filled(capacity=60)
    contents = [store.entries[3].content, store.entries[40].content]
    kept = [
        (e, k)
        for e, k in zip(store.entries, store.keys_ND.clone(), strict=True)
        if e.content not in contents
    ]
    assert store.delete([*contents, "unknown"]) == 2
    assert [e for e, _ in kept] == store.entries
    assert torch.equal(store.keys_ND, torch.stack([k for _, k in kept]))
    assert all(r.entry.content not in contents for r in store.search(keys_of(1), 60)[0])
    store.offer(keys_of(50), entries_of(50))
    assert (len(store), store.counts.forgotten) == (48, 2)


@pytest.mark.parametrize("policy", ["quota_reservoir", "reservoir", "herding"])
def test_a_saved_store_goes_on_identically(tmp_path, policy):
    first = filled(policy=policy)
    first.delete([first.entries[2].content])
    save_memory(first, tmp_path)
    second = load_memory(tmp_path, encoder="e")
    for n, domain in enumerate("bac"):
        keys, entries = keys_of(40, seed=10 + n), entries_of(40, domain, start=1000)
        first.offer(keys, entries)
        second.offer(keys, entries)
    assert first.entries == second.entries
    assert torch.equal(first.keys_ND, second.keys_ND)
    assert json.dumps(first.state()[1]) == json.dumps(second.state()[1])
    assert first.state()[0].keys() == second.state()[0].keys()


def test_another_encoders_keys_are_refused(tmp_path):
    save_memory(filled(), tmp_path)
    with pytest.raises(EncoderChanged, match="encode its rows anew"):
        load_memory(tmp_path, encoder="other")
    tensors, scalars = filled().state()
    with pytest.raises(ValueError, match="capacity is 20, not 21"):
        store_of(capacity=21).load_state(tensors, scalars)
    with pytest.raises(ValueError, match="do not fit"):
        store_of().load_state({"keys": tensors["keys"][:-1]}, scalars)


def test_keys_and_manifest_are_replaced_together_and_damage_is_seen(tmp_path):
    store = filled()
    save_memory(store, tmp_path)
    old = json.loads((tmp_path / MANIFEST).read_text())
    store.offer(keys_of(30, seed=9), entries_of(30, "b"))
    save_memory(store, tmp_path)
    new = json.loads((tmp_path / MANIFEST).read_text())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([MANIFEST, new["keys"]])
    assert old["keys"] != new["keys"]
    keys = tmp_path / new["keys"]
    assert hashlib.sha256(keys.read_bytes()).hexdigest() == new["sha256"]
    keys.write_bytes(keys.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="not what was saved"):
        load_memory(tmp_path, encoder="e")


def test_keys_of_another_width_are_refused():
    with pytest.raises(ValueError, match="keys of shape"):
        store_of().offer(keys_of(3, dim=4), entries_of(3))
