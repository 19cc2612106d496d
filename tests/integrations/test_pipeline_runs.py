"""Imported pipelines: sampled, evaluated and planned for as our own runs are."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import gearshift
from gearshift import cli
from gearshift.execution.plan import StepPlan
from gearshift.integrations.diffusers.loaded import LoadedPipeline
from gearshift.integrations.diffusers.model import PipelineConfig, PipelineModel
from gearshift.integrations.diffusers.replay import Listed, PipelineStepper
from gearshift.integrations.diffusers.sampler import PipelineSampler
from gearshift.integrations.diffusers.scheduler import PipelineSolver, PipelineSolverConfig
from gearshift.policies import AttentionReuse, DeepFeatureReuse, Full, Planned, SkipEvery
from gearshift.runtime.errors import UsageError
from gearshift.sampling.prompts import Texts

from ..captioned import save_squares
from .tiny import CASES, TEXTS, photos

STEPS = 6
SIZE = {"height": 16, "width": 16}


def model_of(name: str, **call: Any) -> PipelineModel:
    """A tiny pipeline as `api.load` would give it."""
    return PipelineModel(PipelineConfig(name, call=call), CASES[name].build())


def sampler_of(model: PipelineModel, steps: int = STEPS, scheduler: str | None = None, **more: Any) -> PipelineSampler:
    solver = PipelineSolver(PipelineSolverConfig(steps=steps, scheduler=scheduler))
    given: dict[str, Any] = {"policy": Full(), "chunk": 3, "guidance": 5.0, **more}
    if model.takes == "text":
        given.setdefault("prompts", Texts.listed(TEXTS, "the tests"))
    return PipelineSampler(model, solver, **given)


@pytest.fixture(scope="module")
def sd() -> PipelineModel:
    return model_of("sd", **SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion, saved."""
    place = tmp_path_factory.mktemp("pipelines") / "sd"
    CASES["sd"].build().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> str:
    return answer("import", f"pipeline={folder}", f"runs_dir={folder.parent}", "+call={height: 16, width: 16}")["run"]


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    file = folder.parent / "prompts.txt"
    file.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return file


