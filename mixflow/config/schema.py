"""The JSON schema of config files, for editors."""

from __future__ import annotations

from typing import Any

import yaml

from mixflow.config.resolved import Config

SCHEMA_FILE = "workflow/schemas/config.schema.yaml"
_SCHEMA_HEADER = """\
# Generated from mixflow/config/ for editors: do not edit, run `python -m mixflow.config --write-schema`.
# Entries may be partial here, for `extends` and overlays complete them; mixflow.config checks the resolved whole.
"""


def schema_text() -> str:
    """Return the JSON schema of config files, as YAML: no required keys, no defaults, no unknown keys."""
    schema = _relaxed(Config.model_json_schema())
    for definition in schema["$defs"].values():
        definition["properties"] = {key: _or_null(part) for key, part in definition["properties"].items()}
    for section in schema["properties"].values():
        if "patternProperties" not in section:
            continue  # a plain value, such as `image`
        entries = next(iter(section["patternProperties"].values()))
        for option in entries.get("anyOf", [entries]):
            entry = schema["$defs"][option["$ref"].rsplit("/", 1)[1]]
            entry["properties"] = {"extends": {"type": "string"}, **entry["properties"]}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return _SCHEMA_HEADER + yaml.safe_dump(schema, sort_keys=False, width=120, allow_unicode=True)


def _relaxed(node: Any, names: bool = False) -> Any:
    """Return a part of the schema without what partial entries cannot meet; `names`: its keys are users' names."""
    if isinstance(node, list):
        return [_relaxed(part) for part in node]
    if not isinstance(node, dict):
        return node
    if names:
        return {key: _relaxed(part) for key, part in node.items()}
    node = {key: part for key, part in node.items() if key not in ("required", "default", "title", "discriminator")}
    if "oneOf" in node:  # without its discriminator a partial entry can fit several members
        node["anyOf"] = node.pop("oneOf")
    if "patternProperties" in node:
        node["additionalProperties"] = False
    mappings = ("properties", "patternProperties", "$defs")
    return {key: _relaxed(part, names=key in mappings) for key, part in node.items()}


def _or_null(node: Any) -> Any:
    """Let a value be null, which takes an inherited key away."""
    options = node["anyOf"] if set(node) == {"anyOf"} else [node]
    return node if {"type": "null"} in options else {"anyOf": [*options, {"type": "null"}]}
