"""GPT-NeoX's configuration in our words: its YAML files go in, a row for each key and our experiment come out.

    files ─► merged, dashes as underscores, sections dotted ─► the table of `neox_keys.yaml` ─► rows ─► experiment

GPT-NeoX's files are YAML 1.1, most often one mapping in braces. What becomes of a key is in the table; how a value
changes is in `neox_values`.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megakor.config.checks import check_engine, check_fit
from megakor.config.schema import PretrainConfig
from megakor.interop.neox_values import CONVERSIONS

TABLE = Path(__file__).with_name("neox_keys.yaml")
LATER = {"run": "run", "data": {"train": "train", "tokenizer": "tokenizer"}}
"""What an experiment may leave to the command line, for a check of the rest."""


@dataclass(frozen=True)
class Row:
    """One of GPT-NeoX's keys and what becomes of it.

    Attributes:
        key: dotted, with underscores.
        value: as the file has it.
        outcome: `mapped`: the same value under our name; `changed`: another value; `dropped`; or `refused`.
        becomes: our values by our dotted keys.
        why: what there is to know; a rule, `must …`, of what is refused.
        default: GPT-NeoX's own value, which no file gives.
    """

    key: str
    value: Any
    outcome: str
    becomes: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    default: bool = False


@cache
def table() -> dict[str, Any]:
    """What becomes of each key."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


@cache
def dropped() -> dict[str, str]:
    """The keys that are left out, and why."""
    return {key: group["why"] for group in table()["dropped"] for key in group["keys"]}


@cache
def known() -> frozenset[str]:
    """Every dotted key."""
    return frozenset().union(*(table()[part] for part in ("mapped", "deepspeed", "changed", "fixed")), dropped())


# ------------------------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML libraries silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_file(path: Path) -> dict[str, Any]:
    """One file's keys, dashes as underscores. OSError where it cannot be read, ValueError where it is not one."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"path={path} must be text in UTF-8: {error}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"path={path} must be YAML: {where}{' '.join(str(problem or error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"path={path} must hold keys and values, as GPT-NeoX's configuration does")
    result: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in result:
            raise ValueError(f"path={path} must have {name} once, with dashes or with underscores")
        result[name] = value
    return result


def read_files(paths: Sequence[str]) -> dict[str, Any]:
    """All files' keys in the order of the files, sections dotted as far as the table has keys within them.

    OSError where a file cannot be read; ValueError where one is damaged, a key stands in two, or nobody knows one.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for path in paths:
        for key, value in read_file(Path(path)).items():
            if key in merged:
                raise ValueError(f"{key} must stand in one file only, not in {origin[key]} and in {path}")
            merged[key], origin[key] = value, path
    flat = dict(_flat(merged))
    refuse_unknown(flat)
    return flat


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in section.items():
        key = f"{prefix}{name}"
        inside = key not in known() and any(other.startswith(f"{key}.") for other in known())
        if inside and isinstance(value, Mapping):
            yield from _flat(value, f"{key}.")
        elif inside and value is not None:
            raise ValueError(f"{key}={value} must be a section of keys")
        elif not inside:
            yield key, value


def refuse_unknown(keys: Iterable[str]) -> None:
    """Raise `ValueError` on keys that GPT-NeoX does not have, each with the nearest that it has."""
    unknown = []
    for key in keys:
        if key not in known():
            near = difflib.get_close_matches(key, known(), n=2)
            unknown.append(f"{key}{' (nearest: ' + ', '.join(near) + ')' if near else ''}")
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}: must be keys of GPT-NeoX's configuration")


# --------------------------------------------------------------------------------------------------- converting


def convert(given: Mapping[str, Any], world_size: int | None = None) -> list[Row]:
    """What becomes of GPT-NeoX's keys: those given, in their order, then its own defaults that decide something.

    Args:
        given: its values by dotted keys, as `read_files` returns them.
        world_size: number of GPUs; None: as the keys tell.

    Raises:
        ValueError: a key is missing without which GPT-NeoX does not start.
    """
    said = {key: value for key, value in given.items() if value is not None}
    missing = [key for key in table()["required"] if key not in said]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given; path=[a.yml,b.yml] takes several files")
    values = table()["defaults"] | said
    if world_size is not None:
        values["global_num_gpus"] = world_size
    elif "global_num_gpus" not in said and said.get("num_nodes", -1) != -1 and "num_gpus" in said:
        values["global_num_gpus"] = said["num_nodes"] * said["num_gpus"]
    rows = [
        _row(key, values, key not in said) if key in values else Row(key, None, "dropped", why="null says nothing")
        for key in given
    ]
    done = {ours for row in rows for ours in row.becomes}
    for key in [key for key in table()["defaults"] if key not in given]:
        found = _row(key, values, default=True)
        if found.outcome == "refused" or not found.becomes.keys() <= done:
            rows.append(found)
    return rows


def _row(key: str, values: Mapping[str, Any], default: bool = False) -> Row:
    value = values[key]
    if key in table()["mapped"]:
        return Row(key, value, "mapped", {table()["mapped"][key]: value}, default=default)
    if key in table()["deepspeed"]:
        return Row(key, value, "mapped", {f"deepspeed.{key}": value}, default=default)
    if key in table()["fixed"]:
        only, why = table()["fixed"][key]["only"], table()["fixed"][key]["why"]
        state = value.get("enabled", True) if isinstance(value, Mapping) else value
        if state in only or str(state).lower() in only:
            return Row(key, value, "dropped", why=f"always so: {why}", default=default)
        rule = f"must be {' or '.join(str(legal).lower() for legal in only)}" if only else "must be left out"
        return Row(key, value, "refused", why=f"{rule}: {why}", default=default)
    if key in dropped():
        return Row(key, value, "dropped", why=dropped()[key], default=default)
    try:
        becomes = CONVERSIONS[key](values)
    except ValueError as error:
        return Row(key, value, "refused", why=str(error), default=default)
    outcome = "mapped" if list(becomes.values()) == [value] else "changed" if becomes else "dropped"
    return Row(key, value, outcome, becomes, table()["changed"][key], default)


def experiment_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Our experiment, as nested sections.

    Raises:
        ValueError: keys are refused, or what becomes of them breaks a rule of ours.
    """
    refused = [row for row in rows if row.outcome == "refused"]
    if refused:
        told = [f"{row.key}{' (the default)' if row.default else ''}={row.value} {row.why}" for row in refused]
        raise ValueError("; ".join(told))
    experiment: dict[str, Any] = {}
    for row in rows:
        for dotted, value in row.becomes.items():
            *path, name = dotted.split(".")
            section = experiment
            for part in path:
                section = section.setdefault(part, {})
            section[name] = value
    try:
        checked = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PretrainConfig), LATER, experiment))
    except OmegaConfBaseException as error:
        wrong = next(row for row in rows if error.full_key in row.becomes)
        raise ValueError(
            f"{wrong.key}={wrong.value} must be as {error.full_key} is: {str(error).splitlines()[0]}"
        ) from None
    assert isinstance(checked, PretrainConfig)
    check_engine(checked)
    check_fit(checked, checked.model)
    return experiment
