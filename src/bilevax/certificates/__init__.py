"""How wrong a hypergradient is: efficiency constants, a-posteriori errors, requested accuracy."""

from bilevax.certificates._accuracy import AbsoluteAccuracy as AbsoluteAccuracy
from bilevax.certificates._accuracy import Accuracy as Accuracy
from bilevax.certificates._accuracy import RelativeAccuracy as RelativeAccuracy
from bilevax.certificates._certificate import Certificate as Certificate
from bilevax.certificates._certificate import certify as certify
from bilevax.certificates._certificate import hypergradient_error as hypergradient_error
from bilevax.certificates._efficiency import EfficiencyConstant as EfficiencyConstant
from bilevax.certificates._efficiency import efficiency_constant as efficiency_constant
from bilevax.certificates._rounds import solve_accurately as solve_accurately
