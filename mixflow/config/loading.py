"""From YAML files to a resolved config: overlays, `extends`, inherited models, and the checks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mixflow.config.checks import (
    check_alignment,
    check_comparisons,
    check_figures,
    check_latents_entries,
    check_networks,
    check_references,
    check_report,
    check_tables,
)
from mixflow.config.entries import Checkpoint
from mixflow.config.messages import sentence
from mixflow.config.networks import Model
from mixflow.config.replicates import with_replicates
from mixflow.config.resolved import Config
from mixflow.config.values import NAME_PATTERN, SCRATCH
from mixflow.runtime.errors import UserError, did_you_mean

# PyYAML's parser in C where it was built with it: a tenth of the time, which every command and every job pays.
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_config(*paths: str | os.PathLike[str]) -> Config:
    """Read YAML files, each overlaying the ones before it (mappings deeply, all else replaced), and resolve them.

    Raises `UserError`, one sentence on the first problem found.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _merged(merged, _read_yaml(Path(path)))
    return resolve(merged)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_YAML)
    except FileNotFoundError:
        raise UserError(f"config file '{path}' does not exist: correct the path, or go to the project's root") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "it cannot be read"
        raise UserError(f"'{path}'{where} is not valid YAML ({what}): check indentation, colons, brackets") from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no sections: it must be a mapping such as config.yaml")
    return content


def resolve(raw: dict[str, Any]) -> Config:
    """Return the typed config behind a merged mapping, such as Snakemake's `config`, with every entry spelled out.

    Numbers may be text, for that is what `--config` makes of them. Raises `UserError`, one sentence on the first
    problem found.
    """
    sections = _expand_sections(raw)
    try:
        config = Config.model_validate(sections)
    except ValidationError as error:
        raise UserError(sentence(error.errors()[0], sections)) from None
    check_references(config)
    check_latents_entries(config)
    check_comparisons(config)
    config = _inherit_models(config)
    check_networks(config)
    check_alignment(config)
    check_tables(config)
    check_figures(config)
    check_report(config)
    return with_replicates(config)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _expand_sections(raw: dict[str, Any]) -> dict[str, Any]:
    """Follow `extends` in every section; a key or entry set to null is taken away."""
    sections = {}
    for section, entries in raw.items():
        if not isinstance(entries, dict):
            sections[section] = entries
            continue
        for name in entries:
            if not isinstance(name, str) or not re.match(NAME_PATTERN, name) or name == SCRATCH:
                raise UserError(
                    f"{section}: the entry name '{name}' cannot be used in paths: take lower-case letters, digits, "
                    "dots, hyphens and underscores, a letter or digit first, and not the word 'scratch'"
                )
        named = {name: entry for name, entry in entries.items() if entry is not None}
        sections[section] = {name: _without_nulls(_extended(section, named, name, ())) for name in named}
    return sections


def _extended(section: str, entries: dict[str, Any], name: str, seen: tuple[str, ...]) -> Any:
    if name in seen:
        raise UserError(f"{section}.{name}.extends: {' -> '.join((*seen, name))} never ends: remove one of them")
    entry = entries[name]
    if not isinstance(entry, dict) or "extends" not in entry:
        return entry
    parent = entry["extends"]
    if parent not in entries:
        raise UserError(
            f"{section}.{name}.extends: '{parent}' is not one of the {section}{did_you_mean(parent, entries)}"
        )
    base = _extended(section, entries, parent, (*seen, name))
    if not isinstance(base, dict):
        raise UserError(f"{section}.{parent}: {base!r} is not a mapping: write keys and values")
    return _merged(base, {key: value for key, value in entry.items() if key != "extends"})


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(part) for key, part in value.items() if part is not None}


def _inherit_models(config: Config) -> Config:
    """Give every checkpoint its model, from the one it starts from where it names none."""
    resolved: dict[str, Checkpoint] = {}

    def model_of(name: str) -> Model:
        checkpoint, parent = config.checkpoints[name], config.parent(name)
        own = checkpoint.origin.model
        if parent is None:
            if own is None:
                raise UserError(f"checkpoints.{name}.train.model: missing, and nothing has a default: add it")
            return own
        inherited = model_of(parent)
        known = inherited.dump()
        for key, value in (own.dump() if own else {}).items():
            if value != known.get(key):
                raise UserError(
                    f"checkpoints.{name}.train.model.{key}: {value} differs from the {known.get(key)} of "
                    f"'{parent}', which it starts from: leave model out to inherit it"
                )
        return inherited

    for name, checkpoint in config.checkpoints.items():
        if checkpoint.exact is not None:
            resolved[name] = checkpoint
            continue
        model = model_of(name)
        train = checkpoint.train and checkpoint.train.model_copy(update={"model": model})
        resolved[name] = checkpoint.model_copy(update={"train": train})
    return config.model_copy(update={"checkpoints": resolved})
