"""Randomness as a function: every draw is Philox4x32-10 of (seed, purpose, index, position).

There is no generator and no state. A draw for an index is the same whatever else is in the batch, on any number of
processes, and after a restart. Integers and uniforms are the same bits on CPU and CUDA; normals are computed in float64
and rounded to float32 once, so that the last-bit differences between mathematical libraries (and between the vector and
remainder loops of one library) vanish in all but about one in 10^8 values.

The 64-bit key of the cipher is a hash of seed and purpose; its 128-bit counter is laid out as

    word 0: block of four elements   word 1: position   words 2, 3: index (low, high)

so no two draws of one purpose share a counter. The elements of a draw do not depend on its shape: a longer draw begins
with the shorter one.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox, ten rounds);
known answers from the authors' Random123 library.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.runtime.errors import UsageError

_WORD = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Counters worked on at a time on the host: the five int64 buffers of the rounds then stay in a second-level cache.
_HOST_CHUNK = 1 << 15


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of `counter` (four int64 tensors of one shape, each in [0, 2^32)) under `key` (two such integers).

    Returns four int64 tensors of that shape in [0, 2^32). The counter tensors are used as work space and hold nothing
    useful afterwards. Products of 32-bit words wrap around in int64, which leaves their 64 bits right; the upper half
    of words 1 and 3 is left dirty between rounds because the mask after the exclusive-or cleans it.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    high = torch.empty_like(c0)
    for _ in range(_ROUNDS):
        c0.mul_(_MULTIPLIER[0])
        c2.mul_(_MULTIPLIER[1])
        torch.bitwise_right_shift(c2, 32, out=high)
        c1.bitwise_xor_(high).bitwise_xor_(k0).bitwise_and_(_WORD)
        torch.bitwise_right_shift(c0, 32, out=high)
        c3.bitwise_xor_(high).bitwise_xor_(k1).bitwise_and_(_WORD)
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


@functools.lru_cache(maxsize=1024)
def cipher_key(seed: int, purpose: str) -> tuple[int, int]:
    """The two key words of (seed, purpose). Raises UsageError unless 0 <= seed < 2^64."""
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"seed={seed} is outside [0, 2^64); choose a seed in that range")
    digest = hashlib.blake2b(purpose.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _words(key: tuple[int, int], index: Tensor, position: int, start: int, stop: int) -> tuple[Tensor, ...]:
    """The four words of blocks start..stop-1 of every index: int64 [B, stop - start] each."""
    index = index.unsqueeze(1)
    size = (index.shape[0], stop - start)
    block = torch.arange(start, stop, dtype=torch.int64, device=index.device)
    return philox(
        (
            block.expand(size).contiguous(),
            torch.full(size, position, dtype=torch.int64, device=index.device),
            index.bitwise_and(_WORD).expand(size).contiguous(),
            index.bitwise_right_shift(32).bitwise_and_(_WORD).expand(size).contiguous(),
        ),
        key,
    )


def _check(index: Tensor, position: int, elements: int) -> None:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise TypeError(f"index must be an int64 vector, got {index.dtype} of shape {tuple(index.shape)}")
    if not 0 <= position <= _WORD:
        raise ValueError(f"position must be in [0, 2^32), got {position}")
    if elements > 4 * _WORD:
        raise ValueError(f"one draw holds at most 4 * (2^32 - 1) elements, got {elements}")


def _spans(batch: int, blocks: int, device: torch.device) -> list[tuple[int, int, int, int]]:
    """Rectangles (row from, row to, block from, block to) that cover batch x blocks in pieces that fit a cache."""
    if device.type != "cpu" or batch * blocks <= _HOST_CHUNK:
        return [(0, batch, 0, blocks)]
    wide = min(blocks, _HOST_CHUNK)
    tall = max(1, _HOST_CHUNK // wide)
    return [
        (row, min(row + tall, batch), block, min(block + wide, blocks))
        for row in range(0, batch, tall)
        for block in range(0, blocks, wide)
    ]


def uniform(seed: int, purpose: str, index: Tensor, position: int, shape: Sequence[int] = ()) -> Tensor:
    """Uniform float32 [B, *shape] in [0, 1), multiples of 2^-24, on the device of `index` (int64 [B])."""
    count = math.prod(shape)
    _check(index, position, count)
    blocks = -(-count // 4)
    key = cipher_key(seed, purpose)
    out = torch.empty(index.shape[0], blocks, 4, dtype=torch.float32, device=index.device)
    for r0, r1, b0, b1 in _spans(index.shape[0], blocks, index.device):
        for lane, word in enumerate(_words(key, index[r0:r1], position, b0, b1)):
            out[r0:r1, b0:b1, lane] = word.bitwise_right_shift_(8)
    return _trim(out.mul_(2.0**-24), count, shape)


def normal(seed: int, purpose: str, index: Tensor, position: int, shape: Sequence[int] = ()) -> Tensor:
    """Standard normal float32 [B, *shape] on the device of `index` (int64 [B]), |value| < 6.8.

    Box and Muller (1958): each pair of 32-bit words gives a radius sqrt(-2 log u), u = (w + 1/2) 2^-32, and an angle.
    """
    count = math.prod(shape)
    _check(index, position, count)
    blocks = -(-count // 4)
    key = cipher_key(seed, purpose)
    out = torch.empty(index.shape[0], blocks, 4, dtype=torch.float32, device=index.device)
    for r0, r1, b0, b1 in _spans(index.shape[0], blocks, index.device):
        words = _words(key, index[r0:r1], position, b0, b1)
        for lane in (0, 2):
            radius = words[lane].double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
            angle = words[lane + 1].double().mul_(2.0 * math.pi * 2.0**-32)
            out[r0:r1, b0:b1, lane] = angle.cos().mul_(radius)
            out[r0:r1, b0:b1, lane + 1] = angle.sin_().mul_(radius)
    return _trim(out, count, shape)


def integers(seed: int, purpose: str, index: Tensor, position: int, high: int, shape: Sequence[int] = ()) -> Tensor:
    """Uniform int64 [B, *shape] in [0, high), 1 <= high <= 2^31, on the device of `index` (int64 [B]).

    floor(high * u) with u of 64 bits: no value is more likely than another by more than 2^-33.
    """
    if not 1 <= high <= 1 << 31:
        raise ValueError(f"high must be in [1, 2^31], got {high}")
    count = math.prod(shape)
    _check(index, position, count)
    blocks = -(-count // 2)
    key = cipher_key(seed, purpose)
    out = torch.empty(index.shape[0], blocks, 2, dtype=torch.int64, device=index.device)
    for r0, r1, b0, b1 in _spans(index.shape[0], blocks, index.device):
        words = _words(key, index[r0:r1], position, b0, b1)
        for lane in (0, 1):
            low = words[2 * lane + 1].mul_(high).bitwise_right_shift_(32)
            out[r0:r1, b0:b1, lane] = words[2 * lane].mul_(high).add_(low).bitwise_right_shift_(32)
    return _trim(out, count, shape)


def permutation(seed: int, purpose: str, position: int, n: int) -> Tensor:
    """A uniformly random order of 0..n-1: int64 [n] on the host, a pure function of its arguments."""
    ranks = integers(seed, purpose, torch.zeros(1, dtype=torch.int64), position, 1 << 31, (n, 2)).view(n, 2)
    # 62-bit sort keys; two of them are equal with a chance of n^2 / 2^63, and a stable sort decides even that.
    return torch.argsort((ranks[:, 0] << 31) | ranks[:, 1], stable=True)


def _trim(out: Tensor, count: int, shape: Sequence[int]) -> Tensor:
    flat = out.flatten(1)
    return (flat if flat.shape[1] == count else flat[:, :count]).reshape(out.shape[0], *shape)
