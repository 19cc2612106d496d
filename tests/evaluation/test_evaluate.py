"""The evaluator over a small network in memory: which row counts as best, baselines, and timing references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.backbones.uvit import UViT, UViTConfig
from gearshift.data.dataset import ImageDataset, content_digest
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import VPSDE, VPSDEConfig
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.evaluation import evaluate
from gearshift.evaluation.evaluate import EvaluationConfig, Evaluator
from gearshift.evaluation.throughput import BUSY, Timing
from gearshift.policies import Full, Policy
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import Sampler

DEPTH = 5
POLICIES = {
    f"depth {depth}": {"_target_": "gearshift.policies.FixedDepth", "depth": depth} for depth in range(1, DEPTH + 1)
}
SKIP = {"_target_": "gearshift.policies.SkipEvery", "k": 2, "keep_last": False}


def ddim(steps: int) -> dict[str, Any]:
    return {"_target_": "gearshift.diffusion.solvers.ddim.DDIM", "steps": steps, "clip_x0": True}


def network(labels: bool, inert_end: bool) -> UViT:
    """Five blocks; `inert_end` makes the last one the identity, so that depth 4 gives the images of full compute."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = dict(image_size=8, in_channels=1, patch_size=4, embed_dim=8, depth=4, num_heads=2)
        made = UViT(UViTConfig(num_classes=3 if labels else None, **shape))  # type: ignore[arg-type]
        for parameter in made.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    if inert_end:
        last = made.blocks[-1]
        assert last.skip_linear is not None
        for module in (last.attn.proj, last.mlp.fc2, last.skip_linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        with torch.no_grad():
            last.skip_linear.weight[:, :8] = torch.eye(8)
    return made.eval().requires_grad_(False)


def dataset(labels: bool) -> ImageDataset:
    images = torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(16) % 3 if labels else None
    digest = content_digest(images.numpy(), None if classes is None else classes.numpy())
    return ImageDataset(images, classes, 3 if labels else None, (), "noise", "train", digest, "16 images of noise")


class Stub:
    """A classifier whose answers are scripted: the share of right labels for each row, by its number of calls to it."""

    accuracy = 1.0

    def __init__(self, shares: Mapping[int, float] | None = None) -> None:
        self.shares, self.asked = shares or {}, 0

    def predict(self, images: Tensor) -> Tensor:
        right = torch.arange(len(images)) % 3  # labels are balanced
        wrong = round(len(images) * (1 - self.shares.get(self.asked, 1.0)))
        self.asked += 1
        return torch.where(torch.arange(len(images)) < wrong, (right + 1) % 3, right)

    def describe(self) -> str:
        return "a stub"


def evaluator(
    classifier: Stub | None = None, *, labels: bool = False, inert_end: bool = False, **settings: Any
) -> Evaluator:
    denoiser = Denoiser(network(labels, inert_end), VPSDE(VPSDEConfig()))

    def make(policy: Policy, solver: Any, **options: Any) -> Sampler:
        made = Sampler(denoiser, solver, policy, **options)
        made.check()
        return made

    chosen: dict[str, Any] = dict(
        policies=POLICIES,
        solvers={"ddim": ddim(4)},
        num_images=6,
        chunk=6,
        metrics=[],
        timing_images=0,
        equal_macs=False,
    )
    config = EvaluationConfig(**{**chosen, **settings})
    return Evaluator(config, make, dataset(labels), classifier, torch.device("cpu"))  # type: ignore[arg-type]


def rows(e: Evaluator) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in e.results("runs/x", torch.float32)["rows"]}


# Best ----------------------------------------------------------------------------------------------------------------


def test_full_compute_comes_first_and_is_never_sampled_twice() -> None:
    e = evaluator(policies={**POLICIES, "plain": {"_target_": "gearshift.policies.Full"}})
    e.run()
    assert list(e.rows) == ["full", *POLICIES]
    found = rows(e)
    assert found["full"]["psnr_to_full"] is None
    assert found["full"]["identical_to_full"] == 1.0
    assert found["full"]["macs_saved"] == found["depth 5"]["macs_saved"] == 0.0
    saved = [found[name]["macs_saved"] for name in POLICIES]
    assert saved == sorted(saved, reverse=True) and saved[0] > 0.5
    assert [found[name]["mean_depth"] for name in POLICIES] == [1, 2, 3, 4, 5]


