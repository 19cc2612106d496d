"""The command line from outside: what it answers, and what it says when something is wrong."""

import json

import numpy as np
import pytest
import torch

import gearshift
from gearshift import cli
from gearshift.verbs import VERBS

TINY = ["experiment=digits", "+debug=tiny", "trainer.accelerator=cpu", "trainer.batch_size=4"]


@pytest.fixture(autouse=True)
def workplace(tmp_path_factory, monkeypatch):
    """An own folder per test, one cache for all."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("GEARSHIFT_DEBUG", raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert cli.run(["train", *TINY, f"runs_dir={folder}"]) == 0
    [run] = (folder / "digits").iterdir()
    return run


def answer(capsys):
    """The JSON on the last line of standard output."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, arguments, code):
    """The one line a mistake is answered with."""
    assert cli.run(arguments) == code
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("gearshift: ")]
    assert len(lines) == 1, said.err
    assert "Traceback" not in said.err
    assert "{" not in said.out.strip()[:1], "a failure prints no answer"
    return lines[0]


# What it answers -----------------------------------------------------------------------------------------------------


def test_help_lists_every_verb_and_each_has_examples(capsys):
    assert cli.run(["--help"]) == 0
    overview = capsys.readouterr().out
    for verb in VERBS:
        assert verb in overview
        assert cli.run([verb, "--help"]) == 0
        text = capsys.readouterr().out
        assert "examples:" in text
        assert f"gearshift {verb}" in text


def test_train_answers_once_and_again(trained, capsys):
    runs = trained.parent.parent
    assert cli.run(["train", *TINY, f"runs_dir={runs}"]) == 0
    first = answer(capsys)
    assert first["steps"] == 2
    assert first["run"] == str(trained)
    # Devices, loggers and paths do not change the weights, so they do not change the folder.
    assert cli.run(["train", *TINY, f"runs_dir={runs}", "trainer.log_every=7"]) == 0
    assert answer(capsys) == first


def test_dry_run_and_cfg_job_start_nothing(capsys, tmp_path):
    assert cli.run(["train", "experiment=digits", "--dry-run", f"runs_dir={tmp_path / 'runs'}"]) == 0
    said = answer(capsys)
    assert said["params"] > 0
    assert said["gmacs"] > 0
    assert cli.run(["train", "experiment=digits", "--cfg", "job"]) == 0
    assert "embed_dim" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_profile_of_the_official_cifar10_model(capsys):
    assert cli.run(["profile", "backbone=uvit_cifar10"]) == 0
    plain = answer(capsys)
    assert plain["params"] == 44_255_328
    assert round(plain["gmacs"], 2) == 12.20
    assert round(plain["gmacs_conv_linear"], 2) == 11.32
    assert cli.run(["profile", "backbone=uvit_cifar10", "exits=adadiff"]) == 0
    headed = answer(capsys)
    assert headed["params"] == 44_255_328 + 80_028
    assert headed["params_active"] == 44_255_328
    fractions = [row["fraction"] for row in headed["exits"]]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_profile_of_the_largest_dit_under_the_published_schedule(capsys):
    assert cli.run(["profile", "backbone=dit_xl_2", "policy=ase_demo"]) == 0
    said = answer(capsys)
    assert said["params"] == 675_129_632
    assert round(said["gmacs"], 2) == 118.62
    assert round(said["policy"]["gmacs_per_call"], 2) == 84.73


def test_profile_under_a_static_policy(capsys):
    assert cli.run(["profile", "policy=fixed_depth", "policy.depth=4", "solver.steps=10"]) == 0
    said = answer(capsys)
    assert said["policy"]["calls"] == 10
    assert said["policy"]["macs_saved"] == pytest.approx(1 - said["exits"][3]["fraction"])


def test_sample_writes_images_grid_and_ledger(trained, capsys):
    command = ["sample", f"run={trained}", "num_images=5", "solver.steps=3", "chunk=4", "device=cpu"]
    assert cli.run(command) == 0
    full = answer(capsys)
    with np.load(full["images"]) as data:
        assert data["arr_0"].shape == (5, 8, 8, 1)
        assert data["arr_0"].dtype == np.uint8
        images = data["arr_0"]
    assert full["calls"] == 3
    # The same scale under either name; an exit policy; the same noise.
    assert cli.run([*command, "guidance=1.5"]) == 0
    by_w = answer(capsys)
    assert cli.run([*command, "s=0.5"]) == 0
    by_s = answer(capsys)
    with np.load(by_w["images"]) as a, np.load(by_s["images"]) as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
    assert by_w["calls"] == 6
    assert cli.run([*command, "policy=uncertainty_exit", "policy.threshold=0"]) == 0
    with np.load(answer(capsys)["images"]) as never_early:
        np.testing.assert_array_equal(never_early["arr_0"], images)


