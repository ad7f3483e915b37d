"""What a user can choose, apart from what works with it: --help needs no pandas."""

import enum

PENALTIES = ("single", "per-feature")  # or the name of a file
RULES = ("implicit", "newton", "jacobi")
SHRINKS = (1.0, 0.1, 0.01, 0.0)  # from strong to weak, for runs go on from each other
LOWEST, HIGHEST = 1e-5, 1e3  # of penalties; beyond, losses hardly change

# What stands for a missing value in a CSV file, besides an empty cell: what pandas takes for it,
# and the question mark of the UCI repository. Frequent ones first, for messages.
MISSING = (
    "?", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "n/a", "-NaN", "-nan", "<NA>", "#NA",
    "#N/A", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN", "#N/A N/A",
)  # fmt: skip


class Kind(enum.StrEnum):
    """What is fitted."""

    RIDGE = "ridge"
    LOGISTIC = "logistic"
    MULTINOMIAL = "multinomial"

    @property
    def loss_name(self) -> str:
        """The loss of held-out rows, for people."""
        return "squared error" if self is Kind.RIDGE else "cross entropy"
