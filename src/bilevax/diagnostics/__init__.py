"""Is a hypergradient right: what the library computes, held against what it does not use."""

from bilevax.diagnostics._check import HypergradientCheck as HypergradientCheck
from bilevax.diagnostics._check import assert_hypergradient as assert_hypergradient
from bilevax.diagnostics._check import check_hypergradient as check_hypergradient
from bilevax.diagnostics._problem import ProblemCheck as ProblemCheck
from bilevax.diagnostics._problem import check_problem as check_problem
from bilevax.diagnostics._recommend import RuleTable as RuleTable
from bilevax.diagnostics._recommend import recommend_rule as recommend_rule