def test_load_from_python(trained):
    run = gearshift.load(trained, device="cpu")
    full = run.sample(6, solver={"_target_": "gearshift.diffusion.solvers.ddim.DDIM", "steps": 3}, labels="balanced")
    assert full.images.shape == (6, 1, 8, 8)
    assert full.images.dtype == torch.uint8
    assert full.labels.tolist() == [0, 1, 2, 3, 4, 5]
    from gearshift.policies import FixedDepth

    half = run.sample(6, policy=FixedDepth(3), labels="balanced")
    assert half.ledger.macs_saved > 0.3


def test_what_cannot_be_measured_is_said_before_anything_is_sampled(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_ALEXNET", str(tmp_path / "absent.pth"))
    settings = ["num_images=2", "chunk=2", "timing_images=0", "metrics=[lpips]", "solvers.ddim.steps=2"]
    settings = ["evaluation=base", *(f"evaluation.{setting}" for setting in settings), f"out={tmp_path}/out"]
    assert cli.run(["evaluate", f"run={trained}", "device=cpu", *settings]) == 0
    said = capsys.readouterr().err
    assert said.index("left out: lpips_alex_to_full") < said.index("full: 0/2 calls")


def test_evaluate_writes_a_report(trained, capsys):
    settings = [
        "num_images=12",
        "chunk=6",
        "timing_images=6",
        "timing_rounds=2",
        "metrics=[label_agreement,fd@classifier]",
    ]
    settings = [f"evaluation.{setting}" for setting in [*settings, "solvers.ddim.steps=4"]]
    settings += ["evaluation.tolerance=100", "evaluation=demo"]
    assert cli.run(["evaluate", f"run={trained}", "device=cpu", *settings]) == 0
    said = answer(capsys)
    rows = {row["name"]: row for row in said["rows"]}
    needed = {"policy", "solver", "calls", "macs_per_image", "macs_saved", "images_per_s", "speedup", "psnr_to_full"}
    for row in rows.values():
        assert needed <= set(row)
        assert {"ssim_to_full", "label_agreement", "fd_classifier_digits"} <= set(row)
    assert rows["full"]["macs_saved"] == 0
    assert rows["full"]["psnr_to_full"] is None, "equal images have no finite PSNR"
    assert rows["depth 4"]["macs_saved"] > 0
    added = [row for row in rows.values() if "equal_macs_to" in row]
    assert {"fewer_steps", "other_grid"} <= {row["baseline"] for row in added}
    for fewer in (row for row in added if row["baseline"] == "fewer_steps"):
        assert fewer["steps"] < 4
        # Steps are whole and rounded down (but for half a percent), and at least one.
        more = fewer["macs_saved"] - rows[fewer["equal_macs_to"]]["macs_saved"]
        assert fewer["steps"] == 1 or -0.005 <= more <= 0.25
    folder = trained / "evaluations" / "demo"
    for name in ("report.md", "report.html", "metrics.json", "comparison.png", "quality_cost.png", "exits.png"):
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "metrics.json").read_text())["rows"] == said["rows"]


def test_export_carries_its_configuration_and_begins_a_new_run(trained, capsys, tmp_path):
    file = tmp_path / "digits.safetensors"
    assert cli.run(["export", f"run={trained}", f"out={file}", "dtype=bf16"]) == 0
    assert answer(capsys)["file"] == str(file)
    from gearshift.backbones.weights import read_safetensors

    state, text, _ = read_safetensors(file)
    assert "embed_dim" in text
    assert all(value.dtype == torch.bfloat16 for value in state.values() if value.is_floating_point())


