"""A file of AdaDiff's official code, imported: a run folder that every other verb accepts."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from gearshift.assembly import build_network
from gearshift.runtime import config

from .commands import answer, refusal, workplace  # noqa: F401  # workplace acts by being here

SHAPE = ["backbone=uvit_digits", "backbone.embed_dim=16", "backbone.num_heads=2", "backbone.depth=4"]
RUN = ["exits=adadiff", "process=cosine", "data=digits"]
FEW = ["device=cpu", "guidance=2", "solver.steps=4"]


def official_file(path: Path, *, without=(), extra=()) -> dict[str, torch.Tensor]:
    """What the official training script saves: U-ViT's names, and the heads under their misspelt one."""
    from hydra import compose, initialize_config_dir

    from gearshift.runtime.paths import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("import", overrides=["weights=x.pth", *SHAPE, *RUN])
    torch.manual_seed(4)
    network = build_network(cfg)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    state = {}
    for name, value in network.state_dict().items():
        if name.startswith("backbone."):
            state[name.removeprefix("backbone.")] = value
        else:
            _, key, *_, kind = name.split(".")
            state[f"lte_classifer.{int(key.split('_')[1]) - 1}.lte.{kind}"] = -value  # certainty, not uncertainty
    for name in without:
        del state[name]
    for name in extra:
        state[name] = torch.zeros(1)
    torch.save(state, path)
    return network


def test_every_verb_accepts_it(capsys, tmp_path):
    network = official_file(tmp_path / "adadiff.pth")
    made = answer(capsys, "import", "weights=adadiff.pth", *SHAPE, *RUN, "name=adadiff")
    run = made["run"]
    assert made["params"] == sum(p.numel() for p in network.parameters())
    policy = ["policy=adadiff", "policy.certainty=0.45", "policy.patience=1"]
    sampled = answer(capsys, "sample", f"run={run}", "num_images=4", *policy, *FEW)
    assert sampled["macs_saved"] is not None
    plan = answer(
        capsys, "plan", f"run={run}", "policy=uncertainty_exit", "budget=0.8", "bins=2", "images=4", "trial_images=2",
        "validation=4", *FEW,
    )  # fmt: skip
    written = yaml.safe_load(Path(plan["policy"]).read_text())
    assert ("thresholds" in written) == (plan["thresholds"] is not None) and plan["macs_fraction"] <= 0.8
    evaluated = answer(
        capsys, "evaluate", f"run={run}", "evaluation.num_images=4", "evaluation.chunk=4", "evaluation.metrics=[]",
        "evaluation.timing_images=0", "evaluation.solvers.ddim.steps=4", "device=cpu", "evaluation.name=imported",
    )  # fmt: skip
    assert {"full", "exit u<0.10"} <= {row["name"] for row in evaluated["rows"]}
    profiled = answer(capsys, "profile", f"run={run}")
    assert [row["depth"] for row in profiled["exits"]] == [1, 2, 3, 4, 5]
    benched = answer(capsys, "bench", f"run={run}", "batch=4", "repeats=1", "strata=1", "warmup=1", "device=cpu")
    assert len(benched["rows"]) == 2
    found = answer(
        capsys, "sample", f"run={run}", "num_images=4", "policy=from_file", f"policy.file={plan['policy']}", *FEW
    )
    assert found["macs_saved"] > 0
    command = ["plan", f"run={run}", "policy=from_file", f"policy.file={plan['policy']}", "budget=0.8", *FEW]
    assert "policy FromFile has no threshold to tune" in refusal(capsys, *command)
    many = "policy.thresholds=[0.3,0.4]"
    command = ["plan", f"run={run}", "policy=uncertainty_exit", "policy.threshold=null", many, "budget=0.8", "images=4"]
    again = answer(capsys, *command, "trial_images=2", "validation=4", *FEW)
    answer(capsys, "sample", f"run={run}", "num_images=4", "policy=from_file", f"policy.file={again['policy']}", *FEW)
    exported = answer(capsys, "export", f"run={run}", "out=back.safetensors")
    again = answer(capsys, "import", f"weights={exported['file']}", *SHAPE, *RUN, "name=again")
    [first, second] = (answer(capsys, "sample", f"run={r}", "num_images=4", *policy, *FEW) for r in (run, again["run"]))
    assert first["macs_saved"] == second["macs_saved"]
    assert config.TARGET in yaml.safe_load(Path(plan["policy"]).read_text())


def test_files_that_do_not_fit(capsys, tmp_path):
    official_file(
        tmp_path / "headless.pth", without=[f"lte_classifer.{i}.lte.{k}" for i in range(5) for k in ("weight", "bias")]
    )
    command = ["import", "weights=headless.pth", *SHAPE]
    assert "headless.pth holds no uncertainty heads; use exits=none" in refusal(capsys, *command, *RUN)
    official_file(tmp_path / "short.pth", without=["lte_classifer.4.lte.weight", "lte_classifer.4.lte.bias"])
    line = refusal(capsys, "import", "weights=short.pth", *SHAPE, *RUN)
    assert "2 missing: uncertainty_heads.0_5.linear.weight, uncertainty_heads.0_5.linear.bias" in line
    official_file(tmp_path / "odd.pth", without=["norm.weight"], extra=["head.bias"])
    line = refusal(capsys, "import", "weights=odd.pth", *SHAPE, *RUN)
    assert "1 missing: norm.weight" in line and "1 unexpected: head.bias" in line
    official_file(tmp_path / "whole.pth")
    line = refusal(capsys, "import", "weights=whole.pth", *SHAPE, "exits=none", *RUN[1:])
    assert "holds 10 tensors of AdaDiff's uncertainty heads" in line and "use exits=adadiff" in line
    line = refusal(capsys, "import", "weights=whole.pth", *SHAPE, *RUN, "exits.per=timestep", "process=vp_sde")
    assert "has weights for 1000 timesteps, and process vp_sde is continuous" in line
