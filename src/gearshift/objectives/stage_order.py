"""Which stage a micro-batch trains, where one stage is drawn for many samples: exact shares, in random order.

A stage is drawn as the one whose part of [0, 1) holds a point. K micro-batches in a row make a lap (K stages) and take
one point out of every K-th of [0, 1), in an order drawn for the lap: with equal shares every stage comes once per lap.
Within its K-th a point moves on by the golden section from lap to lap, from a beginning drawn from the seed. So the
share of every stage is right after any number n of micro-batches but for O(log n) of them, where independent draws are
off by O(sqrt n); a rare stage comes at nearly even distances and never stays away by bad luck; over seeds, every
micro-batch draws every stage with its share.

Groups of samples that each have a stage of their own take turns: in one micro-batch, groups next to each other take
their points out of different K-ths, and each group goes through all of them in a lap.
"""

from __future__ import annotations

import functools
import math

import torch

from gearshift.runtime import keys

_BITS = 64
_TURN = 1 << _BITS
# Fractions of a turn: (sqrt 5 - 1) / 2 for laps, whose multiples spread most evenly, and sqrt 2 - 1 for groups.
_LAP = (math.isqrt(5 << (2 * _BITS)) - _TURN) // 2
_GROUP = math.isqrt(2 << (2 * _BITS)) - _TURN


def point(seed: int, micro_batch: int, group: int, stages: int) -> float:
    """The point in [0, 1) that the samples of a group draw their stage with: the same in all processes."""
    lap, position = divmod(micro_batch, stages)
    part = _order(seed, lap, stages)[(position + group) % stages]
    # In whole numbers: nothing is lost however far the training has come.
    within = (_beginnings(seed, stages)[part] + lap * _LAP + group * _GROUP) % _TURN
    return (part + (within >> 11) * 2.0**-53) / stages


@functools.lru_cache(maxsize=16)
def _order(seed: int, lap: int, stages: int) -> tuple[int, ...]:
    """The K-ths of a lap in the order in which they come."""
    return tuple(keys.permutation(seed, "stage_order", lap, stages).tolist())


@functools.lru_cache(maxsize=16)
def _beginnings(seed: int, stages: int) -> tuple[int, ...]:
    """Where the points begin within each K-th, in 2^-64 of it."""
    words = keys.integers(seed, "stage", torch.arange(stages), 0, 1 << 31, (2,))
    return tuple(high << 33 | low << 2 for high, low in words.tolist())
