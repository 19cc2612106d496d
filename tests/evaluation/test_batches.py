import pytest
import torch
from torch.nn import functional as F

from gearshift.evaluation.batches import exact_fp32, in_batches
from gearshift.runtime import keys

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product(rows=48):
    """A matrix product whose bits depend on the number of threads: long sums, few outputs."""
    x = keys.normal(0, "x", torch.arange(rows), 0, (4096,))
    weight = keys.normal(0, "weight", torch.arange(64), 0, (4096,))
    return x, lambda part: F.linear(part, weight)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads_and_the_number_is_restored(threads):
    x, linear = product()
    torch.set_num_threads(1)
    expected = torch.cat([linear(part) for part in x.split(16)])
    torch.set_num_threads(threads)
    assert torch.equal(torch.cat(in_batches(linear, [x], 16, CPU)), expected)
    assert torch.get_num_threads() == threads
    # What threads to come will start with is restored too.
    assert in_batches(lambda part: torch.get_num_threads(), [x], 16, CPU) == [1, 1, 1]
    seen = []
    from threading import Thread

    later = Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [threads]


def test_an_error_passes_through_and_restores_the_threads():
    torch.set_num_threads(3)

    def broken(part):
        raise ZeroDivisionError

    flags = [torch.backends.cuda.matmul.fp32_precision, torch.is_grad_enabled()]
    with pytest.raises(ZeroDivisionError):
        in_batches(broken, [torch.zeros(8)], 2, CPU)
    assert torch.get_num_threads() == 3
    assert [torch.backends.cuda.matmul.fp32_precision, torch.is_grad_enabled()] == flags


def test_batches_are_whole_in_order_and_several_tensors_go_together():
    torch.set_num_threads(2)
    a, b = torch.arange(7), torch.arange(7) * 10
    assert in_batches(lambda x, y: (x + y).tolist(), [a, b], 3, CPU) == [[0, 11, 22], [33, 44, 55], [66]]
    assert in_batches(lambda x: x, [a[:0]], 3, CPU) == []
    with pytest.raises(ValueError, match="zip"):
        in_batches(lambda x, y: x, [a, b[:3]], 3, CPU)


def test_what_holds_outside_does_not_hold_inside():
    x = torch.ones(4, 4, requires_grad=True)

    def look(part):
        return (
            (part @ part.T).dtype,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.mkldnn.conv.fp32_precision,
        )

    torch.set_num_threads(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert set(in_batches(look, [x], 2, CPU)) == {(torch.float32, False, False, "ieee")}
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    with torch.inference_mode():
        [first, _] = in_batches(lambda part: part * 2, [torch.ones(4)], 2, CPU)
    assert not first.requires_grad


def test_precision_switches_are_strict_inside_and_restored_after():
    backends = torch.backends
    places = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_fp32(CPU):
            assert {place.fp32_precision for place in places} == {"ieee"}
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
            assert not torch.is_grad_enabled()
        assert {place.fp32_precision for place in places} == {"tf32"}
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
