"""How wrong a hypergradient is: efficiency constants, a-posteriori errors, requested accuracy."""

from bilevax.certificates._efficiency import EfficiencyConstant as EfficiencyConstant
from bilevax.certificates._efficiency import efficiency_constant as efficiency_constant
