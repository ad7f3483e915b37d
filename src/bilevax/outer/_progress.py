"""The progress bar of a run, on a terminal only."""

from types import TracebackType
from typing import Any

import jax
import numpy as np

from bilevax.outer._state import BilevelState

try:
    import tqdm
except ImportError:  # an extra: runs are quiet without it
    tqdm: Any = None


class ProgressBar:
    """A bar with the value, the norm of the gradient and the iterations of the last step."""

    def __init__(self, steps: int, done: int, *, shown: bool) -> None:
        self._bar: Any = None
        if shown and tqdm is not None:
            # `disable=None` is a bar on a terminal and nothing elsewhere.
            self._bar = tqdm.tqdm(
                total=steps, initial=done, unit="step", disable=None, dynamic_ncols=True
            )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, state: BilevelState) -> None:
        """Show the last step; of several runs, that of the best one."""
        if self._bar is None or self._bar.disable:
            return
        step, best, history = jax.device_get((state.step, state.best.value, state.history))
        if np.ndim(step):
            run = int(np.argmin(best))
            step, history = step[run], jax.tree.map(lambda leaf: leaf[run], history)
        last = (int(step) - 1) % len(history.value)
        self._bar.set_postfix_str(
            f"value {history.value[last]:.6g}, gradient {history.gradient_norm[last]:.2e}, "
            f"iterations {history.inner_iterations[last]} + {history.adjoint_iterations[last]}",
            refresh=False,
        )
        self._bar.update(done - self._bar.n)
