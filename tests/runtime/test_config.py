"""Configuration nodes become objects, and every way to get one wrong is named."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from omegaconf import OmegaConf

from gearshift.runtime import config
from gearshift.runtime.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    warmup: int = 0
    peaks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Point:
    x: float
    label: str | None = None
    pair: tuple[int, int] | None = None
    schedule: Schedule = field(default_factory=Schedule)
    widths: list[int] = field(default_factory=list)
    named: dict[str, float] = field(default_factory=dict)
    stages: list[Schedule] = field(default_factory=list)

    def __post_init__(self):
        if self.x < 0:
            raise UsageError(f"x={self.x} is below 0; choose another")
        if self.x > 100:
            raise ValueError(f"x={self.x} is above 100")


class Fixed:
    @dataclass(frozen=True)
    class Config:
        depth: int
        scale: float = 1.0

    def __init__(self, config, backbone=None):
        self.config, self.backbone = config, backbone


class Bare:
    pass


def target(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def test_a_class_with_a_schema_gets_it_and_the_context():
    node = OmegaConf.create({"_target_": target(Fixed), "depth": 3, "scale": 2})
    built = config.build(node, backbone="network")
    assert built.config == Fixed.Config(depth=3, scale=2.0)
    assert isinstance(built.config.scale, float)
    assert built.backbone == "network"
    assert config.build({"_target_": target(Fixed), "depth": 3}).config == Fixed.Config(depth=3)


def test_a_dataclass_gets_its_fields_with_their_types():
    node = {
        "_target_": target(Point),
        "x": 1,
        "pair": [4, 7],
        "schedule": {"warmup": 5, "peaks": [1, 2.5]},
        "widths": [1, 2],
        "named": {"a": 1},
        "stages": [{"warmup": 1}, {"peaks": [3]}],
    }
    point = config.build(node)
    assert point == Point(
        1.0, None, (4, 7), Schedule(5, (1.0, 2.5)), [1, 2], {"a": 1.0}, [Schedule(1), Schedule(0, (3.0,))]
    )
    assert isinstance(hash(point.schedule), int)
    assert config.build({"_target_": target(Point), "x": 1}) == Point(1.0)


def test_interpolations_reach_the_whole_configuration():
    cfg = OmegaConf.create({"seed": 7, "policy": {"_target_": target(Fixed), "depth": "${seed}"}})
    assert config.build(cfg.policy).config.depth == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"x": 1, "lable": "a"},
            r"policy\.lable: unknown key of .*Point; did you mean label\?; known keys: x, label, ",
        ),
        ({"x": 1, "zzz": 0}, r"policy\.zzz: unknown key of .*Point; known keys: x, label"),
        (
            {"x": 1, "schedule": {"warm_up": 3}},
            r"policy\.schedule\.warm_up: unknown key of .*Point\.schedule; did you mean warmup\?",
        ),
        ({"x": "wide"}, r"policy\.x: Value 'wide' of type 'str' could not be converted to Float \(in .*Point\)"),
        ({"x": None}, r"policy\.x: .*None"),
        ({"x": 1, "schedule": {"warmup": 1.5}}, r"policy\.schedule\.warmup: Value '1\.5' of type 'float'"),
        ({"x": 1, "widths": 3}, r"widths"),
        ({"x": 1, "pair": [1]}, r"policy: expected 2 values, got 1"),
        ({}, r"policy\.x has no value, and .*Point needs one; set it"),
        ({"x": "???"}, r"policy\.x has no value"),
        ({"x": -1}, r"policy: x=-1\.0 is below 0; choose another"),
        ({"x": 101}, r"policy: x=101\.0 is above 100 \(in .*Point\)"),
        ({"x": "${nowhere}"}, r"nowhere"),
        ({"x": 1, "schedule": {"_target_": "a.B"}}, r"policy\.schedule\._target_: .* one level deep"),
    ],
)
def test_wrong_fields_are_usage_errors_of_one_line(fields, message):
    cfg = OmegaConf.create({"policy": {"_target_": target(Point), **fields}})
    for attempt in (lambda: config.build(cfg.policy), lambda: config.validate(cfg)):
        with pytest.raises(UsageError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gearshift.runtime.erors.UsageError", r"policy\._target_=.*there is no module gearshift\.runtime\.erors"),
        ("gearshift.runtime.errors.UsageEror", r"has no class UsageEror; did you mean UsageError\?"),
        ("gearshift.runtime.errors.UsageError", r"has no configuration schema"),
        ("os.system", r"os has no class system"),
        ("Point", r"policy\._target_='Point' is not the dotted name of a class"),
        (3, r"policy has no _target_"),
    ],
)
def test_wrong_targets_are_usage_errors(name, message):
    cfg = OmegaConf.create({"policy": {"_target_": name, "x": 1}})
    for attempt in (lambda: config.build(cfg.policy), lambda: config.validate(cfg)):
        with pytest.raises(UsageError, match=message):
            attempt()


def test_a_missing_package_is_told_from_a_wrong_name(monkeypatch):
    monkeypatch.setattr(config.importlib, "import_module", _needs_a_package)
    with pytest.raises(UsageError, match="needs the package somelib, which is not installed"):
        config.locate("gearshift.runtime.errors.UsageError")


def _needs_a_package(name):
    raise ModuleNotFoundError("No module named 'somelib'", name="somelib")


def test_validate_looks_into_groups_and_lists_and_builds_nothing():
    class_path = target(Fixed)
    cfg = OmegaConf.create(
        {"a": {"b": [{"_target_": class_path, "depth": 1}, {"_target_": class_path, "dept": 1}]}, "plain": {"any": 1}}
    )
    with pytest.raises(UsageError, match=r"a\.b\.1\.dept: unknown key"):
        config.validate(cfg)
    cfg.a.b.pop(1)
    config.validate(cfg)


def test_parse_needs_no_target():
    assert config.parse(OmegaConf.create({"warmup": "4"}), Schedule) == Schedule(4)
    with pytest.raises(UsageError, match=r"trainer\.warmpu: unknown key of .*Schedule; did you mean warmup\?"):
        config.parse({"warmpu": 4}, Schedule, path="trainer")


def test_importing_the_package_imports_no_heavy_library():
    code = (
        "import sys, gearshift, gearshift.runtime.keys, gearshift.runtime.run, gearshift.runtime.launch, "
        "gearshift.runtime.progress, gearshift.runtime.output; "
        "heavy = 'wandb datasets diffusers torchvision torchmetrics lightning matplotlib sklearn'.split();"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