def answer(*words: str) -> dict[str, Any]:
    """The JSON line of a command."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.run(list(words)) == 0
    found: dict[str, Any] = json.loads(out.getvalue().strip().splitlines()[-1])
    return found


# Sampler -----------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_index_and_its_prompt_alone(sd: PipelineModel) -> None:
    sampler = sampler_of(sd)
    table = sampler.cost_table()
    together = sampler.generate(torch.arange(3), table).images
    other = sampler.generate(torch.arange(1, 4), table).images
    torch.testing.assert_close(together[1:], other[:2], rtol=1e-4, atol=1e-4)
    # The prompts begin again after four images, the noise does not.
    again = sampler.generate(torch.arange(4, 7), table).images
    assert not torch.allclose(together[0], again[0], atol=1e-3)
    assert sampler.asked(torch.arange(8)).texts == [*TEXTS, *TEXTS]
    assert len(set(sampler.asked(torch.arange(100)).seeds)) == 100


def test_the_calls_are_known_beforehand(sd: PipelineModel) -> None:
    for scheduler in (None, "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"):
        sampler = sampler_of(sd, scheduler=scheduler)
        sampler.check()
        ledger = sampler.generate(torch.arange(3), sampler.cost_table()).ledger
        assert [call.time for call in sampler.calls()] == pytest.approx(ledger.time.tolist())
        assert [call.log_snr for call in sampler.calls()] == pytest.approx(ledger.log_snr.tolist())


@pytest.mark.parametrize("name", ["sd", "dit", "ddim", "sd_img2img"])
def test_full_compute_counts_nothing_as_saved(name: str, tmp_path: Path) -> None:
    call: dict[str, Any] = SIZE if name == "sd" else {}
    if name == "sd_img2img":  # begins late, from a picture that is the same for all
        photos(1, 16)[0].save(tmp_path / "photo.png")
        call = {"image": str(tmp_path / "photo.png"), "strength": 0.7}
    sampler = sampler_of(model_of(name, **call), chunk=2)
    sampler.check()
    chunk = sampler.generate(torch.arange(2), sampler.cost_table())
    total = len(sampler.calls())
    assert total == (4 if name == "sd_img2img" else STEPS)
    assert chunk.images.shape[0] == 2 and chunk.images.ndim == 4 and bool(chunk.images.isfinite().all())
    assert chunk.ledger.macs_saved == 0 and chunk.ledger.full_macs_per_image > 0
    assert chunk.ledger.called.shape[0] == total
    half = replace(sampler, policy=SkipEvery(2)).generate(torch.arange(2), sampler.cost_table()).ledger
    assert half.macs_saved == pytest.approx((total // 2 - 1) / total)


def test_what_does_not_fit_is_refused(sd: PipelineModel, run: str) -> None:
    with pytest.raises(UsageError, match="takes text; give prompts=FILE"):
        sampler_of(sd, prompts=None).check()
    with pytest.raises(UsageError, match="solver=pipeline"):
        gearshift.load(run).sampler("full", "ddim", prompts=list(TEXTS))
    with pytest.raises(UsageError, match="guidance_interval"):
        sampler_of(sd, guidance_interval=(0.0, 1.0)).check()
    with pytest.raises(UsageError, match="no scheduler of diffusers"):
        sampler_of(sd, scheduler="NoScheduler").check()
    with pytest.raises(UsageError, match="takes image beside prompts"):
        model_of("sd_img2img")
    with pytest.raises(UsageError, match="cannot be fetched from the hub"):
        LoadedPipeline.open(type("Folder", (), {"config": OmegaConf.create({"pipeline": "/nowhere/at/all"})})(), "cpu")


# Going on from the middle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd", None),
        ("sd", "EulerDiscreteScheduler"),
        ("sd", "DPMSolverMultistepScheduler"),
        ("sd", "UniPCMultistepScheduler"),
        ("dit", None),
        ("ddim", None),
    ],
)
def test_a_schedule_goes_on_from_any_place_as_if_it_had_begun_there(name: str, scheduler: str | None) -> None:
    model = model_of(name, **(SIZE if name == "sd" else {}))
    sampler = sampler_of(model, chunk=2, scheduler=scheduler, latents=True)
    sampler.check()
    keys = {(block, "output") for block, part in model.network.parts() if part == "output"}
    deep = {(0, "block")} if name == "dit" else {(len(model.network.blocks) - 2, "block")}
    plans = [
        StepPlan(),
        StepPlan(reuse=frozenset(keys)),
        StepPlan(),
        StepPlan(reuse=frozenset(deep)),
        StepPlan(call=False, forecast=1),
        StepPlan(),
    ]
    index = torch.arange(2)
    stepper = PipelineStepper(sampler, index, frozenset(keys | deep))
    sampler.cost_table()
    points = {0: stepper.begin()}
    counted: list[int] = []
    whole = stepper.finish(plans, points, 1, lambda: counted.append(1))
    assert sorted(points) == list(range(STEPS)) and len(counted) == STEPS
    plain = sampler.denoiser.run(sampler.asked(index), sampler.solver, Listed(plans, frozenset(keys | deep)))[1]
    assert plain.complete
    for start in range(1, STEPS):
        counted.clear()
        known = {k: point for k, point in points.items() if k <= start}
        assert torch.equal(stepper.finish(plans, known, 1, lambda: counted.append(1)), whole), start
        assert len(counted) == STEPS - start
    # Another way from the same place, which is not disturbed by it.
    other = [*plans[:3], StepPlan(call=False), StepPlan(), StepPlan()]
    known = {k: point for k, point in points.items() if k <= 3}
    changed = stepper.finish(other, dict(known), 1, lambda: None)
    assert torch.equal(changed, stepper.finish(other, {0: stepper.begin()}, 1, lambda: None))
    assert not torch.equal(changed, whole)
    assert torch.equal(stepper.finish(plans, dict(known), 1, lambda: None), whole)


def test_latents_are_those_that_the_images_are_decoded_from(sd: PipelineModel) -> None:
    index = torch.arange(3)
    sampler = sampler_of(sd, latents=True, policy=AttentionReuse(operator="output", interval=2))
    latents = sampler.generate(index, sampler.cost_table()).images
    decoded = sd.pipe.vae.decode(latents / sd.pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    images = sampler_of(sd, policy=AttentionReuse(operator="output", interval=2)).generate(index, sampler.cost_table())
    torch.testing.assert_close(decoded, images.images, rtol=1e-4, atol=1e-4)


# Verbs -----------------------------------------------------------------------------------------------------------


def test_import_says_what_the_pipeline_is(run: str, folder: Path) -> None:
    found = answer("import", f"pipeline={folder}", f"runs_dir={folder.parent}", "+call={height: 16, width: 16}")
    assert found["run"] == run and found["pipeline"] == "StableDiffusionPipeline" and found["takes"] == "text"
    assert found["blocks"][0] == "down.0.0" and "mid" in found["blocks"]
    assert found["params"] == sum(p.numel() for p in CASES["sd"].build().unet.parameters())


def test_evaluate_compares_policies_on_prompts(run: str, prompts: Path, tmp_path: Path) -> None:
    found = answer(
        "evaluate",
        f"run={run}",
        f"prompts={prompts}",
        "evaluation=pipeline",
        f"evaluation.solvers.pipeline.steps={STEPS}",
        "evaluation.num_images=4",
        "evaluation.chunk=2",
        "evaluation.timing_images=2",
        "evaluation.timing_rounds=1",
        "+evaluation.policies.deep={_target_: gearshift.policies.DeepFeatureReuse, interval: 3}",
        f"out={tmp_path / 'report'}",
    )
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["full"]["macs_saved"] == 0 and rows["full"]["identical_to_full"] == 1
    assert rows["skip every 2"]["macs_saved"] == pytest.approx(2 / STEPS)
    for name in ("skip every 2", "attention output", "deep"):
        row = rows[name]
        assert 10 < row["psnr_to_full"] < 100 and 0 < row["ssim_to_full"] <= 1 and row["images_per_s"] > 0
        assert 0 < row["macs_saved"] < 1
    fewer = next(row for row in rows.values() if row.get("baseline") == "fewer_steps")
    assert fewer["macs_per_image"] <= max(row["macs_per_image"] for row in rows.values() if row is not fewer)
    report = (
        json.loads((tmp_path / "report" / "results.json").read_text())
        if (tmp_path / "report" / "results.json").is_file()
        else found
    )
    assert "rows" in report
    ledger = np.load(tmp_path / "report" / "ledgers" / "skip-every-2.npz")
    assert ledger["called"].shape == (STEPS, 2, 4) and ledger["called"].any(1).sum() == 4 * (STEPS - 2)


def test_captions_are_prompts_and_their_images_what_is_compared_with(folder: Path, tmp_path: Path) -> None:
    root = save_squares(tmp_path / "squares", size=16)
    data = ["data=captions", f"data.path={root}", "data.size=16"]
    found = answer("import", f"pipeline={folder}", f"runs_dir={tmp_path}", "+call={height: 16, width: 16}", *data)
    loaded = gearshift.load(found["run"])
    prompts = loaded.prompts("data")
    assert prompts.texts[0] == loaded.prompts([prompts.texts[0]]).texts[0] and "first captions" in prompts.describe()
    told = answer(
        "evaluate",
        f"run={found['run']}",
        "prompts=data",
        "evaluation=pipeline",
        "evaluation.metrics=[fd@random_conv]",
        "evaluation.min_images=2",
        f"evaluation.solvers.pipeline.steps={STEPS}",
        "evaluation.num_images=2",
        "evaluation.chunk=2",
        "evaluation.timing_images=0",
        "evaluation.equal_macs=false",
    )
    for row in told["rows"]:
        assert any(name.startswith("fd_random") and value > 0 for name, value in row.items() if value is not None)


def test_a_plan_is_made_and_carried_out(run: str, prompts: Path, tmp_path: Path) -> None:
    place = tmp_path / "plan.yaml"
    made = answer(
        "plan",
        f"run={run}",
        f"prompts={prompts}",
        "solver=pipeline",
        f"solver.steps={STEPS}",
        "guidance=5",
        "budget=0.6",
        "images=2",
        "trial_images=1",
        "validation=2",
        "evaluations=8",
        "space=[steps,blocks]",
        "rivals=false",
        f"output={place}",
    )
    assert made["macs_fraction"] <= 0.6 and place.is_file()
    plan = Planned(file=str(place))
    loaded = gearshift.load(run)
    sampler = loaded.sampler(
        plan, PipelineSolver(PipelineSolverConfig(steps=STEPS)), prompts=list(TEXTS), guidance=5.0, chunk=2, seed=1
    )
    ledger = sampler.generate(torch.arange(2), sampler.cost_table()).ledger
    assert 1 - ledger.macs_saved == pytest.approx(made["macs_fraction"])
    assert ledger.called.any(axis=(1, 2)).tolist() == [bool(flag) for flag in plan.call]
    with pytest.raises(UsageError, match="made for 6 calls of pipeline, and this run has 5"):
        loaded.sampler(plan, PipelineSolver(PipelineSolverConfig(steps=5)), prompts=list(TEXTS), guidance=5.0)


def test_sample_writes_images(run: str, prompts: Path, tmp_path: Path) -> None:
    found = answer(
        "sample",
        f"run={run}",
        f"prompts={prompts}",
        "solver=pipeline",
        f"solver.steps={STEPS}",
        "guidance=5",
        "num_images=3",
        "chunk=2",
        "policy=skip_every",
        f"out={tmp_path}",
    )
    assert np.load(found["images"])["arr_0"].shape == (3, 16, 16, 3) and found["macs_saved"] > 0


def test_verbs_for_our_own_networks_say_so(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", f"run={run}"]) != 0
    assert "the run is the pipeline" in capsys.readouterr().err
    assert cli.run(["import"]) != 0
    assert "weights=FILE or pipeline=FOLDER" in capsys.readouterr().err


def test_the_example_script(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    script = Path(__file__).parents[2] / "experiments" / "adaptive_skipping" / "pipeline.py"
    monkeypatch.setattr(
        sys, "argv", ["pipeline.py", str(folder), "a cat", "height=16", "width=16", "num_inference_steps=8"]
    )
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "image.png").is_file()
    assert "8 steps" in capsys.readouterr().out


def test_deep_features_of_a_run(sd: PipelineModel) -> None:
    sampler = sampler_of(sd, policy=DeepFeatureReuse(interval=2))
    ledger = sampler.generate(torch.arange(3), sampler.cost_table()).ledger
    assert 0 < ledger.macs_saved < 0.5 and ledger.kept_bytes > 0
    # Only the last block runs; the one before comes from memory, and nobody reads the others.
    assert ledger.reused[0].max() == 0 and ledger.reused[1].min() == len(sd.network.blocks) - 1
