"""Run folders: which command finds which folder, who may work in it, and what is said of a damaged one."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gearshift.runtime.errors import RunError, UsageError
from gearshift.runtime.run import RunFolder, weights_hash


@dataclass(frozen=True)
class Inner:
    width: int = 4


@dataclass(frozen=True)
class Old:
    depth: int
    rate: float = 0.5
    inner: Inner = field(default_factory=Inner)
    list_of: tuple[Inner, ...] = ()


def target(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def configuration(**fields):
    return OmegaConf.create(
        {
            "seed": 1,
            "objective": {"_target_": target(Old), "depth": 3, **fields},
            "trainer": {"devices": 2, "steps": 100},
            "logger": {"name": "csv"},
        }
    )


IRRELEVANT = ("trainer.devices", "logger", "absent.path", "seed.below")


def test_the_hash_changes_with_what_changes_the_weights_and_with_nothing_else():
    base = weights_hash(configuration(), IRRELEVANT)
    assert len(base) == 10
    assert int(base, 16) >= 0
    same = [
        configuration(rate=0.5),
        configuration(rate="0.5"),
        configuration(depth="3"),
        configuration(inner={"width": 4}),
        configuration(list_of=[]),
        OmegaConf.merge(configuration(), {"trainer": {"devices": 8}, "logger": {"name": "wandb", "more": 1}}),
        OmegaConf.merge(configuration(), {"compile": None, "trainer": {"extra": None}}),
        OmegaConf.create(dict(reversed(list(OmegaConf.to_container(configuration()).items())))),
    ]
    for cfg in same:
        assert weights_hash(cfg, IRRELEVANT) == base, cfg
    different = [
        configuration(rate=0.25),
        configuration(depth=4),
        configuration(inner={"width": 5}),
        configuration(list_of=[{"width": 4}]),
        OmegaConf.merge(configuration(), {"seed": 2}),
        OmegaConf.merge(configuration(), {"trainer": {"steps": 101}}),
    ]
    assert len({base} | {weights_hash(cfg, IRRELEVANT) for cfg in different}) == len(different) + 1


def test_a_new_option_with_a_default_orphans_no_run(monkeypatch):
    module = sys.modules[Old.__module__]
    before = weights_hash(configuration(rate=0.25), IRRELEVANT)
    grown = make_dataclass(
        "Old",
        [
            ("depth", int),
            ("rate", float, field(default=0.5)),
            ("smooth", bool, field(default=False)),
            ("inner", Inner, field(default_factory=Inner)),
            ("list_of", tuple[Inner, ...], field(default=())),
        ],
        frozen=True,
    )
    grown.__module__ = module.__name__
    monkeypatch.setattr(module, "Old", grown)
    assert weights_hash(configuration(rate=0.25), IRRELEVANT) == before
    assert weights_hash(configuration(rate=0.25, smooth=False), IRRELEVANT) == before
    assert weights_hash(configuration(rate=0.25, smooth=True), IRRELEVANT) != before


def test_the_hash_is_the_same_in_every_process():
    code = (
        "from gearshift.runtime.run import weights_hash;"
        "print(weights_hash({'seed': 1, 'b': {'y': [1, 2.5], 'x': 'é'}, 'a': True}, ('b.z',)))"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert answers == {b"6dc6bb1386\n"}


def test_a_folder_keeps_its_configuration_and_its_answer(tmp_path):
    path = tmp_path / "runs" / "digits" / "abc"
    folder = RunFolder.create(path, configuration(rate=0.25))
    assert folder.checkpoints.is_dir()
    assert folder.metrics_path.parent == path
    assert folder.result is None
    again = RunFolder.create(path, configuration(rate=0.75))
    assert again.config.objective.rate == 0.25
    folder.finish({"run": path, "loss": 0.5})
    assert RunFolder.open(path).result == {"run": str(path), "loss": 0.5}


def test_interpolations_are_written_resolved(tmp_path):
    cfg = OmegaConf.create({"seed": 3, "data": {"seed": "${seed}"}})
    assert RunFolder.create(tmp_path / "run", cfg).config.data.seed == 3
    assert "${" not in (tmp_path / "run" / "config.yaml").read_text()


def test_a_folder_of_a_start_that_was_killed_early_is_taken_over(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / ".config.yaml.1.abc.partial").write_text("half")
    assert RunFolder.create(tmp_path, configuration()).config.seed == 1
    with RunFolder(tmp_path).lock():
        assert not list(tmp_path.glob(".*.partial"))


def test_several_processes_may_create_one_run_at_once(tmp_path: Path) -> None:
    for number in range(60):
        path = tmp_path / str(number)
        with ThreadPoolExecutor(4) as pool:
            folders = list(pool.map(lambda _: RunFolder.create(path, configuration()), range(4)))  # noqa: B023
        assert all(folder.checkpoints.is_dir() and folder.config.seed == 1 for folder in folders)


def test_what_is_not_a_run_folder_is_told_apart(tmp_path):
    with pytest.raises(UsageError, match="there is no such folder"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(RunError, match=r"is not a run folder: it has no config\.yaml"):
        RunFolder.open(tmp_path)
    (tmp_path / "photo.png").touch()
    with pytest.raises(RunError, match=r"holds photo\.png but no config\.yaml"):
        RunFolder.create(tmp_path, configuration())
    with pytest.raises(RunError, match="is a file, not a run folder"):
        RunFolder.create(tmp_path / "photo.png", configuration())
    with pytest.raises(RunError, match=r"could not make the run folder .* \(Not a directory\)"):
        RunFolder.create(tmp_path / "photo.png" / "run", configuration())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: other\n", r"begins with 'model: other' instead of '# gearshift run, format 1'"),
        (b"", r"begins with '' instead of"),
        (b"# gearshift run, format 1\nseed: [1, 2\n", r"not readable as YAML .* damaged"),
        (b"# gearshift run, format 1\n- 1\n", r"holds no configuration"),
        (b"# gearshift run, format 1\n", r"holds no configuration"),
        (b"\xff\xfe\x00", r"could not read .* damaged"),
    ],
)
def test_a_foreign_or_damaged_configuration_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "config.yaml").write_bytes(text)
    for attempt in (lambda: RunFolder.open(tmp_path), lambda: RunFolder.create(tmp_path, configuration())):
        with pytest.raises(RunError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "config.yaml").read_bytes() == text


@pytest.mark.parametrize("text", ['{"run": ', "[1]"])
def test_a_damaged_answer_is_an_error(tmp_path, text):
    folder = RunFolder.create(tmp_path / "run", configuration())
    (folder.path / "done.json").write_text(text)
    with pytest.raises(RunError, match="remove it and run the same command again"):
        _ = folder.result


HOLD = """
import os, sys
from gearshift.runtime.run import RunFolder
with RunFolder(sys.argv[1]).lock():
    if "fork" in sys.argv and os.fork() == 0:
        sys.stdin.read()  # a loader's worker that outlives its parent
        os._exit(0)
    print(os.getpid(), flush=True)
    sys.stdin.readline()
