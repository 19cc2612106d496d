"""The shipped process and solver files build what they say."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gearshift.diffusion.process import Process
from gearshift.diffusion.solvers import Solver
from gearshift.runtime.config import build
from gearshift.runtime.errors import UsageError
from gearshift.runtime.paths import conf_dir

ALIASES = {"vp": "vp_sde"}
"""Files under another name than their process's own: the same process with another end."""

FILES = sorted(Path(conf_dir()).glob("process/*.yaml")) + sorted(Path(conf_dir()).glob("solver/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_file_builds(file: Path) -> None:
    built = build(OmegaConf.load(file))  # type: ignore[arg-type]
    if file.parent.name == "process":
        assert isinstance(built, Process) and built.name == ALIASES.get(file.stem, file.stem)
    else:
        assert isinstance(built, Solver)
        process = build(OmegaConf.load(Path(conf_dir()) / "process" / "vp_sde.yaml"))  # type: ignore[arg-type]
        if file.stem == "pipeline":
            with pytest.raises(UsageError, match="is the scheduler of a pipeline"):
                built.calls(process)
            return
        steps = built.config.steps  # type: ignore[attr-defined]
        extra = {"heun": steps - 1, "edm_heun": steps - 1, "pndm": 9}.get(file.stem, 0)
        assert len(built.calls(process)) == steps + extra


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_typo_is_refused(file: Path) -> None:
    node = OmegaConf.load(file)
    node["stepz"] = 3  # type: ignore[index]
    with pytest.raises(UsageError, match="stepz"):
        build(node)  # type: ignore[arg-type]


def test_options_of_a_scheduler_come_through() -> None:
    node = OmegaConf.load(Path(conf_dir()) / "solver" / "diffusers_dpmpp.yaml")
    node["options"] = {"solver_order": 3, "use_lu_lambdas": True}  # type: ignore[index]
    solver = build(node)  # type: ignore[arg-type]
    assert solver.options == {"solver_order": 3, "use_lu_lambdas": True}
