"""Options of an algorithm: the fields of its frozen dataclass, parsed from what a user wrote. Needs no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_type_hints

from deploypipe.errors import UsageError, nearest

OptionValue = str | int | float | bool
_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Option:
    """One option: what it does, its default and its range.

    Attributes:
        name: As the user writes it.
        default: Also decides the type.
        meaning: One line.
        low: Smallest value allowed; None for no limit.
        high: Largest value allowed; None for no limit.
        choices: Texts allowed; empty for no limit.
    """

    name: str
    default: OptionValue
    meaning: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def parse(self, given: object) -> OptionValue:
        """Return `given`, text or value, as a value of this option.

        Raises:
            UsageError: It has another type or is out of range.
        """
        value = self._typed(given)
        bad_choice = bool(self.choices) and value not in self.choices
        if value is None or bad_choice or not self._in_range(value):
            raise UsageError(f"option '{self.name}' cannot be {given!r}", at=f"--set {self.name}={given}", fix=self._wanted())
        return value

    def _typed(self, given: object) -> OptionValue | None:
        kind = type(self.default)
        if kind is bool:
            return given if isinstance(given, bool) else _SWITCH.get(str(given).lower())
        if kind is str:
            return given if isinstance(given, str) else None
        if isinstance(given, bool):
            return None
        try:
            number = float(str(given))
        except ValueError:
            return None
        if kind is int:
            return int(number) if number.is_integer() else None
        return number

    def _in_range(self, value: OptionValue) -> bool:
        if isinstance(value, (bool, str)):
            return True
        low = float("-inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        return low <= value <= high and abs(value) != float("inf")  # NaN fails every comparison

    def _wanted(self) -> str:
        if self.choices:
            return f"write one of {', '.join(self.choices)}"
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[type(self.default)]
        low = "" if self.low is None else f" from {self.low:g}"
        high = "" if self.high is None else f" up to {self.high:g}"
        return f"write {kind}{low}{high}, as in {self.name}={self.default}"


def option(
    default: OptionValue,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Return a dataclass field that is an option of an algorithm."""
    limits = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=limits)


def options_of(algorithm: type) -> tuple[Option, ...]:
    """Return the options of an algorithm's class, in the order of its fields."""
    get_type_hints(algorithm)  # a field without a proper annotation is a mistake of the author: fail here
    return tuple(Option(f.name, cast("OptionValue", f.default), **f.metadata) for f in dataclasses.fields(algorithm))


def parse_options(name: str, options: Mapping[str, object], known: tuple[Option, ...]) -> dict[str, OptionValue]:
    """Return typed values for the options that were given.

    A dash or a trailing underscore makes no difference: "lambda" is written for a field `lambda_`.

    Raises:
        UsageError: An option is unknown, has another type or is out of range.
    """
    by_name = {option.name.rstrip("_"): option for option in known}
    values = {}
    for given, value in options.items():
        plain = given.replace("-", "_").rstrip("_")
        if plain not in by_name:
            fix = nearest(given, by_name) if by_name else f"'{name}' takes no options"
            raise UsageError(f"algorithm '{name}' has no option '{given}'", at=f"--set {given}={value}", fix=fix)
        values[by_name[plain].name] = by_name[plain].parse(value)
    return values
