"""Stochastic hypergradients: inner problems and outer objectives seen through batches of data."""

from bilevax.stochastic._descent import DescentHistory as DescentHistory
from bilevax.stochastic._descent import DescentResult as DescentResult
from bilevax.stochastic._descent import sihd as sihd
from bilevax.stochastic._engine import StochasticEngine as StochasticEngine
from bilevax.stochastic._engine import stochastic_hypergradient as stochastic_hypergradient
from bilevax.stochastic._host import HostSampler as HostSampler
from bilevax.stochastic._problems import StochasticProblem as StochasticProblem
from bilevax.stochastic._problems import stochastic_fixed_point as stochastic_fixed_point
from bilevax.stochastic._problems import stochastic_minimum as stochastic_minimum
from bilevax.stochastic._results import StochasticHypergradient as StochasticHypergradient
from bilevax.stochastic._results import StochasticReport as StochasticReport
from bilevax.stochastic._results import StochasticState as StochasticState
from bilevax.stochastic._sampling import EpochSampler as EpochSampler
from bilevax.stochastic._sampling import Sampler as Sampler
from bilevax.stochastic._sampling import SamplerState as SamplerState
from bilevax.stochastic._sampling import UniformSampler as UniformSampler
from bilevax.stochastic._step_sizes import decreasing as decreasing