def test_without_labels_the_closest_images_are_best() -> None:
    e = evaluator()
    e.run()
    found = rows(e)
    closest = max((name for name in POLICIES if name != "depth 5"), key=lambda name: found[name]["psnr_to_full"])
    assert e.best(list(POLICIES), "full") == closest
    assert all("label_agreement" not in row for row in found.values())


def test_identical_images_come_before_every_psnr() -> None:
    """They have none: psnr_to_full is None, which must not count as the least."""
    e = evaluator(inert_end=True)
    e.run()
    found = rows(e)
    assert found["depth 4"]["psnr_to_full"] is None
    assert found["depth 4"]["identical_to_full"] == 1.0
    assert found["depth 4"]["macs_saved"] > 0
    assert all(found[f"depth {depth}"]["psnr_to_full"] is not None for depth in (1, 2, 3))
    assert e.best(list(POLICIES), "full") == "depth 4"
    assert e.best(list(reversed(POLICIES)), "full") == "depth 4"
    assert e.best(["depth 1", "depth 5"], "full") == "depth 1", "depth 5 is identical too, but saves nothing"


@pytest.mark.parametrize("labels", [False, True])
def test_rows_that_skip_calls_are_no_exits(labels: bool) -> None:
    """Held predictions save the most of all here and would win; fewer steps are what they should be set against."""
    e = evaluator(Stub() if labels else None, labels=labels, policies={"skip": SKIP, "depth 4": POLICIES["depth 4"]})
    e.run()
    found = rows(e)
    assert found["skip"]["macs_saved"] == pytest.approx(0.5)
    assert found["skip"]["calls"] == 2
    assert found["depth 4"]["macs_saved"] < 0.5
    assert e.best(["skip", "depth 4"], "full") == "depth 4"
    assert e.best(["skip"], "full") is None


def test_with_labels_the_cheapest_within_the_tolerance_is_best() -> None:
    shares = {0: 1.0, 1: 0.5, 2: 4 / 6, 3: 5 / 6, 4: 1.0, 5: 1.0}  # full, depth 1..5
    for tolerance, best in ((60.0, "depth 1"), (34.0, "depth 2"), (17.0, "depth 3"), (0.0, "depth 4")):
        e = evaluator(Stub(shares), labels=True, tolerance=tolerance)
        e.run()
        assert rows(e)["depth 2"]["label_agreement"] == pytest.approx(4 / 6)
        assert e.best(list(POLICIES), "full") == best


def test_where_no_row_is_within_the_tolerance_psnr_decides() -> None:
    e = evaluator(Stub({0: 1.0, **dict.fromkeys(range(1, 6), 0.0)}), labels=True, inert_end=True)
    e.run()
    assert e.best(list(POLICIES), "full") == "depth 4"


# Baselines -----------------------------------------------------------------------------------------------------------


def test_fewer_steps_at_the_macs_of_the_best_exit() -> None:
    policies = {"skip": SKIP, "depth 3": POLICIES["depth 3"]}
    e = evaluator(policies=policies, solvers={"ddim": ddim(10)}, equal_macs=True)
    e.run()
    found = rows(e)
    [fewer] = [row for row in found.values() if "equal_macs_to" in row]
    assert fewer["equal_macs_to"] == "depth 3"
    assert fewer["steps"] == round(10 * (1 - found["depth 3"]["macs_saved"]))
    assert fewer["name"] == f"full, {fewer['steps']} steps"
    assert fewer["macs_saved"] == pytest.approx(1 - fewer["steps"] / 10)
    assert fewer["psnr_to_full"] is not None, "compared with full compute at all steps"


def test_no_baseline_where_nothing_is_saved() -> None:
    e = evaluator(policies={"skip": SKIP, "depth 5": POLICIES["depth 5"]}, equal_macs=True)
    e.run()
    assert list(e.rows) == ["full", "skip", "depth 5"]


# Time ----------------------------------------------------------------------------------------------------------------


