"""The explicit engine: value and hypergradient, with warm starts and reports."""

from bilevax.hypergradient._engine import Engine as Engine
from bilevax.hypergradient._engine import require_certificates as require_certificates
from bilevax.hypergradient._engine import value_and_hypergradient as value_and_hypergradient
from bilevax.hypergradient._evaluate import cold_residual as cold_residual
from bilevax.hypergradient._results import Hypergradient as Hypergradient
from bilevax.hypergradient._results import HypergradientReport as HypergradientReport
from bilevax.hypergradient._results import WarmStart as WarmStart
from bilevax.hypergradient._results import cold_start as cold_start
