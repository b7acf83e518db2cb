"""From a command line to a checked configuration object, and from errors to one line.

    main(verb, run):  argv ─► quoted overrides ─► Hydra ─► dataclasses ─► checks ─► run(config)

Hydra's lexer rejects Hangul and some bare words, so values are quoted for it first. Hydra leaves no traces: no run
folder, no `.hydra`, no change of directory, no loggers of its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import gc
import os
import re
import sys
import tempfile
import time
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megakor.config.checks import check
from megakor.config.verbs import VERBS, Verb
from megakor.logs import rank

QUIET_HYDRA = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.job.chdir=false",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


RANK_0_SPEAKS_FIRST = 5.0
"""Seconds that other ranks wait before they tell an error: where rank 0 had it too, the launcher ends them by then."""

LITERAL = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
"""One whole string literal."""
ITEM = re.compile(rf"""{LITERAL.pattern}|[^,'"\s][^,]*""")
"""One item of a list: a literal, or bare text up to the next comma."""
MERGE_ERROR = "Error merging override "
HYDRA_OPTIONS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd", "--config-name")


def config_folder() -> Path:
    """The folder of the shipped YAML: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "configs"
    return beside if (beside / "pretrain.yaml").is_file() else package / "configs"


@functools.cache  # a schema takes hundredths of a second to read
def register_schema(verb: Verb) -> None:
    """Make a verb's schema known to Hydra, under `<its YAML>_schema`."""
    ConfigStore.instance().store(name=f"{verb.config_name}_schema", node=verb.schema)


def field_of(schema: type, dotted: str) -> dataclasses.Field[Any] | None:
    """The field that a dotted key names; None where it names none."""
    found: dataclasses.Field[Any] | None = None
    current: Any = schema
    for part in dotted.split("."):
        if not dataclasses.is_dataclass(current):
            return None
        found = {field.name: field for field in dataclasses.fields(current)}.get(part)
        if found is None:
            return None
        current = typing.get_type_hints(current)[part]
    return found


def field_type(schema: type, dotted: str) -> Any:
    """The type of the field that a dotted key names; None where it names none."""
    current: Any = schema
    for part in dotted.split("."):
        if not dataclasses.is_dataclass(current):
            return None
        current = typing.get_type_hints(current).get(part)
    return current


def in_open_section(schema: type, dotted: str) -> bool:
    """Whether a key lies in a section whose keys are free, such as `deepspeed`."""
    parts = dotted.split(".")
    parents = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return any(typing.get_origin(field_type(schema, parent)) is dict for parent in parents)


def quoted(text: str) -> str:
    """A Hydra string literal. Its grammar unescapes only backslashes that stand before a quote."""
    escaped = re.sub(r"(\\*)'", lambda found: 2 * found[1] + "\\'", text)
    return "'" + re.sub(r"(\\+)\Z", lambda found: 2 * found[1], escaped) + "'"


def items_of(text: str) -> list[str]:
    """The items of a comma-separated list as Hydra literals; commas within quotes do not part them."""
    found = re.fullmatch(rf"\s*(?:(?:{ITEM.pattern})\s*(?:,\s*|$))*", text)
    parts = [match[0] for match in ITEM.finditer(text)] if found else text.split(",")
    parts = [part.strip() for part in parts if part.strip()]
    return [part if LITERAL.fullmatch(part) else quoted(part) for part in parts]


def quote_override(argument: str, schema: type, multirun: bool) -> str:
    """Quote a `key=value` argument for Hydra where its lexer needs it; other arguments pass unchanged.

    A string field takes its value as it is, whatever it contains; a list field takes one bare value as a list of one.
    """
    name, equals, value = argument.partition("=")
    if not equals or name.startswith(("-", "hydra")):
        return argument
    kind = field_type(schema, name.lstrip("+~"))
    if kind is None and not name.startswith(("+", "~")) and in_open_section(schema, name):
        name, argument = f"++{name}", f"++{argument}"  # Hydra's sign for a key that may be new
    if LITERAL.fullmatch(value) or value.startswith("${"):
        return argument
    if typing.get_origin(kind) is dict:
        return f"{'' if name.startswith(('+', '~')) else '++'}{argument}"  # keys are new in an open section
    if typing.get_origin(kind) is list and typing.get_args(kind) != (list[int],):
        if value.startswith("[") and value.endswith("]"):
            return f"{name}=[{','.join(items_of(value[1:-1]))}]"
        return f"{name}={value if value == 'null' else '[' + quoted(value) + ']'}"
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if str in members and value != "null":
        return f"{name}={','.join(items_of(value)) if multirun and ',' in value else quoted(value)}"
    try:
        parsed = OverridesParser.create().parse_override(argument)
        if multirun or not parsed.is_sweep_override():
            return argument
    except HydraException:
        pass
    return f"{name}={quoted(value)}"


@dataclasses.dataclass
class Arguments:
    """The command line, sorted: overrides and flags for Hydra, keys that its lexer cannot read, and our own flags."""

    hydra: list[str]
    beyond_hydra: dict[str, str] = dataclasses.field(default_factory=dict)
    debug: bool = False
    help: bool = False


def check_experiment(argument: str, verb: Verb) -> None:
    """Raise where a named run belongs to another verb."""
    group, _, name = argument.partition("=")
    if group == "experiment" and name not in ("", "null") and not verb.owns_experiment(name):
        known = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))
        own = [experiment for experiment in known if verb.owns_experiment(experiment)]
        raise ValueError(f"experiment={name} must be one of {verb.name}'s: {', '.join(own)}")


