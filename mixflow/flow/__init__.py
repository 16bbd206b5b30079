"""The paper on one screen: paths between noise and data, the law of the times, and the loss (arXiv 2512.19311).

Time runs as in the paper: t=0 is noise, t=1 is data. Everything here is a pure function of its arguments.
"""

from mixflow.flow.interpolants import GVP, INTERPOLANTS, Interpolant, Linear
from mixflow.flow.loss import endpoint_target, flow_matching_loss, self_rollout_loss
from mixflow.flow.time_laws import (
    LAWS,
    conditional_input_times,
    draw_time_pair,
    input_time_density,
    shift_time,
    time_pair,
)

__all__ = [
    "GVP",
    "INTERPOLANTS",
    "LAWS",
    "Interpolant",
    "Linear",
    "conditional_input_times",
    "draw_time_pair",
    "endpoint_target",
    "flow_matching_loss",
    "input_time_density",
    "self_rollout_loss",
    "shift_time",
    "time_pair",
]
