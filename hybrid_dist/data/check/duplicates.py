"""Pictures that look the same, among a hundred thousand: without comparing all with all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, count, pairwise

import numpy as np

DISTANCE = 6
"""Bits of 64 that the hashes of two pictures which look the same may differ by."""

LIKENESS = 0.985
"""Least correlation of their 8 × 8 RGB thumbnails.

Chosen on 1,900 different photographs of 96 × 96 pixels, 3,000 rendered aircraft (6.3 million pairs in all), and copies
of 2,500 of them: re-encoded (JPEG, quality 60), shrunk (0.9×, 0.5×), brightened (1.1 × + 8), or all at once.

                             copies found, by kind   false pairs of photographs   of aircraft
    hash within 4 bits       98.8–100 %              0                            32
    hash within 6 bits       99.8–100 %              2                            193
    and thumbnails alike     99.8–100 %              0                            0

Aircraft before a sky share their coarse shape, which is all that the hash sees; the thumbnail sees the colours. Of
copies with 3 % cut off at each edge, which no hash of the whole is meant for, 62 % are found.
"""

_ROUNDS = 32
_SLICE = 20_000
_BATCH = 100_000


def near_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of hashes within a Hamming distance, each once, in batches of indices (left < right), int64 (k,).

    Of `distance` + 2 bands of bits, `distance` differing bits can touch all but two: a pair that is near shares the
    bits of two bands at least, and is found among the few that do. Memory grows with n alone; time with the pairs
    that share two bands, so many equal hashes are to be taken out before.

    Args:
        hashes: uint64 (n,).
        distance: 0 to 30.
    """
    if not 0 <= distance <= 30:
        raise ValueError(f"distance {distance}: 0 to 30 would do")
    edges = np.linspace(0, 64, distance + 3).astype(int)
    masks = [np.uint64((1 << int(high)) - (1 << int(low))) for low, high in pairwise(edges)]
    for one, two in combinations(range(len(masks)), 2):
        shared = hashes & (masks[one] | masks[two])
        order = np.argsort(shared, kind="stable")
        ends = np.searchsorted(shared[order], shared[order], side="right")
        place = np.arange(len(hashes))
        for step in count(1):
            place = place[place + step < ends[place]]
            if not len(place):
                break
            left, right = order[place], order[place + step]
            differing = hashes[left] ^ hashes[right]
            near = np.bitwise_count(differing) <= distance
            # Told by the first two bands that it shares, and by no others.
            for band in range(two):
                if band != one:
                    near &= (differing & masks[band]) != 0
            if near.any():
                left, right = left[near], right[near]
                yield np.minimum(left, right), np.maximum(left, right)


def alike(thumbs: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether pairs of thumbnails correlate by `LIKENESS` or more, whatever their brightness: bool (k,).

    Args:
        thumbs: uint8 (n, values).
        left, right: indices, int64 (k,).
    """
    found = np.zeros(len(left), bool)
    for start in range(0, len(left), _SLICE):
        part = slice(start, start + _SLICE)
        one, two = (thumbs[side[part]].astype(np.float32) for side in (left, right))
        one, two = (values - values.mean(1, keepdims=True) for values in (one, two))
        scale = np.sqrt((one * one).sum(1) * (two * two).sum(1))
        found[part] = (one * two).sum(1) >= LIKENESS * np.maximum(scale, 1e-6)
    return found


def same_looking(hashes: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """A number per picture; those that look the same, directly or through others, have the same one: int64 (n,).

    Pictures of one colour are to be left out: they have no look.

    Args:
        hashes: uint64 (n,).
        thumbs: uint8 (n, values).
    """
    groups = np.arange(len(hashes))
    nodes = []
    rest = groups
    # Equal hashes first, each against the first of its kind; what looks different after all is tried again.
    for _ in range(_ROUNDS):
        if not len(rest):
            break
        _, first, which = np.unique(hashes[rest], return_index=True, return_inverse=True)
        leader = rest[first][which]
        same = (rest == leader) | alike(thumbs, leader, rest)
        groups[rest[same]] = leader[same]
        nodes.append(rest[first])
        rest = rest[~same]
    leaders = np.sort(np.concatenate(nodes)) if nodes else rest
    edges: list[np.ndarray] = []
    for pair in near_pairs(hashes[leaders], DISTANCE):
        left, right = (leaders[side] for side in pair)
        apart = groups[left] != groups[right]
        left, right = left[apart], right[apart]
        same = alike(thumbs, left, right)
        edges.append(np.stack([left[same], right[same]]))
        if sum(batch.shape[1] for batch in edges) > _BATCH:
            groups, edges = _joined(groups, edges), []
    return _joined(groups, edges)


def _joined(groups: np.ndarray, edges: list[np.ndarray]) -> np.ndarray:
    """The groups, int64 (n,), after those at both ends of each edge, int64 (2, k), have become one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not edges:
        return groups
    left, right = groups[np.concatenate(edges, axis=1)]
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(groups), len(groups)))
    _, joined = connected_components(graph, directed=False)
    return np.asarray(joined)[groups]
