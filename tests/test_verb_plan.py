"""`gearshift plan`: from a run to a policy file that sample and evaluate take."""

import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from gearshift import cli

from .commands import answer, refusal, workplace  # noqa: F401  # workplace acts by being here

TINY = ["experiment=digits", "+debug=tiny", "trainer.accelerator=cpu", "trainer.batch_size=4"]
# Few of everything: what is tested is that the parts fit together.
FEW = [
    "solver.steps=6",
    "images=4",
    "trial_images=2",
    "validation=4",
    "evaluations=6",
    "device=cpu",
    "guidance=2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert cli.run(["train", *TINY, f"runs_dir={folder}"]) == 0
    [run] = (folder / "digits").iterdir()
    return run


def test_a_plan_meets_its_budget_and_is_taken_by_sample_and_evaluate(trained, capsys):
    found = answer(capsys, "plan", f"run={trained}", "budget=0.5", *FEW)
    assert set(found["psnr"]) == {"plan", "fewer_steps", "hand_made", "step_skipping"}
    assert 0 < found["macs_fraction"] <= 0.5
    assert len(found["schedule"]) == 6 and found["schedule"][0] == "full"
    assert all(row["macs_fraction"] <= 0.5 + 1e-9 for row in found["rows"])
    kinds = {row["kind"] for row in found["rows"]}
    assert kinds == {"plan", "fewer_steps", "hand_made", "step_skipping"}
    written = yaml.safe_load(Path(found["policy"]).read_text())
    assert written["_target_"] == "gearshift.policies.Planned" and len(written["call"]) == 6
    assert Path(found["policy"]).is_relative_to(trained / "plans")
    with Image.open(found["picture"]) as picture:
        assert picture.size[0] > 600

    same = ["solver.steps=6", "guidance=2", "policy=planned", f"policy.file={found['policy']}"]
    sampled = answer(capsys, "sample", f"run={trained}", "num_images=4", "device=cpu", *same)
    # What the plan says it saves is what is saved.
    assert sampled["macs_saved"] == pytest.approx(1 - found["macs_fraction"], abs=1e-9)
    plan = f"+evaluation.policies.plan={{_target_: gearshift.policies.Planned, file: {found['policy']}}}"
    ddim = "evaluation.solvers={ddim: {_target_: gearshift.diffusion.solvers.ddim.DDIM, steps: 6, clip_x0: true}}"
    trial = ["evaluation=base", "evaluation.num_images=4", "evaluation.timing_images=0", "evaluation.metrics=[]"]
    evaluated = answer(capsys, "evaluate", f"run={trained}", "device=cpu", *trial, "evaluation.guidance=2", ddim, plan)
    [row] = [row for row in evaluated["rows"] if row["name"] == "plan"]
    assert row["macs_saved"] == pytest.approx(1 - found["macs_fraction"], abs=1e-9)

    # On other calls, another network or without guidance it is refused, both sides named.
    for change, said in (
        (["solver.steps=7"], "made for 6 calls of ddim, and this run has 7"),
        (["solver.spacing=log_snr"], "made for calls of ddim, call "),
        (["guidance=1"], "made with guidance (2 branches), and this run is without guidance (1)"),
    ):
        assert said in refusal(capsys, "sample", f"run={trained}", "num_images=2", "device=cpu", *same, *change)


def test_the_same_command_finds_the_same_plan(trained, capsys):
    some = ["plan", f"run={trained}", "rivals=false", *FEW]
    first = answer(capsys, *some, "output=a.yaml")
    again = answer(capsys, *some, "output=b.yaml")
    other = answer(capsys, *some, "output=c.yaml", "seed=2")
    assert first["schedule"] == again["schedule"] and first["psnr"] == again["psnr"]
    assert Path("a.yaml").read_text().splitlines()[2:] == Path("b.yaml").read_text().splitlines()[2:]
    assert other["psnr_calibration"] != first["psnr_calibration"]
    assert set(first["psnr"]) == {"plan"} and len(first["rows"]) == 1


@pytest.mark.parametrize(
    "settings",
    [
        ["search=anneal", "space=[steps]"],
        ["search=anneal", "space=[attention]", "start=hurry", "budget=0.85"],
        ["search=greedy", "space=[steps]"],
        ["space=[blocks,depth]"],
    ],
    ids=lambda settings: " ".join(settings),
)
def test_other_searches_and_spaces(trained, capsys, settings):
    found = answer(capsys, "plan", f"run={trained}", "rivals=false", *FEW, *settings)
    budget = 0.85 if "budget=0.85" in settings else 0.5
    assert found["macs_fraction"] <= budget + 1e-9
    said = " ".join(found["schedule"])
    if "space=[steps]" in settings:
        assert set(found["schedule"]) <= {"full", "skip"}
    elif "space=[attention]" in settings:
        assert "output of" in said and "skip" not in said
    else:
        assert "skip" not in said and "output" not in said


def test_a_budget_of_time(trained, capsys):
    """A generous one: that milliseconds are counted and the plan is timed is what can be asserted."""
    found = answer(capsys, "plan", f"run={trained}", "unit=ms", "budget=1000", "rivals=false", "timing_rounds=2", *FEW)
    assert found["unit"] == "ms" and 0 < found["ms_per_image"] <= 1000
    assert 0 < found["macs_fraction"] <= 1
    line = refusal(capsys, "plan", f"run={trained}", "unit=ms", "budget=1e-6", "rivals=false", "timing_rounds=2", *FEW)
    assert "budget=1e-06 ms per image cannot be met" in line and "no plan costs less than" in line


def test_thresholds(trained, capsys):
    found = answer(capsys, "plan", f"run={trained}", "policy=uncertainty_exit", "budget=0.9", *FEW)
    written = yaml.safe_load(Path(found["policy"]).read_text())
    assert written["threshold"] == found["threshold"] and written["_target_"].endswith("UncertaintyExit")
    assert found["macs_fraction"] <= 0.9
    assert list((trained / "plans").glob("thresholds-*.json")), "what was measured is kept"
    assert "has no threshold to tune" in refusal(capsys, "plan", f"run={trained}", "policy=fixed_depth", *FEW)


def test_rules_are_graded_by_the_oracle(trained, capsys):
    found = answer(
        capsys, "plan", f"run={trained}", "rivals=false", "grade=[skip_every,adaptive_skip]", *FEW, "space=[steps]"
    )
    every_third, adaptive = found["grades"]
    # One call is held, the last one never is; the oracle has as many calls, and chooses them.
    assert every_third["calls"] == 5 and every_third["psnr_of_oracle"] >= every_third["psnr"]
    assert 4 <= adaptive["calls"] <= 6
    assert [grade["policy"] for grade in found["grades"]] == ["skip every 3", "skip < 0.01"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["budget=0"], "budget=0.0 with unit=macs must be a share of full compute, above 0 and at most 1"),
        (["budget=1.5"], "budget=1.5 with unit=macs must be a share"),
        (["budget=0.1"], "budget=0.1 cannot be met: in this space no plan costs less than 0.1667"),
        (["unit=s"], "unit=s is not one of macs, ms"),
        (["space=[step]"], "space=['step']: name some of steps, branches"),
        (["space=[]"], "space=[]: name some of"),
        (["search=genetic"], "search=genetic is not one of responses, anneal, greedy"),
        (["start=late"], "start=late is not one of even, hurry"),
        (["trial_images=8"], "trial_images=8 are some of images=4"),
        (["evaluations=0"], "evaluations=0 must be at least 1"),
        (["grade=[nobody]"], "there is no policy 'nobody'"),
        (["output=plan.json"], "output=plan.json must end in .yaml"),
        (["search=greedy", "space=[depth]"], "search=greedy skips calls, which space=['depth'] leaves out"),
        (["search=anneal", "space=[depth]"], "start=even skips calls, which space=['depth'] leaves out"),
        (["operator=maps"], "operator=maps is not one of"),
        (["policy=adaptive_skip", "unit=ms"], "unit=ms is for schedules"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_in_one_line(trained, capsys, settings, said):
    assert said in refusal(capsys, "plan", f"run={trained}", "rivals=false", *FEW, *settings)


def test_a_plan_for_another_network_is_refused(trained, capsys, tmp_path):
    found = answer(capsys, "plan", f"run={trained}", "rivals=false", *FEW, "output=plan.yaml")
    node = yaml.safe_load(Path(found["policy"]).read_text())
    Path("other.yaml").write_text(yaml.safe_dump({**node, "network": "DiT", "blocks": 28}))
    some = ["sample", f"run={trained}", "num_images=2", "device=cpu", "solver.steps=6", "guidance=2"]
    line = refusal(capsys, *some, "policy=planned", "policy.file=other.yaml")
    assert "made for DiT with 28 blocks, and this run has UViT with 7" in line
    shutil.rmtree(trained / "plans", ignore_errors=True)
