"""Figures: what they show can be read from their pixels or from the functions that decide it."""

import io
import itertools
import sys

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from gearshift.evaluation import figures, pareto, placing, plots
from gearshift.evaluation.table import direction


def row(name, policy, macs, speed, fd, psnr=None, **more):
    return {
        "name": name, "policy": policy, "solver": "ddim", "steps": 20, "macs_per_image": macs,
        "macs_saved": 1 - macs / 4e8, "images_per_s": speed, "psnr_to_full": psnr, "fd_classifier_digits": fd, **more,
    }  # fmt: skip


ROWS = [
    row("full", "Full", 4e8, 100.0, 1.25),
    row("exit <0.1> & co", "uncertainty < 0.1", 2.6e8, 150.0, 1.5, 27.3, sd={"fd_classifier_digits": 0.05}),
    row("full, 10 steps", "Full", 2e8, 190.0, 1.8, 25.0),
]


def samples(channels=1, size=8):
    generator = np.random.default_rng(0)
    return {r["name"]: generator.integers(0, 256, (14, channels, size, size), dtype=np.uint8) for r in ROWS}


def picture(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_sample_grid_shows_every_pixel():
    images = samples()["full"]
    shown = picture(plots.sample_grid(images, columns=5))
    assert shown.shape == (3 * 67 + 3, 5 * 67 + 3, 3)
    for k, image in enumerate(images):
        top, left = 3 + (k // 5) * 67, 3 + (k % 5) * 67
        tile = shown[top : top + 64, left : left + 64]
        assert np.array_equal(tile[4::8, 4::8, 0], image[0]) and np.array_equal(tile[..., 0], tile[..., 2])


def test_figures_are_pictures_and_do_not_touch_pyplot():
    loaded = "matplotlib.pyplot" in sys.modules
    per_image = {r["name"]: {"macs_per_image": np.arange(9.0), "mean_depth": np.full(9, 3.0)} for r in ROWS}
    for content in (
        plots.comparison_grid(samples(), ROWS),
        plots.comparison_grid(samples(3, 96), ROWS, columns=1),
        plots.difference_grid(samples(), dict.fromkeys(samples(), "full"))[0],
        pareto.quality_against_cost(ROWS, "fd_classifier_digits"),
        pareto.quality_against_cost([{**ROWS[0], "images_per_s": None}], "fd_classifier_digits"),
        pareto.quality_against_cost(ROWS, "psnr_to_full", quality_marks=["a", "a", "b"], time_marks=["a", "b", "b"]),
        figures.exits_over_time({f"run {k}": np.full((1 + k, 4), k) for k in range(5)}),
        figures.exits_over_time({"never": np.zeros((3, 4), dtype=int)}, called={"never": np.zeros((3, 4), dtype=bool)}),
        figures.distributions(per_image, ROWS),
    ):
        shown = picture(content)
        assert min(shown.shape[:2]) > 200 and shown.std() > 5
        assert shown.shape[1] <= 11 * 150, "wider than a page"
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_names_may_be_anything():
    """Dollars would start a formula, and letters the font lacks warn; long names are cut in their middle."""
    name = "$x_ 模型 " + "long " * 60 + "end$"
    rows = [{**r, "name": f"{name}{k}"} for k, r in enumerate(ROWS)]
    shown = {r["name"]: images for r, images in zip(rows, samples().values(), strict=True)}
    for content in (
        plots.comparison_grid(shown, rows),
        pareto.quality_against_cost(rows, "fd_classifier_digits"),
        figures.exits_over_time({r["name"]: np.ones((3, 4), dtype=int) for r in rows}),
    ):
        assert picture(content).shape[1] <= 11 * 150
    cut = plots.fit("abcdefghij" * 20, 1.0, 9)
    assert plots.text_width(cut, 9) <= 1.0 and cut.startswith("abc") and cut.endswith("hij") and "…" in cut
    assert plots.fit("short", 1.0, 9) == "short" and plots.fit("5 $", 1.0, 9) == r"5 \$"


# Differences ---------------------------------------------------------------------------------------------------------


def test_one_factor_for_all_differences_as_large_as_they_allow():
    assert plots.difference_factor([np.full((10, 10), 3), np.zeros((10, 10))]) == 64
    assert plots.difference_factor([np.full((10, 10), 3), np.full((10, 10), 20)]) == 8
    assert plots.difference_factor([np.full((10, 10), 255)]) == 1
    few = np.zeros(1000)
    few[:4] = 200  # one part in 250 may be cut
    assert plots.difference_factor([few]) == 64


def test_differences_are_absolute_amplified_and_from_the_same_noise():
    full = np.full((12, 1, 16, 16), 100, dtype=np.uint8)
    darker, brighter = full - 10, full + 5
    content, factor = plots.difference_grid(
        {"full": full, "darker": darker, "brighter": brighter, "same": full.copy()},
        {"full": "full", "darker": "full", "brighter": "full", "same": "full"},
    )
    assert factor == 16
    middle = picture(content)[:, -40, 0]  # down the last column of images
    found = [value for value, group in itertools.groupby(middle) if len(list(group)) > 40]
    assert [int(v) for v in found if v != 255] == [100, 160, 80, 0]


def test_rows_are_held_against_their_own_full():
    shown = {
        name: np.full((12, 1, 8, 8), value, dtype=np.uint8)
        for name, value in zip("ABab", (0, 200, 1, 202), strict=True)
    }
    content, factor = plots.difference_grid(shown, {"A": "A", "B": "B", "a": "A", "b": "B"})
    middle = picture(content)[:, -40, 0]
    found = [int(value) for value, group in itertools.groupby(middle) if len(list(group)) > 40]
    assert factor == 64 and [v for v in found if v != 255] == [0, 64, 200, 128]


def test_without_anything_to_compare_there_is_no_difference():
    assert plots.difference_grid(samples(), {}) is None
    assert plots.difference_grid({"a": samples()["full"]}, {"a": "full"}) is None


# Quality against cost ------------------------------------------------------------------------------------------------


def test_the_drawn_measure_prefers_the_comparable_one():
    assert pareto.quality_key(ROWS) == "fd_classifier_digits"
    assert pareto.quality_key([{"name": "a", "fd_random": 1.0, "fid": 2.0}]) == "fid"
    assert pareto.quality_key([{"name": "a", "fd_random": 1.0, "fd_dino": 2.0}]) == "fd_dino"
    assert pareto.quality_key([{"name": "a", "label_agreement": 1.0, "psnr_to_full": 2.0}]) == "label_agreement"
    assert pareto.quality_key([{"name": "full", "ssim_to_full": 1.0, "identical_to_full": 1.0}]) is None
    assert pareto.quality_key([{"name": "a", "recall_vgg16": 0.5}]) == "recall_vgg16"
    assert pareto.quality_key([{"name": "a", "fid": None, "macs_per_image": 3.0}]) is None


def test_front():
    points = [(4.0, 1.0), (2.0, 1.5), (3.0, 2.0), (1.0, 3.0), (2.0, 1.7), (5.0, 1.0)]
    assert pareto.front(points, -1) == [3, 1, 0]
    assert pareto.front([(x, -y) for x, y in points], +1) == [3, 1, 0]
    assert pareto.front([(1.0, 2.0), (1.0, 2.0)], -1) == [0, 1], "equal points do not beat each other"
    assert pareto.front([], 1) == []


@pytest.mark.parametrize("better", [-1, 1])
def test_the_front_is_what_nothing_beats(better):
    """Against the definition, written the other way round, on points with many ties."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        points = [(float(x), float(y)) for x, y in generator.integers(0, 6, (12, 2))]
        found = pareto.front(points, better)
        kept = {points[k] for k in found}
        for x, y in points:
            as_good = {(a, b) for a, b in points if a <= x and (b - y) * better >= 0}
            assert ((x, y) in kept) == (as_good == {(x, y)})
        costs = [points[k][0] for k in found]
        assert costs == sorted(costs)


def test_families_markers_and_trivial_baselines():
    rows = [
        *ROWS,
        row("e2", "uncertainty < 0.25", 1.0, 1.0, 1.0),
        row("d", "depth 4", 1.0, 1.0, 1.0),
        row("s", "schedule (mean depth 5.0)", 1.0, 1.0, 1.0),
    ]
    assert [plots.family(r) for r in rows] == ["Full", "uncertainty", "Full", "uncertainty", "depth", "schedule"]
    assert plots.family({"name": "x", "policy": "7", "family": "mine"}) == "mine" and plots.family({"name": "7"}) == "7"
    assert [plots.is_baseline(r) for r in rows] == [True, False, True, False, False, False]
    policies = {
        "skip < 0.01": "skip",
        "skip (error) < 0.05 extrapolated": "skip (error)",
        "uncertainty < 0.2 + skip < 0.02": "uncertainty + skip",
        "schedule (mean depth 5.0) + skip every 3": "schedule + skip every",
        "attention qk last 3": "attention qk last",
    }
    assert {policy: plots.family({"name": "x", "policy": policy}) for policy in policies} == policies
    styles = plots.looks(rows)
    assert styles[0] == styles[2] == (plots.PLAIN, "o") and styles[1] == styles[3]
    assert len({styles[k] for k in (0, 1, 4, 5)}) == 4
    many = [{"name": f"p{k}", "policy": "abcdefghijklmnopqrstuvwxyz"[k]} for k in range(26)]
    assert len(set(plots.looks(many))) == 26, "colours and markers repeat, but not together"
    both = plots.looks([{**r, "evaluation": e} for e in ("A", "B") for r in ROWS])
    assert [m for _, m in both[:3]] == [m for _, m in both[3:]] and both[0][0] != both[3][0] == both[4][0]


def test_numbers_beside_points_never_overlap():
    figure = plots.new_figure(5, 4)
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    generator = np.random.default_rng(3)
    crowd = [(0.5 + 0.06 * x, 0.5 + 0.06 * y) for x, y in generator.standard_normal((11, 2))]
    points = [(str(k + 1), x, y) for k, (x, y) in enumerate([*crowd, (0.0, 0.0), (1.0, 1.0), (0.3, 0.3), (0.3, 0.3)])]
    placing.label_points(axes, points, [(0.3, 0.2, 0.3, 0.4)])
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines that tie them
    assert len(boxes) == len(points)
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))
    spots = axes.transData.transform([(x, y) for _, x, y in points])
    for box in boxes:
        assert not any(box.contains(x, y) for x, y in spots)
        assert axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1), "outside the panel"


def test_every_named_measure_has_a_side():
    assert all(direction(key) for key in pareto._NAMES)


# Exits and distributions ---------------------------------------------------------------------------------------------


def test_means_are_over_calls_that_ran():
    depth = np.array([[7, 7, 7, 7], [0, 0, 0, 0], [3, 5, 0, 0]])
    assert figures._summary(depth, depth > 0) == "mean depth 6.00, 50 % of calls skipped"
    assert figures._summary(depth, np.ones_like(depth, dtype=bool)) == "mean depth 3.00", "0 blocks are a call, too"
    assert figures._summary(np.zeros((2, 2), dtype=int), np.zeros((2, 2), dtype=bool)) == "100 % of calls skipped"
    assert figures._summary(np.full((2, 2), 4), np.ones((2, 2), dtype=bool)) == "mean depth 4.00"


def test_reuse_is_told_beside_depth_and_skips():
    depth = np.array([[7, 7], [7, 0], [3, 3]])
    reused = np.array([[0, 0], [7, 0], [2, 1]])
    called = depth > 0
    assert figures._summary(depth, called, np.zeros_like(depth)) == figures._summary(depth, called)
    assert figures._summary(depth, called, reused) == "mean depth 5.40, 17 % skipped, 37 % reuse"
    assert figures._summary(depth[::2], called[::2], reused[::2]) == "mean depth 5.00, 15 % of blocks reuse"


def test_blocks_that_reuse_are_hatched():
    """Amber, as high as the mean number of blocks; without reuse the figure is what it was."""
    depth = np.full((6, 8), 4)
    reused = np.zeros_like(depth)
    plain = figures.exits_over_time({"a": depth})
    assert figures.exits_over_time({"a": depth}, {"a": reused}) == plain
    assert figures.exits_over_time({"a": depth}, {}) == plain

    def amber(taken):
        shown = picture(figures.exits_over_time({"a": depth}, {"a": taken})).astype(int)
        return int(((shown[..., 0] - shown[..., 2]) > 60).sum())

    reused[3] = 2
    low = amber(reused) - amber(np.zeros_like(depth))
    reused[3] = 4
    high = amber(reused) - amber(np.zeros_like(depth))
    assert low > 200 and high == pytest.approx(2 * low, rel=0.2)


def test_skipped_calls_are_drawn_as_such():
    """Grey blocks, one per skipped call, where a depth would be blue."""
    depth = np.full((6, 8), 4)
    skipping = depth.copy()
    skipping[[1, 4]] = 0
    grey = np.array([int(plots.MUTED[k : k + 2], 16) for k in (1, 3, 5)])

    def blocks(shown):
        content = figures.exits_over_time({"a": shown}, called={"a": shown > 0})
        same = (np.abs(picture(content).astype(int) - grey).max(axis=2) < 3).sum(axis=0)
        tall = same > 15  # columns of pixels with more grey than text and frames have
        return int((np.diff(tall.astype(int)) == 1).sum())

    assert blocks(skipping) - blocks(depth) == 2


def test_an_exit_before_the_first_block_is_a_depth_and_no_skip():
    """A row of its own, blue where samples left there, below which skipped calls have theirs."""
    depth = np.full((6, 8), 4)
    depth[[1, 4]] = 0
    called = np.ones_like(depth, dtype=bool)
    shown = picture(figures.exits_over_time({"a": depth})).astype(int)
    deep = (shown[..., 2] - shown[..., 0] > 60).sum()
    never = picture(figures.exits_over_time({"a": depth}, called={"a": depth > 0})).astype(int)
    assert deep > 1.2 * (never[..., 2] - never[..., 0] > 60).sum()
    called[2] = False
    assert figures.exits_over_time({"a": depth}, called={"a": called}) != figures.exits_over_time({"a": depth})
    # Shares are of all samples, percentiles of those that were called.
    assert figures._summary(depth, called) == "mean depth 2.40, 17 % of calls skipped"


def test_distributions_need_something_finite():
    nan = np.full(5, np.nan)
    assert figures.distributions({"full": {"psnr_to_full": nan}}, ROWS) is None
    assert figures.distributions({}, ROWS) is None
    spread = {
        "full": {"psnr_to_full": nan, "macs_per_image": np.full(5, 4e8)},
        "exit <0.1> & co": {
            "psnr_to_full": np.array([20.0, 30.0, np.nan, 25.0, 22.0]),
            "macs_per_image": np.full(5, 4e8),
        },
    }
    shown = picture(figures.distributions(spread, ROWS))
    assert shown.shape[1] == 11 * 150 and shown.std() > 5
