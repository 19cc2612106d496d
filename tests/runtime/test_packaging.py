"""The wheel: installed away from the repository, it has its configuration groups and every experiment composes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(command, cwd, **environment):
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed wheel; everything else comes from the environment of the tests."""
    made = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(made), str(REPOSITORY)], made)
    (wheel,) = made.glob("*.whl")
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", "site", str(wheel)], made)
    return made / "site"


@pytest.mark.slow
def test_the_wheel_carries_every_configuration_file(site):
    assert files(site / "gearshift" / "conf") == files(REPOSITORY / "conf")
    assert (site / "bin" / "gearshift").exists()
    licences = list(site.glob("gearshift-*.dist-info/licenses/LICENSE"))
    assert [licence.read_bytes() for licence in licences] == [(REPOSITORY / "LICENSE").read_bytes()]


@pytest.mark.slow
def test_the_installed_package_uses_its_own_configuration(site, tmp_path):
    code = "import gearshift, gearshift.runtime.paths as p; print(gearshift.__file__); print(p.conf_dir())"
    where = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site)).split()
    assert where == [str(site / "gearshift" / "__init__.py"), str(site / "gearshift" / "conf")]


EXPERIMENTS = sorted(
    path.relative_to(REPOSITORY / "conf" / "experiment").with_suffix("").as_posix()
    for path in (REPOSITORY / "conf" / "experiment").rglob("*.yaml")
)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_from_another_folder(site, tmp_path, experiment):
    command = [sys.executable, "-m", "gearshift.cli", "train", f"experiment={experiment}", "--cfg", "job"]
    composed = run(command, tmp_path, PYTHONPATH=str(site))
    assert "_target_: gearshift." in composed
    assert list(tmp_path.iterdir()) == []
