"""From noise to data: solvers, time grids and guidance. Knows nothing of networks but their velocity."""

from mixflow.sampling.guidance import CountedNetwork, autoguided_velocity, guided_velocity
from mixflow.sampling.solvers import DIFFUSIONS, LAST_STEPS, SOLVERS, sample
from mixflow.sampling.time_grid import time_grid

__all__ = [
    "DIFFUSIONS",
    "LAST_STEPS",
    "SOLVERS",
    "CountedNetwork",
    "autoguided_velocity",
    "guided_velocity",
    "sample",
    "time_grid",
]
