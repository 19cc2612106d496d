"""`gearshift sample`: the same images as one file or as many, on one process or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gearshift import cli

from .commands import workplace  # noqa: F401  # workplace acts by being here

TINY = ["experiment=digits", "+debug=tiny", "trainer.accelerator=cpu", "trainer.batch_size=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEARSHIFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert cli.run(["train", *TINY, f"runs_dir={folder}"]) == 0
    [run] = (folder / "digits").iterdir()
    return run


def command(run):
    return ["sample", f"run={run}", "num_images=9", "start=3", "chunk=4", "solver.steps=2", "device=cpu"]


def pictures(folder):
    """PNGs in the order of their names, [N, H, W, C], and the names."""
    from PIL import Image

    files = sorted(folder.iterdir())
    found = []
    for file in files:
        with Image.open(file) as picture:
            found.append(np.asarray(picture)[..., None])
    return np.stack(found), [file.name for file in files]


def test_a_folder_of_pngs_holds_what_the_npz_holds(trained, capsys):
    assert cli.run([*command(trained), "out=npz"]) == 0
    assert cli.run([*command(trained), "out=png", "format=png"]) == 0
    one, many = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    images, names = pictures(Path(many["images"]))
    assert names == [f"{index:06d}.png" for index in range(3, 12)]
    with np.load(one["images"], allow_pickle=False) as data, np.load("png/labels.npz") as labels:
        np.testing.assert_array_equal(data["arr_0"], images)
        assert data["index"].tolist() == labels["index"].tolist() == list(range(3, 12))
        np.testing.assert_array_equal(data["arr_1"], labels["arr_1"])
        assert data["arr_1"].dtype == np.int64
    files = ("images", "grid", "ledger")
    assert {k: v for k, v in one.items() if k not in files} == {k: v for k, v in many.items() if k not in files}
    for name in ("grid.png", "ledger.npz"):
        assert (Path("npz") / name).read_bytes() == (Path("png") / name).read_bytes()


def test_a_folder_of_pngs_keeps_nothing_of_an_earlier_command(trained):
    """Whoever reads the folder reads all of it."""
    assert cli.run([*command(trained), "out=png", "format=png"]) == 0
    assert cli.run([*command(trained), "out=png", "format=png", "num_images=4"]) == 0
    _, names = pictures(Path("png/images"))
    assert names == [f"{index:06d}.png" for index in range(3, 7)]


def test_the_grid_shows_the_first_hundred(trained, capsys, monkeypatch):
    from gearshift.evaluation import plots

    seen = []
    monkeypatch.setattr(plots, "sample_grid", lambda images: seen.append(images) or b"grid")
    for layout in ("npz", "png"):
        settings = ["num_images=105", "start=2", "chunk=30", f"format={layout}", f"out={layout}"]
        assert cli.run([*command(trained), *settings]) == 0
    [a, b] = seen
    assert a.shape == (100, 1, 8, 8)
    np.testing.assert_array_equal(a, b)
    with np.load("npz/images.npz") as data:
        np.testing.assert_array_equal(data["arr_0"][:100].transpose(0, 3, 1, 2), a)


def test_an_unknown_format_is_refused(trained, capsys):
    assert cli.run([*command(trained), "format=jpg"]) == 2
    assert "format=jpg is not one of npz, png" in capsys.readouterr().err


SKIP = ["policy=adaptive_skip", "policy.threshold=1e9", "solver.steps=8", "guidance=2"]
PER_SAMPLE = [*SKIP, "policy.criterion=embedded_error", "policy.decision=per_sample", "policy.threshold=0.01"]


def said(capsys):
    return json.loads([line for line in capsys.readouterr().out.splitlines() if line.startswith("{")][-1])


def test_what_a_policy_decided_on_is_kept(trained, capsys):
    """Nine images from the fourth on in chunks of four: 3 | 4..7 | 8..11."""
    assert cli.run([*command(trained), *SKIP, "out=batch"]) == 0
    answer = said(capsys)
    assert answer["decisions"] == "batch/decisions.npz"
    assert (answer["longest_skip"], answer["kept_bytes_per_image"]) == (3, 0)
    assert answer["longest_skip_log_snr"] > 0
    with np.load(answer["decisions"], allow_pickle=False) as data:
        assert set(data) == {"first", "skip_statistic"}
        assert data["first"].tolist() == [3, 4, 8]
        assert data["skip_statistic"].shape == (8, 3), "one decision for every chunk"
        assert np.isnan(data["skip_statistic"][:3]).all() and np.isfinite(data["skip_statistic"][3:]).all()


@pytest.mark.parametrize("layout", ["npz", "png"])
def test_what_was_decided_of_every_sample_goes_with_its_index(trained, capsys, layout):
    assert cli.run([*command(trained), *PER_SAMPLE, "out=some", f"format={layout}"]) == 0
    with np.load(said(capsys)["decisions"]) as some:
        part = some["skip_statistic"]
    assert cli.run([*command(trained), *PER_SAMPLE, "out=all", "start=0", "num_images=12"]) == 0
    with np.load(said(capsys)["decisions"]) as every:
        assert every["skip_statistic"].shape == (8, 12)
        np.testing.assert_array_equal(part, every["skip_statistic"][:, 3:])


def test_a_policy_with_nothing_to_say_leaves_no_decisions(trained, capsys):
    assert cli.run([*command(trained), *SKIP, "out=same"]) == 0
    assert cli.run([*command(trained), "out=same"]) == 0
    answer = said(capsys)
    assert "decisions" not in answer and not Path("same/decisions.npz").exists()
    assert (answer["longest_skip"], answer["longest_skip_log_snr"]) == (0, 0.0)
    assert cli.run([*command(trained), "policy=hurry", "policy.last=1", "out=late"]) == 0
    assert said(capsys)["kept_bytes_per_image"] > 0


@pytest.mark.slow
def test_devices_starts_the_processes(trained):
    files = {}
    for devices in (1, 2):
        for layout in ("npz", "png"):
            settings = [f"devices={devices}", f"format={layout}", f"out={devices}{layout}", *PER_SAMPLE]
            process = subprocess.run(
                [sys.executable, "-m", "gearshift.cli", *command(trained), *settings],
                capture_output=True,
                text=True,
                env=dict(os.environ),
            )
            assert process.returncode == 0, process.stderr
            [line] = process.stdout.splitlines()
            files[devices, layout] = Path(json.loads(line)["images"])
    with (
        np.load("1npz/decisions.npz") as one,
        np.load("2npz/decisions.npz") as two,
        np.load("2png/decisions.npz") as png,
    ):
        assert one["first"].tolist() == [3, 4, 8]
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
            np.testing.assert_array_equal(one[name], png[name])
    np.testing.assert_array_equal(pictures(files[1, "png"])[0], pictures(files[2, "png"])[0])
    with np.load(files[1, "npz"]) as one, np.load(files[2, "npz"]) as two:
        assert set(one) == set(two) == {"arr_0", "arr_1", "index"}
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


def test_switches_of_depth_are_measured_on_request(trained, capsys):
    schedule = ["policy=exit_schedule", "solver=dpmpp_2m", "solver.steps=8", "num_images=2", "chunk=2", "device=cpu"]
    assert cli.run(["sample", f"run={trained}", *schedule, "switches=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["switches"]
    assert [(one["before"], one["after"]) for one in found] == [(5, 7)]
    assert all(one["jump"] > 0 for one in found)
    assert cli.run(["sample", f"run={trained}", *schedule]) == 0
    assert "switches" not in json.loads(capsys.readouterr().out.splitlines()[-1])