def test_two_entries_of_one_solver_have_a_reference_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are called ddim: full compute at 2 steps must not be what 6 steps are held against."""
    ran: list[str] = []

    def fake(methods: Any, rounds: int, device: Any, *, on_run: Any) -> Any:
        """Seconds are calls times depth, and every other round is disturbed."""
        timings = {}
        for name, method in methods.items():
            chunk = method()
            ran.append(name)
            assert len(chunk.index) == 2
            seconds = float(chunk.ledger.depth[:, 0, 0].sum())
            timings[name] = Timing(tuple(seconds * (3 if number % 2 else 1) for number in range(rounds)))
            on_run(name)
        return timings, BUSY + 0.1

    monkeypatch.setattr(evaluate, "interleave", fake)
    solvers = {"two": ddim(2), "six": ddim(6)}
    e = evaluator(
        policies={"depth 3": POLICIES["depth 3"]},
        solvers=solvers,
        timing_images=2,
        timing_rounds=3,
        equal_macs=True,
    )
    e.run()
    found = rows(e)
    assert {row["solver"] for row in found.values()} == {"ddim"}
    steps = {name: row["steps"] for name, row in found.items()}
    fewer = [name for name in found if name.startswith("full, ") and name.endswith("@ six")]
    assert steps["full @ two"] == steps["depth 3 @ two"] == 2
    assert steps["full @ six"] == steps["depth 3 @ six"] == 6
    assert ran == list(found)
    for solver in ("two", "six"):
        full, exits = found[f"full @ {solver}"], found[f"depth 3 @ {solver}"]
        assert (full["speedup"], full["time_saved"], full["macs_saved"]) == (1.0, 0.0, 0.0)
        assert full["saving_realised"] is None
        assert exits["speedup"] == pytest.approx(DEPTH / 3)
        assert exits["time_saved"] == pytest.approx(1 - 3 / DEPTH)
        assert exits["saving_realised"] == pytest.approx(exits["time_saved"] / exits["macs_saved"])
    assert found["full @ two"]["images_per_s"] == pytest.approx(2 / (2 * DEPTH))
    assert found["full @ six"]["images_per_s"] == pytest.approx(2 / (6 * DEPTH))
    assert len(fewer) == 1
    assert found[fewer[0]]["speedup"] == pytest.approx(6 / steps[fewer[0]])
    assert found[fewer[0]]["equal_macs_to"] == "depth 3 @ six"
    results = e.results("runs/x", torch.float32)
    assert any("20% of the CPU time" in warning for warning in results["warnings"])
    assert results["conditions"]["batch"] == 2


def test_each_solver_is_compared_with_its_own_full_run() -> None:
    e = evaluator(policies={"depth 5": POLICIES["depth 5"]}, solvers={"two": ddim(2), "six": ddim(6)})
    e.run()
    found = rows(e)
    assert not torch.equal(e.rows["full @ two"].images, e.rows["full @ six"].images)
    for solver in ("two", "six"):
        assert found[f"depth 5 @ {solver}"]["identical_to_full"] == 1.0
        assert found[f"depth 5 @ {solver}"]["macs_saved"] == 0.0


def test_no_times_without_timing() -> None:
    e = evaluator(policies={})
    e.run()
    assert e.results("runs/x", torch.float32)["conditions"] == {}
    assert "speedup" not in rows(e)["full"]


# What is shown and refused -------------------------------------------------------------------------------------------


def test_rows_are_the_images_of_the_sampler() -> None:
    e = evaluator(num_images=5, chunk=2, start=3)
    e.run()
    sampler = replace(e.rows["full"].sampler, solver=DDIM(DDIMConfig(steps=4, clip_x0=True)), policy=Full())
    from gearshift.data.pixels import to_u8
    from gearshift.sampling.loop import sample

    wanted = torch.cat([to_u8(chunk.images) for chunk in sample(sampler, 5, start=3)])
    assert torch.equal(e.rows["full"].images, wanted)
    images, depths = e.pictures()
    assert images["full"].shape == (5, 1, 8, 8)
    assert depths["depth 2"].shape == (4, 5) and (depths["depth 2"] == 2).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solvers": {}}, "solvers is empty"),
        ({"num_images": 1}, "num_images=1 must be at least 2"),
        ({"timing_rounds": 0}, "timing_rounds=0 must be at least 1"),
        ({"metrics": ["fid"]}, r"names \['fid'\]; there are classifier"),
    ],
)
def test_settings_that_make_no_evaluation(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluator(**settings)


def test_everything_is_checked_before_the_first_image() -> None:
    e = evaluator(policies={**POLICIES, "deep": {"_target_": "gearshift.policies.FixedDepth", "depth": 9}})
    with pytest.raises(UsageError, match="asks for depth 9"):
        e.run()
    assert e.rows == {}
