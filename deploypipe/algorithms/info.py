"""What a user should know before choosing an algorithm. Needs no torch."""

from dataclasses import dataclass

from deploypipe.algorithms.options import Option


@dataclass(frozen=True)
class Info:
    """What a user should know before choosing an algorithm.

    Attributes:
        name: As on the command line.
        paper: First author, title, venue, identifier.
        year: Of the paper.
        taxonomy: What is removed (structured: whole channels), when it is decided (all are static: before deployment), from what
            (a trained model, or fresh weights), and by what (magnitude, penalty, redundancy, reconstruction, gradient, search).
        needs: What it needs of "data", "labels", "gradients" and "training".
        options: Its options with defaults and ranges.
    """

    name: str
    paper: str
    year: int
    taxonomy: str
    needs: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
