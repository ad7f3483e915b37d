"""How much of a training run is spent inside of compiled steps: `make steady`.

`minimize` drives two runs with a progress bar on a terminal (a pseudo-terminal, if there is none)
and checkpoints every second:

  small    ridge regression with 20 penalties, whose steps take microseconds
  digits   multinomial logistic regression with 640 penalties, whose steps take milliseconds

The share is `seconds.inside / seconds.total` of the result: everything after the first step, which
compiles. A share below 95 % is listed as missed, and then the exit status is 1.
"""

import os
import pty
import sys
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import outcome
from problems import Data, least_squares, regression_data, ridge_objective
from sklearn.datasets import load_digits

import bilevax as bx
from bilevax.checkpoints import Checkpoints

OUTPUT = Path(__file__).parent / "output" / "steady"
STEPS = {"small": 50_000, "digits": 300}
LEAST = 0.95


def small() -> tuple[bx.OuterStep, jax.Array, jax.Array]:
    """Return a step, y and x0 of ridge regression."""
    train, validation = regression_data(60, 20, binary=False)
    engine = bx.value_and_hypergradient(
        lambda w, y: least_squares(w, validation),
        bx.minimum(lambda w, y: ridge_objective(w, y, train)),
        bx.ConjugateGradient(rtol=1e-6),
    )
    return bx.make_step(engine, optax.adam(1e-4)), jnp.zeros(20), jnp.zeros(20)


def digits() -> tuple[bx.OuterStep, jax.Array, jax.Array]:
    """Return a step, y and x0 of multinomial logistic regression."""
    features, labels = (jnp.asarray(part) for part in load_digits(return_X_y=True))
    features = features / 16
    train, validation = (features[::2], labels[::2]), (features[1::2], labels[1::2])

    def loss(w: jax.Array, data: Data) -> jax.Array:
        x, classes = data
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ w, classes))

    engine = bx.value_and_hypergradient(
        lambda w, y: loss(w, validation),
        bx.minimum(lambda w, y: loss(w, train) + jnp.sum(jnp.exp(y) * w**2) / 2),
        bx.AcceleratedGradient(0.5, rtol=1e-3),
    )
    return bx.make_step(engine, optax.adam(1e-2)), jnp.full((64, 10), -5.0), jnp.zeros((64, 10))


def run(name: str, folder: Path) -> bx.MinimizeResult:
    """Run one of the two."""
    step, y, x0 = {"small": small, "digits": digits}[name]()
    checkpoint = Checkpoints(folder, every_seconds=1.0)
    return bx.minimize(step, y, x0, STEPS[name], rtol=0.0, checkpoint=checkpoint)


def on_a_terminal() -> None:
    """Give standard error a terminal, so that progress bars are drawn."""
    if sys.stderr.isatty():
        return
    ours, theirs = pty.openpty()
    sys.stderr = os.fdopen(theirs, "w")

    def drain() -> None:
        while os.read(ours, 4096):
            pass

    threading.Thread(target=drain, daemon=True).start()


def main() -> int:
    """Print the shares; return the exit status."""
    jax.config.update("jax_enable_x64", True)
    on_a_terminal()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    results, missed = {}, []
    for name in STEPS:
        with tempfile.TemporaryDirectory() as folder:
            result = run(name, Path(folder))
        seconds = result.seconds
        share = seconds.inside / seconds.total
        per_step = seconds.inside / (result.steps - 1)
        print(
            f"{name:8} {result.steps:7} steps, {1e6 * per_step:8.1f} us each, "
            f"{seconds.total:6.2f} s in all, {share:.1%} inside of compiled steps"
        )
        results[name] = seconds._asdict() | {"steps": result.steps, "share": share}
        if not share >= LEAST:
            missed.append(f"{name}: {share:.1%} inside of compiled steps, expected {LEAST:.0%}")
    outcome.write(results, OUTPUT)
    outcome.tell(missed)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
