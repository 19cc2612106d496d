"""What the pages say is there: examples run, links lead somewhere, tests that are named exist."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
EVALUATION = PAGE.with_name("evaluation.md")
EXITS, PIPELINES = PAGE.with_name("exits.md"), PAGE.with_name("pipelines.md")
README = Path(__file__).parents[1] / "README.md"


def test_the_examples_of_the_architecture_page_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 6
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})


@pytest.mark.parametrize(
    "page",
    [PAGE, EVALUATION, EXITS, PIPELINES, README, Path(__file__).parents[1] / "CONTRIBUTING.md"],
    ids=lambda p: p.name,
)
def test_what_the_pages_link_to_is_there(page):
    text = re.sub(r"`[^`]*`|```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"src=\"([^\"]+)\"", text)
    for target in targets:
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), target


def test_the_readme_names_experiments_and_verbs_that_exist():
    from gearshift.runtime.paths import conf_dir
    from gearshift.verbs import VERBS

    text = README.read_text(encoding="utf-8")
    for name in re.findall(r"experiment=([\w/]+)", text):
        assert name in ("NAME",) or (conf_dir() / "experiment" / f"{name}.yaml").is_file(), name
    for verb in re.findall(r"^ *gearshift ([a-z]+)", text, re.M):
        assert verb in VERBS, verb


def test_the_tests_that_the_evaluation_page_names_exist():
    root = Path(__file__).parents[1]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", EVALUATION.read_text(encoding="utf-8"))
    assert len(named) >= 15
    for file, test in named:
        assert f"def {test}(" in (root / file).read_text(encoding="utf-8"), test


def test_the_switches_that_the_page_on_exits_names_exist():
    from dataclasses import fields

    from gearshift.backbones.exits import ExitsConfig
    from gearshift.objectives.deediff import DeeDiffConfig
    from gearshift.policies import UncertaintyExit
    from gearshift.runtime.paths import conf_dir

    text = EXITS.read_text(encoding="utf-8")
    known = {"exits": ExitsConfig, "objective": DeeDiffConfig, "policy": UncertaintyExit}
    named = {(group, name) for group, name in re.findall(r"`(exits|objective|policy)\.(\w+)", text)}
    assert len(named) >= 15
    for group, name in named:
        assert name in {field.name for field in fields(known[group])}, f"{group}.{name}"
    for group, name in re.findall(r"\b(exits|objective|policy)=(\w+)", text):
        assert (conf_dir() / group / f"{name}.yaml").is_file(), f"{group}={name}"
