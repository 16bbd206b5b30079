"""From noise to data: solvers, time grids and guidance. Knows nothing of networks but their velocity."""

from mixflow.sampling.corrections import differential_correction, epsilon_scaled, time_shifted
from mixflow.sampling.guidance import CountedNetwork, autoguided_velocity, guided_velocity
from mixflow.sampling.solvers import DIFFUSIONS, LAST_STEPS, SOLVERS, Callback, sample
from mixflow.sampling.time_grid import time_grid

__all__ = [
    "DIFFUSIONS",
    "LAST_STEPS",
    "SOLVERS",
    "Callback",
    "CountedNetwork",
    "autoguided_velocity",
    "differential_correction",
    "epsilon_scaled",
    "guided_velocity",
    "sample",
    "time_grid",
    "time_shifted",
]
