"""The verbs of the command line, one module each: `run(cfg) -> answer`, the JSON of its last line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig

from gearshift.runtime.errors import UsageError


class SweepError(UsageError):
    """What is wrong with a sweep as a whole: its other jobs would be refused alike."""


# verb: (module, one line, examples)
VERBS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "train": (
        "train",
        "compose a run, train it, write checkpoints; the same command again resumes",
        (
            "gearshift train experiment=digits",
            "gearshift train experiment=cifar10_tiny data.path=DIR trainer.max_steps=2000",
            "gearshift train experiment=digits --dry-run",
            "gearshift train experiment=ase/digits",
            "gearshift train -m experiment=digits seed=1,2",
            "gearshift train experiment=deediff/cifar10 trainer=gpu trainer.devices=4",
            "gearshift train experiment=digits +debug=tiny",
            "gearshift train experiment=multistage/digits backbone.boundaries=FILE_OF_STAGES",
        ),
    ),
    "sample": (
        "sample",
        "images from a run under a policy and a solver",
        (
            "gearshift sample run=runs/digits/HASH",
            "gearshift sample run=RUN policy=uncertainty_exit policy.threshold=0.1 solver=dpmpp_2m solver.steps=20",
            "gearshift sample run=RUN guidance=1.5 labels=7 num_images=64 seed=3",
            "gearshift sample run=RUN prompts=FILE guidance=2",
        ),
    ),
    "evaluate": (
        "evaluate",
        "several policies x solvers of one run, side by side, with a report",
        (
            "gearshift evaluate run=RUN evaluation=demo",
            "gearshift evaluate run=RUN evaluation=fid50k devices=4 device=cuda precision=bf16",
            "gearshift evaluate run=RUN evaluation.repeats=3 '+evaluation.metrics=[fd@classifier,kd@classifier]'",
            "gearshift evaluate run=RUN evaluation.num_images=2000 evaluation.guidance=2",
            "gearshift evaluate run=RUN '+evaluation.policies.d3={_target_: gearshift.policies.FixedDepth, depth: 3}'",
        ),
    ),
    "reference": (
        "reference",
        "statistics of a data set under a feature extractor, for evaluate; or what such a file holds",
        (
            "gearshift reference data=cifar10 extractor=inception out=cifar10.npz",
            "gearshift reference data=digits extractor=classifier",
            "gearshift reference read=fid_stats_cifar10_train_pytorch.npz",
        ),
    ),
    "encode": (
        "encode",
        "an image data set, and its captions, to latents of an autoencoder; the same command again resumes",
        (
            "gearshift encode data=imagenet data.path=DIR out=LATENTS devices=4",
            "gearshift encode data=coco data.path=DIR out=LATENTS flips=false scale=0.2301 shard=512",
        ),
    ),
    "stages": (
        "stages",
        "where a multi-stage model changes networks: boundaries found on a data set, to a file and a plot",
        (
            "gearshift stages data=cifar10 data.path=DIR process=vp",
            "gearshift stages data=cifar10 process=edm mode=literal range=symmetric output=edm.yaml",
            "gearshift stages data=cifar10 process=vp stages=4 nodes=40",
            "gearshift stages process=vp method=log_snr",
            "gearshift stages method=gradient_affinity run=RUN",
        ),
    ),
    "plan": (
        "plan",
        "what every call should compute under a budget, to a policy file; or the threshold of a policy that meets one",
        (
            "gearshift plan run=RUN budget=0.5 guidance=2.5 solver.steps=25",
            "gearshift sample run=RUN guidance=2.5 solver.steps=25 policy=planned policy.file=FILE",
            "gearshift plan run=RUN budget=0.5 'space=[steps]' search=anneal",
            "gearshift plan run=RUN budget=0.8 'space=[attention]' search=anneal start=hurry",
            "gearshift plan run=RUN budget=0.6 policy=adaptive_skip",
            "gearshift plan run=RUN budget=2.5 unit=ms",
            "gearshift plan run=RUN 'grade=[adaptive_skip,embedded_error_skip]'",
        ),
    ),
    "compare": (
        "compare",
        "several evaluations joined into one table and one plot, with what differs between their protocols",
        (
            "gearshift compare runs/digits/HASH runs/digits/OTHER",
            "gearshift compare A/metrics.json B/metrics.json out=DIR",
        ),
    ),
    "table": (
        "table",
        "a paper's table: published, measured, missing; run=missing trains and evaluates what is missing",
        (
            "gearshift table experiments/deediff/cifar10.yaml",
            "gearshift table experiments/deediff/cifar10.yaml run=missing launcher=slurm",
        ),
    ),
    "profile": (
        "profile",
        "parameters and cost of a backbone, its exits and a policy",
        (
            "gearshift profile backbone=uvit_cifar10",
            "gearshift profile backbone=uvit_cifar10 exits=adadiff policy=fixed_depth policy.depth=7",
            "gearshift profile run=RUN",
            "gearshift profile backbone=multi_decoder_vp process=vp objective=staged baseline=unified_vp",
        ),
    ),
    "bench": (
        "bench",
        "speed under stated conditions: interleaved, paired, one process",
        (
            "gearshift bench",
            "gearshift bench backbone=uvit_cifar10 batch=64 repeats=10",
            "gearshift bench training=true batch=64",
            "gearshift bench training=true backbone=dit_digits exits=none policy=ase_demo batch=64",
            "gearshift bench run=RUN policy=uncertainty_exit policy.threshold=0.1",
            "gearshift bench sampling=true run=RUN policy=uncertainty_exit 'batches=[1,8,32,128]' latency_repeats=20",
            "gearshift bench steps=true run=RUN guidance=2.5 solver.steps=25",
            "gearshift bench steps=true backbone=uvit_cifar10 batch=32 solver.steps=6 strata=1 repeats=3 warmup=1",
            "gearshift bench features=true batch=128",
            "gearshift bench stages=true backbone=multi_decoder_vp exits=none process=vp batch=128",
        ),
    ),
    "import": (
        "import_weights",
        "official weights to a run folder",
        (
            "gearshift import weights=cifar10_uvit_small.pth backbone=uvit_cifar10 process=vp_sde name=uvit_cifar10",
            "gearshift import weights=edm-cifar10-32x32-uncond-vp.pkl name=edm_cifar10",
        ),
    ),
    "export": (
        "export_weights",
        "a run to one safetensors file with the configuration inside",
        ("gearshift export run=RUN out=model.safetensors", "gearshift export run=RUN ema=false out=raw.safetensors"),
    ),
    "list": (
        "listing",
        "what can be named: experiments, backbones, policies, solvers, metrics",
        ("gearshift list", "gearshift list group=policy"),
    ),
}


# Verbs that take paths besides overrides; they arrive as the setting `paths`.
WITH_PATHS = ("compare", "table")


def load(verb: str) -> Callable[[DictConfig], dict[str, Any] | None]:
    """The `run` function of a verb."""
    module = importlib.import_module(f"gearshift.verbs.{VERBS[verb][0]}")
    run: Callable[[DictConfig], dict[str, Any] | None] = module.run
    return run


def overview() -> str:
    """Help of the program."""
    width = max(map(len, VERBS))
    lines = ["gearshift VERB [overrides]", ""]
    lines += [f"  {verb:<{width}}  {line}" for verb, (_, line, _) in VERBS.items()]
    lines += [
        "",
        "gearshift VERB --help shows examples and settings; overrides are Hydra's (key=value, group=option, -m).",
    ]
    return "\n".join(lines)


def help_text(verb: str) -> str:
    """Help of a verb: what it does, examples, groups with their options, and settings."""
    from omegaconf import OmegaConf

    from gearshift.runtime.paths import conf_dir

    _, line, examples = VERBS[verb]
    root = conf_dir()
    cfg = OmegaConf.load(root / f"{verb}.yaml")
    assert isinstance(cfg, DictConfig)
    groups = []
    for entry in cfg.get("defaults", []):
        if not isinstance(entry, str):
            groups += [str(key).removeprefix("optional ") for key in entry if "hydra" not in str(key)]
    out = [f"gearshift {verb}: {line}", "", "examples:", *(f"  {example}" for example in examples)]
    for group in groups:
        folder = root / group
        names = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
        out += ["", f"{group}=", f"  {', '.join(names)}"]
    settings = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in ("defaults", "hydra")])
    if settings:
        out += ["", "settings and their defaults:"]
        text = OmegaConf.to_yaml(settings, resolve=False)
        out += [f"  {item}" for item in text.rstrip().splitlines()]
    out += ["", "--cfg job prints the composed configuration; -m launches a sweep; GEARSHIFT_DEBUG=1 shows tracebacks"]
    if verb == "train":
        out.append("--dry-run prints configuration, parameters, MACs and the run folder, and stops")
    return "\n".join(out)
