"""Networks, behind one convention: `net(x, t, y)` is the velocity x1 - x0 in paper time (t=0 noise, t=1 data)."""

from mixflow.models.load import build_model, describe_weights, load_model, read_state_dict, save_model
from mixflow.models.sit import SiT, sit_options

__all__ = [
    "SiT",
    "build_model",
    "describe_weights",
    "load_model",
    "read_state_dict",
    "save_model",
    "sit_options",
]
