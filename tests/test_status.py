"""Status codes and their remedies."""

import jax
import jax.numpy as jnp
import pytest

from bilevax import Status
from bilevax._status import code, is_failure, is_unsolved

NAMES = [
    "CONVERGED",
    "TRUNCATED",
    "MAXITER",
    "STALLED",
    "DIVERGED",
    "NONFINITE",
    "BREAKDOWN",
    "INDEFINITE",
    "UNBOUNDED",
]


def test_the_codes_are_what_reports_have_always_held():
    assert [(status.name, int(status)) for status in Status] == list(
        zip(NAMES, range(9), strict=True)
    )


@pytest.mark.parametrize("status", Status)
def test_every_status_has_a_remedy_of_its_own(status):
    assert status.remedy
    assert sum(other.remedy == status.remedy for other in Status) == 1


def test_remedies_name_what_to_change():
    assert "`maxiter`" in Status.MAXITER.remedy
    assert "learning rate" in Status.DIVERGED.remedy
    assert "`damping`" in Status.BREAKDOWN.remedy
    assert "Structure.SYMMETRIC" in Status.INDEFINITE.remedy
    assert "penalty" in Status.UNBOUNDED.remedy


def test_codes_are_integer_arrays():
    for status in Status:
        assert (code(status).dtype, code(status).shape, int(code(status))) == (
            jnp.int32,
            (),
            int(status),
        )


def test_which_statuses_are_failures_and_which_are_unsolved():
    codes = jnp.arange(9)
    failures = {
        Status.DIVERGED,
        Status.NONFINITE,
        Status.BREAKDOWN,
        Status.INDEFINITE,
        Status.UNBOUNDED,
    }
    unsolved = failures | {Status.MAXITER, Status.STALLED}
    assert [Status(i) for i in range(9) if jax.jit(is_failure)(codes)[i]] == sorted(failures)
    assert [Status(i) for i in range(9) if jax.jit(is_unsolved)(codes)[i]] == sorted(unsolved)