def sort_arguments(arguments: list[str], verb: Verb) -> Arguments:
    """Take our own flags and the launcher's `--local_rank` out of a command line and quote the overrides.

    A flag sets the verb's key of its name: `--dry-run` is `dry_run=true`.
    """
    sorted_ = Arguments(hydra=list(QUIET_HYDRA))
    multirun = bool({"-m", "--multirun"} & set(arguments))
    if multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--multirun cannot run under a launcher: every process would start every run")
    flags: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        flag = argument.partition("=")[0].replace("-", "_")
        if flag == "__local_rank":
            if "=" not in argument:
                next(waiting, None)
        elif argument == "--debug":
            sorted_.debug = True
        elif argument in ("-h", "--help"):
            sorted_.help = True
        elif argument.startswith("--") and field_type(verb.schema, flag.removeprefix("__")) is bool:
            sorted_.hydra.append(f"{flag.removeprefix('__')}=true")
        elif argument.startswith("-"):
            flags.append(argument)
            if argument in HYDRA_OPTIONS_WITH_VALUE:
                flags.append(next(waiting, ""))
        elif "=" not in argument and not argument.startswith("~"):
            raise ValueError(f"argument {argument!r} must be of the form key=value")
        else:
            check_experiment(argument, verb)
            name, _, value = argument.partition("=")
            if not name.isascii() and in_open_section(verb.schema, name.lstrip("+")):
                sorted_.beyond_hydra[name.lstrip("+")] = value  # its lexer has no letters but ASCII in keys
                continue
            sorted_.hydra.append(quote_override(argument, verb.schema, multirun))
    sorted_.hydra += flags  # argparse takes overrides in one run only, and flags behind them
    return sorted_


def missing_keys(config: DictConfig, schema: type) -> list[str]:
    """`key (help text)` of every mandatory value that was not given."""
    result = []
    for dotted in sorted(OmegaConf.missing_keys(config)):
        field = field_of(schema, dotted)
        result.append(f"{dotted} ({field.metadata['help']})" if field else dotted)
    return result


def unknown_key(name: str, schema: type) -> str:
    """What is wrong with a key that no field has, and the nearest ones that exist."""
    near = difflib.get_close_matches(name, known_keys(schema), n=3)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"unknown key {name}: must be one of those that --help lists{hint}"


