"""`gearshift profile` of networks with stages: the published numbers, and sentences about what is saved."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir
from gearshift.verbs import profile as verb

VP_SOLVER = "solver=dpm_singlestep20"


def profiled(*overrides: str, **settings: Any) -> dict[str, Any]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("profile", overrides=list(overrides))
    OmegaConf.set_struct(cfg, False)
    cfg.update({"baseline": None, "images": None, "baseline_images": None, **settings})
    return verb.run(cfg)


def test_one_path_has_no_stages() -> None:
    found = profiled("backbone=uvit_digits")
    assert set(found) == {
        "backbone", "params", "params_active", "params_stored", "gmacs", "gmacs_conv_linear", "gflops", "exits",
        "parts", "policy",
    }  # fmt: skip
    assert found["params_stored"] == found["params"] == 375_886


@pytest.mark.slow
def test_the_vp_network() -> None:
    found = profiled("backbone=multi_decoder_vp", "process=vp", VP_SOLVER)
    stages = found["stages"]
    assert [stage["params_active"] for stage in stages] == [169_478_467, 107_521_411, 47_134_707]
    assert [stage["sigma"][0] for stage in stages] == [0.0, 2.51027, 7.40458]
    assert [round(stage["gmacs_conv_linear"], 2) for stage in stages] == [29.93, 17.64, 6.31]
    assert [stage["gmacs"] for stage in stages] == pytest.approx([30.99, 18.59, 7.16], abs=0.015)
    assert [stage["params_own"] for stage in stages] == pytest.approx([126.00e6, 64.04e6, 3.65e6], rel=1e-3)
    assert (found["params_shared"], found["params_active"]) == (43_482_624, 169_478_467)
    assert found["params_stored"] == found["params"] == pytest.approx(237.17e6, rel=1e-5)
    assert found["buffers_stored"] > 0, "fixed filters are in a checkpoint and are no parameters"
    averages = {name: average["gmacs_conv_linear"] for name, average in found["averages"].items()}
    assert averages == pytest.approx(
        {"uniform": 17.96, "mass": 18.89, "interval_length": 18.89, "solver_calls": 21.6}, abs=0.015
    )
    assert found["averages"]["solver_calls"]["of"] == "calls of dpm_singlestep: 12 / 2 / 6 of 20"
    assert found["policy"]["gmacs_per_call"] == pytest.approx(found["averages"]["solver_calls"]["gmacs"])
    assert found["policy"]["macs_saved"] == 0
    assert [row["fraction"] for row in found["exits"]] == [1.0] * 3


@pytest.mark.slow
def test_the_edm_network() -> None:
    found = profiled("backbone=multi_decoder_edm", "process=edm", "solver=edm_heun")
    assert [stage["params_active"] for stage in found["stages"]] == [87_917_315, 55_733_891, 24_407_715]
    assert [round(stage["gmacs"], 2) for stage in found["stages"]] == pytest.approx([35.75, 21.19, 7.73], abs=0.011)
    assert found["params_stored"] == 128_793_385
    averages = {name: average["gmacs"] for name, average in found["averages"].items()}
    assert averages == pytest.approx(
        {"uniform": 21.6, "mass": 35.1, "interval_length": 22.7, "solver_calls": 23.7}, abs=0.05
    )
    shares = found["averages"]["mass"]["shares"]
    assert [100 * share for share in shares] == pytest.approx([96.1, 3.5, 0.35], abs=0.05)


@pytest.mark.slow
def test_the_unified_networks() -> None:
    vp = profiled("backbone=unified_vp", "process=vp", VP_SOLVER)
    assert (vp["params"], round(vp["gmacs_conv_linear"], 2)) == (107_521_411, 17.64)
    edm = profiled("backbone=unified_edm", "process=edm", "solver=edm_heun")
    assert (edm["params"], round(edm["gmacs"], 2)) == (55_733_891, 21.19)


@pytest.mark.slow
def test_separate_networks_of_the_paper() -> None:
    equal = profiled("backbone=separate_vp", "process=vp", VP_SOLVER)
    assert equal["params_stored"] == 3 * 107_521_411 and equal["params_shared"] == 0
    assert {round(average["gmacs_conv_linear"], 2) for average in equal["averages"].values()} == {17.64}
    tailored = profiled("backbone=separate_vp_tailored", "process=vp", VP_SOLVER)
    assert [stage["params_active"] for stage in tailored["stages"]] == [169_478_467, 107_521_411, 47_134_707]
    assert [round(stage["gmacs_conv_linear"], 2) for stage in tailored["stages"]] == [29.93, 17.64, 6.31]


@pytest.mark.slow
def test_the_published_comparison_saves_training_only() -> None:
    """250k against 450k iterations of batch 128; the objective of the released code draws stages uniformly."""
    found = profiled(
        "backbone=multi_decoder_vp", "process=vp", VP_SOLVER, "objective=staged",
        baseline="unified_vp", images=32_000_000, baseline_images=57_600_000,
    )  # fmt: skip
    base = found["baseline"]
    assert (base["name"], base["params"], round(base["gmacs_conv_linear"], 2)) == ("unified_vp", 107_521_411, 17.64)
    [line] = base["verdicts"]
    said = "UNet (trained on images under objective Staged, choice=uniform) saves training, not sampling against "
    assert line.startswith(f"{said}unified_vp: ")
    assert found["averages"]["training"]["shares"] == pytest.approx([1 / 3] * 3)
    ratio = found["averages"]["training"]["gmacs"] / base["gmacs"] * 250 / 450
    assert f"PMACs in all ({100 * (ratio - 1):+.1f} %)" in line
    assert found["policy"]["gmacs_per_image"] > base["gmacs_sampling"] == pytest.approx(20 * base["gmacs"])


@pytest.mark.slow
def test_every_weighting_that_training_could_have() -> None:
    found = profiled(
        "backbone=multi_decoder_edm", "process=edm", "solver=edm_heun", baseline="unified_edm", baseline_images=100
    )
    mass, uniform = found["baseline"]["verdicts"]
    assert "UNet (trained on training times of process edm) saves neither training nor sampling" in mass
    assert "(+65." in mass and "so it saves in all if it needs less than 60." in mass
    assert "UNet (trained on every stage alike) saves neither" in uniform and "(+1." in uniform


def test_one_path_against_another() -> None:
    found = profiled(
        "backbone=uvit_digits", "policy=fixed_depth", "policy.depth=4", "solver.steps=10", baseline="uvit_digits"
    )
    [line] = found["baseline"]["verdicts"]
    assert line.startswith("UViT saves sampling, not training against uvit_digits: training ")
    assert "(+0.0 %)" in line and "(ddim, 10 calls)" in line


def test_stages_of_the_digits() -> None:
    """Separate networks compute what the plain one does; the decoders of the other share an encoder."""
    unified = profiled("backbone=unet_digits", "process=vp")
    separate = profiled("backbone=separate_digits", "process=vp", baseline="unet_digits")
    assert [stage["params_active"] for stage in separate["stages"]] == [unified["params"]] * 3
    assert separate["params_stored"] == 3 * unified["params"]
    assert all("saves neither training nor sampling" in line for line in separate["baseline"]["verdicts"])
    decoders = profiled("backbone=multi_decoder_digits", "process=vp", baseline="unet_digits")
    assert decoders["stages"][1]["params_active"] == unified["params"]
    own = sum(stage["params_own"] for stage in decoders["stages"])
    assert decoders["params_stored"] == decoders["params_shared"] + own
    assert decoders["averages"]["uniform"]["gmacs"] < decoders["averages"]["mass"]["gmacs"]


def test_what_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="there is no backbone 'nothing'"):
        profiled("backbone=uvit_digits", baseline="nothing")
    with pytest.raises(UsageError, match="baseline_images=0 must be at least 1"):
        profiled("backbone=uvit_digits", baseline="uvit_digits", baseline_images=0)
