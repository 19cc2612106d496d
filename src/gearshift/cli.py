"""The command line: `gearshift VERB [overrides]`. The verb is taken off; the rest is a real Hydra task."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from omegaconf import DictConfig

from gearshift import verbs
from gearshift.runtime.errors import RunError, UsageError, UserError
from gearshift.runtime.launch import is_main, rank
from gearshift.runtime.output import emit_json
from gearshift.runtime.paths import conf_dir
from gearshift.verbs import SweepError, settings

DRY_RUN = "--dry-run"


@dataclasses.dataclass
class _Outcome:
    """What the jobs of this command line came to; Hydra hands nothing back."""

    failures: list[BaseException] = dataclasses.field(default_factory=list)


_outcome = _Outcome()


def _task(verb: str) -> Callable[[DictConfig], None]:
    def run(cfg: DictConfig) -> None:
        try:
            answer = verbs.load(verb)(settings.check(verb, cfg))
        except Exception as error:
            if _job_runs_elsewhere():
                raise  # the launcher reports it as this job's failure
            _outcome.failures.append(error)
            if _is_multirun():
                _report(error, f"job {_job()}: " if not isinstance(error, SweepError) else "")
                if _ends_sweep(error):
                    raise SystemExit(_code(error)) from error  # Hydra goes on after any other exception
            return
        if answer is not None:
            emit_json(answer)

    return run


# One module-level function per verb: launchers that start jobs elsewhere find the task by its name.
train = _task("train")
sample = _task("sample")
evaluate = _task("evaluate")
profile = _task("profile")
bench = _task("bench")
import_ = _task("import")
export = _task("export")
list_ = _task("list")
reference = _task("reference")
encode = _task("encode")
compare = _task("compare")
table = _task("table")
stages = _task("stages")
plan = _task("plan")


def main() -> None:
    """Entry point. Exit code 0, 2 for a usage error, 1 for a failure; GEARSHIFT_DEBUG=1 shows tracebacks."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line (without the program's name); returns the exit code."""
    _outcome.failures.clear()
    try:
        verb, rest = _verb(arguments)
        if verb is None:
            return 0
        _hydra(verb, rest)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        print("gearshift: interrupted", file=sys.stderr)
        return 130
    except BaseException as error:
        return _report(_in_user_words(error))
    if not _outcome.failures:
        return 0
    if _was_multirun(rest):
        return max(_code(error) for error in _outcome.failures)
    return _report(_outcome.failures[0])