def test_import_makes_a_run_that_samples(capsys, tmp_path):
    from gearshift.backbones.uvit import UViT, UViTConfig

    shape = {"image_size": 8, "in_channels": 1, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.save(UViT(UViTConfig(**shape)).state_dict(), tmp_path / "weights.pth")
    backbone = [f"backbone.{key}={value}" for key, value in shape.items()]
    backbone += ["backbone=uvit_cifar10", "process=vp_sde", f"weights={tmp_path / 'weights.pth'}"]
    assert cli.run(["import", *backbone]) == 0
    run = answer(capsys)["run"]
    assert cli.run(["sample", f"run={run}", "num_images=2", "solver.steps=2", "device=cpu"]) == 0
    assert answer(capsys)["num_images"] == 2
    assert cli.run(["import", *backbone]) == 0
    assert answer(capsys)["run"] == run, "importing again changes nothing"
    line = refused(capsys, ["evaluate", f"run={run}"], 2)
    assert "without data=" in line


def test_list_names_what_there_is(capsys):
    assert cli.run(["list"]) == 0
    said = answer(capsys)
    assert "digits" in said["experiment"]
    assert "uvit_cifar10" in said["backbone"]
    assert all(line for names in said.values() for line in names.values()), "everything has its one line"


# What it says when something is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (["trian"], ["'trian'", "train"]),
        (["table"], ["no table", "experiments/"]),
        (["train", "--dryrun"], ["--dryrun", "--dry-run"]),
        (["train", "experiment=digits", "--cfg", "jobs"], ["jobs", "job"]),
        (["train", "experiment=digit"], ["experiment/digit", "digits"]),
        (["train", "trainer.max_step=3"], ["trainer.max_step'", "trainer.max_steps"]),
        (["evaluate", "run=.", "evaluation.toleranc=3"], ["toleranc'", "evaluation.tolerance?"]),
        (["evaluate", "run=.", "evaluation.solvers.ddim.eta=0"], ["DDIM", "+evaluation.solvers.ddim.eta=VALUE"]),
        (["train", "backbone.depth=5"], ["depth=5", "even"]),
        (["train", "backbone.depth=deep"], ["backbone.depth", "deep"]),
        (["train", "exits=none"], ["uncertainty heads"]),
        (["train", "backbone=uvit_cifar10", "exits=adadiff"], ["1 x 8 x 8", "3 x 32 x 32"]),
        (["train", "data=cifar10", "backbone=uvit_cifar10", "data.path=/nowhere"], ["/nowhere", "parquet"]),
        (["train", "+exits.depths=[3,9]"], ["depth 9"]),
        (["train", "trainer.batch_size=10", "trainer.accumulate=3"], ["10", "3"]),
        (["train", "init=/nowhere.pth"], ["/nowhere.pth"]),
        (["sample", "run=/nowhere"], ["/nowhere"]),
        (["import", "weights=/nowhere.pth"], ["/nowhere.pth"]),
        (["list", "group=polices"], ["polices", "policy"]),
        (["profile", "policy=fixed_depth", "policy.depth=9"], ["depth 9", "[1, 2, 3, 4, 5, 6, 7]"]),
    ],
)
def test_a_usage_error_is_one_line_that_quotes_both_sides(capsys, arguments, quoted):
    line = refused(capsys, arguments, 2)
    for part in quoted:
        assert part in line


@pytest.mark.parametrize(
    ("settings", "quoted"),
    [
        (["policy=fixed_depth", "policy.depth=9"], ["depth 9", "[1, 2, 3, 4, 5, 6, 7]"]),
        (
            [
                "policy=exit_and_skip",
                "policy.policies.1={_target_: gearshift.policies.UncertaintyExit, threshold: 0.2}",
            ],
            [],
        ),
        (["solver=euler_maruyama"], ["euler_maruyama", "cosine"]),
        (["labels=10"], ["10", "0..9"]),
        (["guidance=2", "s=0.5"], ["2", "0.5"]),
        (["precision=fp8"], ["fp8", "bf16"]),
        (["num_images=0"], ["num_images=0"]),
        (["policy.threshold=2"], ["threshold"]),
    ],
)
def test_an_impossible_combination_is_refused_before_sampling(trained, capsys, settings, quoted):
    line = refused(capsys, ["sample", f"run={trained}", "device=cpu", *settings], 2)
    for part in quoted:
        assert part.lower() in line.lower()


def test_two_exit_rules_are_refused(trained, capsys):
    node = "{_target_: gearshift.policies.UncertaintyExit, threshold: 0.1}"
    compose = f"{{_target_: gearshift.policies.Compose, policies: [{node}, {node}]}}"
    line = refused(capsys, ["evaluate", f"run={trained}", f"+evaluation.policies.both={compose}"], 2)
    assert "two exit rules" in line


def test_a_corrupt_or_foreign_checkpoint_is_named(trained, capsys, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    file = run / "checkpoints" / "last.ckpt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "last.ckpt" in refused(capsys, ["sample", f"run={run}", "device=cpu"], 1)
    torch.save({"model": torch.zeros(3)}, file)
    assert "another program" in refused(capsys, ["sample", f"run={run}", "device=cpu"], 1)
    file.unlink()
    assert "no checkpoint" in refused(capsys, ["sample", f"run={run}", "device=cpu"], 1)


def test_a_run_folder_in_use_is_refused(capsys, tmp_path):
    from omegaconf import OmegaConf

    from gearshift.runtime.run import RunFolder

    assert cli.run(["train", *TINY, "--dry-run", f"runs_dir={tmp_path}"]) == 0
    path = answer(capsys)["run"]
    folder = RunFolder.create(path, OmegaConf.create({"name": "x"}))
    import subprocess
    import sys

    code = (
        f"import sys; from gearshift.runtime.run import RunFolder\n"
        f"with RunFolder({str(folder.path)!r}).lock():\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        line = refused(capsys, ["train", *TINY, f"runs_dir={tmp_path}"], 1)
        holder.communicate("")
    assert "in use by pid" in line


def test_a_traceback_is_shown_when_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("GEARSHIFT_DEBUG", "1")
    assert cli.run(["sample", "run=/nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err
