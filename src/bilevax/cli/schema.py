"""The schema of model.json: what its entries must be, each by itself and together."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bilevax._frontend.words import DataError, counted, quote, shorten
from bilevax.cli.choices import Kind

FORMAT = "bilevax model 1"


class _Fault(ValueError):
    """What is wrong with an entry."""


class _Entries:
    """An object of JSON, whose entries are taken by name and checked."""

    def __init__(self, content: Any, name: str) -> None:
        if not isinstance(content, dict):
            raise _Fault(f"its {name} must be an object")
        self._content = content

    def take(self, name: str) -> Any:
        """Return an entry as it is."""
        if name not in self._content:
            raise _Fault(f"it lacks {quote(name)}")
        return self._content[name]

    def text(self, name: str) -> str:
        """Return a text that can be written to a file."""
        return _text(self.take(name), name)

    def texts(self, name: str) -> list[str]:
        """Return a list of different texts."""
        value = self.take(name)
        if not isinstance(value, list):
            raise _Fault(f"its {name} must be a list of texts")
        texts = [_text(entry, name) for entry in value]
        repeated = [quote(text) for text in dict.fromkeys(texts) if texts.count(text) > 1]
        if repeated:
            raise _Fault(f"its {name} are repeated: {shorten(repeated)}")
        return texts

    def numbers(self, name: str, *shape: int, positive: bool = False) -> np.ndarray:
        """Return finite numbers, lists of lists of this shape."""
        value = self.take(name)
        found = _shape(value, name)
        if found != shape:
            raise _Fault(f"its {name} have the shape {found}, expected {shape}")
        array = np.array(value, dtype=np.float64)
        if not np.isfinite(array).all():
            raise _Fault(f"its {name} must be finite")
        if positive and not np.all(array > 0):
            raise _Fault(f"its {name} must be positive")
        return array

    def number(self, name: str, *, positive: bool = False) -> float:
        """Return a finite number."""
        return float(self.numbers(name, positive=positive))


class Content:
    """The checked entries of model.json; see `fitted.Fitted`.

    Raises:
      DataError: if the file cannot be read, or is not a whole model.
    """

    def __init__(self, path: Path) -> None:
        content = _read(path)
        try:
            self._check(content)
        except _Fault as fault:
            raise DataError(f"{path} is not a whole model: {fault}") from None

    def _check(self, content: dict[str, Any]) -> None:
        top = _Entries(content, "content")
        preprocessing = _Entries(top.take("preprocessing"), "preprocessing")
        standardised = _Entries(top.take("standardised"), "standardised")
        kinds = [kind.value for kind in Kind]
        if top.take("model") not in kinds:
            raise _Fault(f"its model must be one of {', '.join(kinds)}")
        self.kind = Kind(top.take("model"))
        self.target = None if top.take("target") is None else top.text("target")
        self.classes = self._classes(top)
        self.features, self.dropped = top.texts("features"), top.texts("constant_features")
        if not self.features:
            raise _Fault("it has no features")
        both = [quote(name) for name in self.features if name in set(self.dropped)]
        if both:
            raise _Fault(f"its features are among its constant_features: {shorten(both)}")
        count = len(self.features)
        outputs = len(self.classes or []) if self.kind is Kind.MULTINOMIAL else 1
        self.means = preprocessing.numbers("means", count)
        self.scales = preprocessing.numbers("scales", count, positive=True)
        self.target_mean = preprocessing.number("target_mean")
        self.target_scale = preprocessing.number("target_scale", positive=True)
        if self.classes is not None and (self.target_mean, self.target_scale) != (0, 1):
            raise _Fault("its target_mean and target_scale must be 0 and 1, for it has classes")
        self.penalties = top.numbers("penalties", count, positive=True)
        self.coefficients = standardised.numbers("coefficients", outputs, count)
        self.intercepts = standardised.numbers("intercepts", outputs)

    def _classes(self, top: _Entries) -> list[str] | None:
        if self.kind is Kind.RIDGE:
            if top.take("classes") is not None:
                raise _Fault("its classes must be null, for it is a ridge model")
            return None
        classes = top.texts("classes")
        if len(classes) < 2 or (self.kind is Kind.LOGISTIC and len(classes) > 2):
            wanted = "two" if self.kind is Kind.LOGISTIC else "two or more"
            number = counted(len(classes), "class", "classes")
            raise _Fault(f"it has {number}, a {self.kind} model has {wanted}")
        return classes


def _read(path: Path) -> dict[str, Any]:
    try:
        # Whole numbers as floats: those of Python have no end, and no place in an array.
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=float)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):  # no JSON, or no text; or lists in lists without end
        raise DataError(f"{path} is not a model: it is not a JSON file") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(
            f"{path} is not a model: its format is not {quote(FORMAT)}; give the model.json that "
            "bilevax tune wrote"
        )
    return content


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Fault(f"its {name} must be text")
    # Half of a pair of surrogates cannot be written.
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _Fault(f"its {name} must be text that UTF-8 can hold")
    return value


def _shape(value: Any, name: str, deepest: int = 2) -> tuple[int, ...]:
    """Return the shape of numbers in lists, which are as long as each other."""
    if isinstance(value, float):
        return ()
    if not isinstance(value, list) or deepest == 0:
        raise _Fault(f"its {name} must be numbers, in lists of one length")
    shapes = {_shape(entry, name, deepest - 1) for entry in value}
    if len(shapes) > 1:
        raise _Fault(f"its {name} must be numbers, in lists of one length")
    return len(value), *(shapes.pop() if shapes else ())
