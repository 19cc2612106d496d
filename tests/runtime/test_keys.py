"""Keyed randomness: the cipher's published answers, and that a draw is a function of its key and of nothing else."""

import math

import pytest
import torch

from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError

FULL = 0xFFFFFFFF
# From the file kat_vectors of the Random123 library, philox4x32 with ten rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_of_integers(counter, key):
    """The cipher in Python integers, straight from section 3.3 of the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & FULL, (p0 >> 32) ^ c3 ^ k1, p0 & FULL
        k0, k1 = (k0 + 0x9E3779B9) & FULL, (k1 + 0xBB67AE85) & FULL
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, answer):
    words = keys.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == answer
    assert philox_of_integers(counter, key) == answer


def test_counter_holds_block_position_and_both_halves_of_the_index():
    index = torch.tensor([5, (7 << 32) + 11, -1])
    values = keys.uniform(3, "noise", index, 19, (9,))
    for row, (low, high) in enumerate([(5, 0), (11, 7), (FULL, FULL)]):
        words = [
            w for block in range(3) for w in philox_of_integers((block, 19, low, high), keys.cipher_key(3, "noise"))
        ]
        expected = torch.tensor([(word >> 8) * 2.0**-24 for word in words[:9]], dtype=torch.float32)
        assert torch.equal(values[row], expected)


@pytest.mark.parametrize("draw", [keys.uniform, keys.normal, lambda *a: keys.integers(*a[:4], 1000, a[4])])
def test_a_draw_does_not_depend_on_the_rest_of_the_batch(draw):
    index = torch.arange(1000, 1257)
    whole = draw(1, "noise", index, 2, (3, 17, 5))
    again = draw(1, "noise", index, 2, (3, 17, 5))
    assert torch.equal(whole, again)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    for rows in (order, order[:1], order[3:10], torch.tensor([4, 4, 250])):
        assert torch.equal(draw(1, "noise", index[rows], 2, (3, 17, 5)), whole[rows])


def test_a_draw_does_not_depend_on_how_it_is_cut_up_or_on_threads(monkeypatch):
    index = torch.arange(7)
    whole = keys.normal(1, "noise", index, 0, (1001,))
    threads = torch.get_num_threads()
    try:
        for chunk, count in ((1, 1), (13, 2), (1 << 30, 2)):
            monkeypatch.setattr(keys, "_HOST_CHUNK", chunk)
            torch.set_num_threads(count)
            assert torch.equal(keys.normal(1, "noise", index, 0, (1001,)), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("draw", [keys.uniform, keys.normal, lambda *a: keys.integers(*a[:4], 9, a[4])])
def test_a_longer_draw_begins_with_the_shorter_one(draw):
    index = torch.arange(3)
    long = draw(0, "noise", index, 0, (2, 3, 7)).flatten(1)
    for count in (1, 2, 5, 41):
        assert torch.equal(draw(0, "noise", index, 0, (count,)), long[:, :count])
    assert draw(0, "noise", index, 0, ()).shape == (3,)
    assert torch.equal(draw(0, "noise", index, 0, ()), long[:, 0])
    assert draw(0, "noise", torch.arange(0), 0, (2, 3)).shape == (0, 2, 3)


def test_any_part_of_the_key_changes_the_draw():
    base = dict(seed=0, purpose="noise", index=torch.tensor([0]), position=0)
    others = [
        dict(seed=1),
        dict(seed=1 << 63),
        dict(purpose="time"),
        dict(purpose="init_noise"),
        dict(index=torch.tensor([1])),
        dict(index=torch.tensor([1 << 32])),
        dict(position=1),
        dict(position=(1 << 32) - 1),
    ]
    draws = [keys.normal(**{**base, **other}, shape=(64,)) for other in [{}, *others]]
    for a in range(len(draws)):
        for b in range(a):
            assert not (draws[a] == draws[b]).any(), (a, b)


def test_no_two_draws_of_a_run_share_a_value():
    """2^15 draws of 64 bits over purposes, positions and indices: a shared counter would show as an equal value."""
    index = torch.arange(256)
    seen = torch.cat(
        [
            keys.integers(5, purpose, index, position, 1 << 31, (2,))
            for purpose in (
                "noise",
                "time",
                "label_dropout",
                "flip",
                "latent",
                "init_noise",
                "step_noise",
                "sample_label",
            )
            for position in range(16)
        ]
    )
    assert torch.unique(seen, dim=0).shape[0] == seen.shape[0] == 8 * 16 * 256


def test_uniform_is_uniform():
    values = keys.uniform(0, "time", torch.arange(1000), 0, (1000,)).double()
    assert values.min() >= 0 and values.max() < 1
    # Six standard errors of the mean, the variance and the occupation of 100 bins.
    assert abs(values.mean() - 0.5) < 6 * math.sqrt(1 / 12 / 1e6)
    assert abs(values.var() - 1 / 12) < 6 * math.sqrt(1 / 180 / 1e6)
    bins = torch.histc(values, 100, 0, 1)
    assert ((bins - 1e4).abs() < 6 * math.sqrt(1e4)).all()


def test_normal_has_the_moments_and_the_quantiles_of_a_normal():
    values = keys.normal(0, "noise", torch.arange(1000), 0, (1000,)).double().flatten()
    n = values.numel()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) - moment**2)
        assert abs(values.pow(power).mean() - moment) < 6 * spread / math.sqrt(n)
    for z in (-3.0, -1.0, 0.5, 2.0):
        p = 0.5 * math.erfc(-z / math.sqrt(2))
        assert abs((values < z).double().mean() - p) < 6 * math.sqrt(p * (1 - p) / n)
    pairs = values.view(-1, 2)
    for a, b in ((pairs[:, 0], pairs[:, 1]), (values[:-1], values[1:]), (values[:-1000], values[1000:])):
        assert abs((a * b).mean()) < 6 / math.sqrt(a.numel())
        assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 6 * 2 / math.sqrt(a.numel())


def test_normal_is_box_and_muller_of_the_words():
    words = philox_of_integers((0, 4, 6, 0), keys.cipher_key(9, "noise"))
    radius = [math.sqrt(-2 * math.log((words[lane] + 0.5) / 2**32)) for lane in (0, 2)]
    angle = [2 * math.pi * words[lane] / 2**32 for lane in (1, 3)]
    expected = [f(a) * r for r, a in zip(radius, angle, strict=True) for f in (math.cos, math.sin)]
    torch.testing.assert_close(
        keys.normal(9, "noise", torch.tensor([6]), 4, (4,))[0], torch.tensor(expected, dtype=torch.float32)
    )


@pytest.mark.parametrize("high", [1, 2, 10, 1000, 1 << 31])
def test_integers_are_uniform_below_their_bound(high):
    values = keys.integers(0, "label", torch.arange(500), 0, high, (400,))
    assert values.dtype == torch.int64 and values.shape == (500, 400)
    assert values.min() >= 0 and values.max() < high
    assert abs(values.double().mean() - (high - 1) / 2) <= 6 * high * math.sqrt(1 / 12 / 2e5)
    if high <= 1000:
        counts = torch.bincount(values.flatten(), minlength=high).double()
        assert ((counts - 2e5 / high).abs() <= 6 * math.sqrt(2e5 / high)).all()


def test_permutation_is_one_and_depends_on_its_key():
    for n in (0, 1, 2, 1797):
        order = keys.permutation(0, "order", 3, n)
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(n))
    orders = [keys.permutation(s, "order", p, 100) for s in (0, 1) for p in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(keys.permutation(1, "order", 1, 100), orders[-1])


def test_permutation_puts_every_element_everywhere():
    n, draws = 6, 3000
    counts = torch.zeros(n, n)
    for position in range(draws):
        counts[torch.arange(n), keys.permutation(0, "order", position, n)] += 1
    assert ((counts - draws / n).abs() < 6 * math.sqrt(draws / n)).all()


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_out_of_range_is_a_usage_error(seed):
    with pytest.raises(UsageError, match=rf"seed={seed}"):
        keys.uniform(seed, "noise", torch.arange(2), 0)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="int64 vector"):
        keys.uniform(0, "noise", torch.arange(2.0), 0)
    with pytest.raises(ValueError, match="position"):
        keys.normal(0, "noise", torch.arange(2), -1)
    with pytest.raises(ValueError, match="high"):
        keys.integers(0, "noise", torch.arange(2), 0, 0)


@pytest.mark.gpu
def test_cuda_and_host_draw_the_same():
    index = torch.arange(300)
    there = index.cuda()
    assert torch.equal(keys.uniform(0, "a", there, 1, (3, 32, 32)).cpu(), keys.uniform(0, "a", index, 1, (3, 32, 32)))
    assert torch.equal(keys.integers(0, "a", there, 1, 10, (7,)).cpu(), keys.integers(0, "a", index, 1, 10, (7,)))
    here, far = keys.normal(0, "a", index, 1, (3, 32, 32)), keys.normal(0, "a", there, 1, (3, 32, 32)).cpu()
    torch.testing.assert_close(far, here, rtol=2e-7, atol=1e-12)
    assert (far != here).float().mean() < 1e-5
