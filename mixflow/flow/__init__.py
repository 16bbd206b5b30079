"""The paper on one screen: paths between noise and data, the law of the times, and the loss (arXiv 2512.19311).

Time runs as in the paper: t=0 is noise, t=1 is data. Everything here is a pure function of its arguments.
"""

from mixflow.flow.interpolants import GVP, INTERPOLANTS, Interpolant, Linear
from mixflow.flow.loss import flow_matching_loss
from mixflow.flow.time_laws import LAWS, draw_time_pair, shift_time, time_pair

__all__ = [
    "GVP",
    "INTERPOLANTS",
    "LAWS",
    "Interpolant",
    "Linear",
    "draw_time_pair",
    "flow_matching_loss",
    "shift_time",
    "time_pair",
]