def refuse_unknown(config: DictConfig, root: type, schema: type, prefix: str = "") -> None:
    """Raise on a key that a YAML file or `+key=value` added beyond the schema, naming the root's nearest ones."""
    hints = typing.get_type_hints(schema)
    for name in map(str, config):
        if name not in hints:
            raise ValueError(unknown_key(f"{prefix}{name}", root))
        if dataclasses.is_dataclass(hints[name]):
            refuse_unknown(config[name], root, typing.cast(type, hints[name]), f"{prefix}{name}.")


def to_object(config: DictConfig, schema: type) -> Any:
    """The composed configuration as a checked instance of its schema."""
    refuse_unknown(config, schema, schema)
    missing = missing_keys(config, schema)
    if missing:
        raise ValueError("missing " + "; ".join(missing))
    instance = OmegaConf.to_object(config)
    check(instance)
    return instance


def load_experiment(verb: str, experiment: str) -> Any:
    """A shipped named run as a checked configuration."""
    register_schema(VERBS[verb])
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose(verb, overrides=[f"experiment={experiment}"])
    return to_object(config, VERBS[verb].schema)


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a schema."""
    keys = []
    for field in dataclasses.fields(schema):
        kind = typing.get_type_hints(schema)[field.name]
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(kind):
            keys += known_keys(typing.cast(type, kind), f"{prefix}{field.name}.")
    return keys


def one_line(error: BaseException, arguments: list[str], schema: type) -> str:
    """An error as one line; an unknown key comes with the nearest known ones."""
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        for argument in arguments:
            name = argument.partition("=")[0].lstrip("+~")
            if "=" in argument and not name.startswith("-") and field_type(schema, name) is None:
                groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
                if name not in groups and not name.startswith("hydra") and not in_open_section(schema, name):
                    return unknown_key(name, schema)
        full_key = re.search(r"not in '\w+'\s+full_key: (\S+)", f"{error}\n{error.__cause__}")
        if full_key:
            return unknown_key(full_key[1], schema)
        text = f"{error}\n{error.__cause__}" if error.__cause__ else str(error)
        text = text.partition("Config search path")[0]
    else:
        text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("reference_type=", "object_type=", "full_key:", "^"))]
    if lines and lines[0].startswith(MERGE_ERROR):
        lines[0] = lines[0].removeprefix(MERGE_ERROR) + ":"
    return "; ".join(lines).replace(":;", ":") or type(error).__name__


def main(name: str, run: Callable[[Any], None], arguments: list[str] | None = None) -> None:
    """Run a verb on the command line's configuration. Errors of the user's end in one line and exit status 1.

    Args:
        name: the verb.
        run: called with the checked configuration.
        arguments: the command line; None: `sys.argv`.
    """
    verb = VERBS[name]
    arguments = sys.argv[1:] if arguments is None else arguments
    gc.freeze()  # what was imported stays to the end: the collector need not walk it, in steps or at exit
    gc.enable()  # where a main has imported without it
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and errors are told here
    register_schema(verb)
    debug = "--debug" in arguments
    try:
        sorted_ = sort_arguments(arguments, verb)
        if sorted_.help:
            from megakor.config.help import print_help

            return print_help(verb, sorted_.hydra)

        composed: list[DictConfig] = []  # one, or several under --multirun
        with tempfile.TemporaryDirectory() as folder:  # for the file that Hydra writes under --multirun
            sys.argv = [verb.module, f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=.", *sorted_.hydra]
            folder_and_name = {"config_path": str(config_folder()), "config_name": verb.config_name}
            hydra.main(version_base="1.3", **folder_and_name)(composed.append)()
        for config in composed:
            for key, value in sorted_.beyond_hydra.items():
                OmegaConf.update(config, key, value, force_add=True)
        sys.argv = [verb.module, *arguments]  # `launch` hands them on
        for config in [to_object(config, verb.schema) for config in composed]:
            run(config)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if debug:
            traceback.print_exc()
        if rank() > 0:
            time.sleep(RANK_0_SPEAKS_FIRST)
        print(f"megakor {name}: error: {one_line(error, arguments, verb.schema)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