def _verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    known = verbs.VERBS
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(verbs.overview())
        return None, []
    if arguments[0] == "--version":
        from gearshift import __version__

        print(__version__)
        return None, []
    verb, rest = arguments[0], arguments[1:]
    if verb not in known:
        import difflib

        near = difflib.get_close_matches(verb, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no verb {verb!r}{hint} (the verbs are {', '.join(known)})")
    if any(flag in rest for flag in ("-h", "--help")):
        print(verbs.help_text(verb))
        return None, []
    if DRY_RUN in rest:
        if verb != "train":
            raise UsageError(f"{DRY_RUN} belongs to train; for {verb}, --cfg job prints the composed configuration")
        rest = [*(a for a in rest if a != DRY_RUN), "dry_run=true"]
    if verb in verbs.WITH_PATHS:
        rest = _paths_as_override(rest)
    return verb, _options_first(rest)


def _paths_as_override(arguments: list[str]) -> list[str]:
    """Arguments that are neither overrides nor options, as the setting `paths`, quoted for Hydra."""
    found = [a for a in arguments if not a.startswith(("-", "~")) and ("=" not in a or os.path.exists(a))]
    if not found:
        return arguments
    quoted = ('"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"' for path in found)
    return [*(a for a in arguments if a not in found), f"paths=[{','.join(quoted)}]"]


def _options_first(arguments: list[str]) -> list[str]:
    """Options may stand anywhere, though Hydra reads overrides only in one piece. Raises UsageError on wrong ones."""
    overrides = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    ordered = [*(a for a in arguments if a not in overrides), *overrides]
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    known = [DRY_RUN, *(name for action in parser._actions for name in action.option_strings if name[:2] == "--")]

    def refuse(message: str) -> NoReturn:
        import difflib

        unknown = message.partition("unrecognized arguments: ")[2]
        if not unknown:
            raise UsageError(message)
        near = difflib.get_close_matches(unknown.split("=")[0].split(" ")[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(known)}"
        raise UsageError(f"there is no option {unknown}; {hint}")

    parser.error = refuse  # type: ignore[method-assign]  # argparse would print its usage and leave
    parser.parse_args(ordered)
    return ordered


def _hydra(verb: str, rest: list[str]) -> None:
    import hydra

    # Hydra then raises instead of printing, so that every error is told in one place and one way.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [f"gearshift {verb}", *rest]
    task = globals()[f"{verb}_" if verb in ("import", "list") else verb]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=verb)(task)()


def _in_user_words(error: BaseException) -> BaseException:
    """Hydra's and OmegaConf's complaints about overrides and files are usage errors."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    flags = isinstance(error, ValueError) and str(error).startswith("Only one of --")
    if not flags and not isinstance(error, HydraException | OmegaConfBaseException):
        return error
    text = str(error).split("Config search path")[0]  # where Hydra looked helps nobody
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    message = " ".join(kept) or type(error).__name__
    match = re.search(r"Could not override '([^']+)'", message)
    if match:
        message = f"there is no setting {match[1]!r}{_near(match[1])}"
    if "'hydra/launcher/submitit" in message:
        message += " `pip install 'gearshift[slurm]'` brings the launcher."
    usage = UsageError(message)
    usage.__cause__ = error
    return usage


def _near(key: str) -> str:
    """What stands where a mistyped override points to, and what could stand there."""
    import difflib

    from hydra import compose, initialize_config_dir

    from gearshift.runtime import config

    verb = sys.argv[0].removeprefix("gearshift ")
    groups = [a for a in sys.argv[1:] if "=" in a and not a.startswith(("-", "+", "~")) and "." not in a.split("=")[0]]
    groups = [a for a in groups if (conf_dir() / a.split("=")[0]).is_dir()]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            node: Any = compose(verb, overrides=groups)
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        known = [str(name) for name in node if name != config.TARGET]
        target = node.get(config.TARGET)
        schema: Any = config.schema_of(config.locate(target, key)) if target else None
        fields = [field.name for field in dataclasses.fields(schema)] if schema else []
    except Exception:  # the hint is a courtesy; the message stands without it
        return ""
    if last in fields:
        return f" in the files; {target} has it, so add it: +{key}=VALUE"
    if not known and not fields:  # such as the arguments of a pipeline, which nobody can list
        return f"; {'.'.join(parents)} takes any: +{key}=VALUE"
    close = difflib.get_close_matches(last, [*known, *fields], 1)
    prefix = ".".join([*parents, ""])
    if close:
        return f"; did you mean {'' if close[0] in known else '+'}{prefix}{close[0]}?"
    return f"; there are {', '.join(prefix + name for name in known)}"


def _report(error: BaseException, which: str = "") -> int:
    if os.environ.get("GEARSHIFT_DEBUG") == "1":
        traceback.print_exception(error)
    if not is_main():
        if isinstance(error, UsageError) or _code(error) > 128:
            return _code(error)  # the main process says the same
        which = f"process {rank()}: {which}"
    if isinstance(error, UserError):
        print(f"gearshift: {which}{error}", file=sys.stderr)
    elif isinstance(error, OSError):
        print(f"gearshift: {which}{RunError(error)}", file=sys.stderr)
    else:
        print(
            f"gearshift: {which}unexpected {type(error).__name__}: {' '.join(str(error).split()) or '(no message)'}; "
            "GEARSHIFT_DEBUG=1 shows where",
            file=sys.stderr,
        )
    return _code(error)


def _code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, UserError) else 1


def _ends_sweep(error: BaseException) -> bool:
    """Whether no other job should start: all would be refused alike, or a signal asked the program to stop."""
    return isinstance(error, SweepError) or _code(error) > 128


def _was_multirun(rest: list[str]) -> bool:
    return any(flag in rest for flag in ("-m", "--multirun"))


def _hydra_settings() -> Any:  # a dataclass, or the node made of it
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get() if HydraConfig.initialized() else None


def _is_multirun() -> bool:
    settings = _hydra_settings()
    return settings is not None and "MULTIRUN" in str(settings.mode)


def _job() -> str:
    """Number of the running job of a sweep, and what sets it apart: its overrides that were not given literally."""
    settings = _hydra_settings()
    own = [str(override) for override in settings.overrides.task if override not in sys.argv]
    return f"{settings.job.num} ({' '.join(own)})" if own else str(settings.job.num)


def _job_runs_elsewhere() -> bool:
    """Whether a launcher other than Hydra's own runs this job in a process of its own."""
    settings = _hydra_settings()
    return settings is not None and _is_multirun() and "BasicLauncher" not in str(settings.launcher._target_)


if __name__ == "__main__":
    main()
