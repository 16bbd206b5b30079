"""What to compute: config.yaml as typed entries, and the slice of it that each stage is handed.

No value that can change a result has a default: a resolved entry spells out everything. Optional features that are
absent are None and left out of slices, so that adding an optional key never makes a finished job run again.
`python -m mixflow.config --write-schema` regenerates the JSON schema for editors.

Each file imports only from those before it; `Config` is the argument of the checks and slices, by annotation alone:
values, samplers, costs, sources, networks, entries; checks, replicates, slices; resolved (`Config`); messages, loading;
files, schema.
"""

from mixflow.config.entries import CLASSIFIER_METRICS, INCEPTION_METRICS, Pair, Train
from mixflow.config.files import check_image, check_latents, check_weights_file
from mixflow.config.loading import load_config, resolve
from mixflow.config.networks import RAE_SIZES, SIT_SHORTHANDS, SIT_SIZES
from mixflow.config.resolved import Config
from mixflow.config.samplers import Diffusion, Dopri5, EulerMaruyama, FixedStep
from mixflow.config.schema import SCHEMA_FILE, schema_text
from mixflow.config.slices import REHEARSAL_NOTE, slice_key, to_json
from mixflow.config.sources import spectrum_variances

__all__ = [
    "CLASSIFIER_METRICS",
    "INCEPTION_METRICS",
    "RAE_SIZES",
    "REHEARSAL_NOTE",
    "SCHEMA_FILE",
    "SIT_SHORTHANDS",
    "SIT_SIZES",
    "Config",
    "Diffusion",
    "Dopri5",
    "EulerMaruyama",
    "FixedStep",
    "Pair",
    "Train",
    "check_image",
    "check_latents",
    "check_weights_file",
    "load_config",
    "resolve",
    "schema_text",
    "slice_key",
    "spectrum_variances",
    "to_json",
]
