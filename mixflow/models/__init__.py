"""Networks, behind one convention: `net(x, t, y)` is the velocity x1 - x0 in paper time (t=0 noise, t=1 data)."""

from mixflow.models.clock import Clock, load_clock, save_clock
from mixflow.models.dinov2 import DINOv2, DINOv2Class, load_dinov2, load_dinov2_class
from mixflow.models.dit_dh import DiTDH
from mixflow.models.exact import GaussianField, MixtureField
from mixflow.models.export import export_weights
from mixflow.models.load import build_model, describe_weights, load_model
from mixflow.models.network import VelocityNetwork
from mixflow.models.repa import REPA, check_projectors
from mixflow.models.sit import SiT, sit_options
from mixflow.models.weights import convert_weights, read_state_dict, save_model

__all__ = [
    "REPA",
    "Clock",
    "DINOv2",
    "DINOv2Class",
    "DiTDH",
    "GaussianField",
    "MixtureField",
    "SiT",
    "VelocityNetwork",
    "build_model",
    "check_projectors",
    "convert_weights",
    "describe_weights",
    "export_weights",
    "load_clock",
    "load_dinov2",
    "load_dinov2_class",
    "load_model",
    "read_state_dict",
    "save_clock",
    "save_model",
    "sit_options",
]