"""


def hold(path, *options):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return child, int(child.stdout.readline())


def end(child):
    child.stdin.close()
    child.stdout.close()
    child.wait()


def test_a_folder_in_use_names_its_user_and_is_free_afterwards(tmp_path):
    folder = RunFolder.create(tmp_path / "run", configuration())
    child, pid = hold(folder.path)
    try:
        with (
            pytest.raises(RunError, match=rf"is in use by pid {pid} on \S+; wait for it or choose another"),
            folder.lock(),
        ):
            pytest.fail("two processes hold one folder")
    finally:
        end(child)
    with folder.lock(), pytest.raises(RunError, match=f"in use by pid {os.getpid()}"), RunFolder(folder.path).lock():
        pytest.fail("one process holds one folder twice")
    with folder.lock():
        assert json.loads((folder.path / "lock").read_text().split()[0]) == os.getpid()


@pytest.mark.parametrize("options", [(), ("fork",)])
def test_a_killed_process_lets_go_even_if_a_child_of_it_lives_on(tmp_path, options):
    folder = RunFolder.create(tmp_path / "run", configuration())
    child, pid = hold(folder.path, *options)
    try:
        os.kill(pid, signal.SIGKILL)
        child.wait()
        with folder.lock():
            pass
    finally:
        end(child)


def test_an_error_in_the_work_lets_go(tmp_path):
    folder = RunFolder.create(tmp_path / "run", configuration())
    with pytest.raises(KeyError), folder.lock():
        raise KeyError
    with folder.lock():
        pass
