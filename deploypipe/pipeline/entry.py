"""The one call that runs the whole pipeline."""

from typing import Any

from deploypipe.errors import BudgetError
from deploypipe.pipeline.recipe import resolved
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.run import Run
from deploypipe.progress import Reporter, Silent
from deploypipe.reports.report import Report
from deploypipe.store import Store


def build(request: Request | None = None, reporter: Reporter | None = None, **changes: Any) -> Report:
    """Run the whole pipeline and return its report, which also lies in the run folder.

    Args:
        request: What to do; or give its fields by name.
        reporter: Hears how far it is.
        changes: Fields of `Request`.

    Raises:
        DeployPipeError: By class: see `errors`.

    Example:
        >>> build(model="demo", budget="60%", epochs=0, out="runs/x").budget.met  # doctest: +SKIP
        True
    """
    request = resolved(request or Request.of(**changes))
    reporter = reporter or Silent()
    request.check()
    with Store(request.folder, reporter) as store:
        run = Run(request, store, reporter)
        try:
            report = run.report()
        finally:
            run.close()
    floor, reached = request.accuracy_floor, report.pruned.accuracy
    if floor is not None and reached is not None and reached < floor:
        raise BudgetError(
            f"the pruned model's accuracy is {reached:.4f}, below the floor of {floor:.4f}",
            at=f"run {request.folder}",
            fix="allow a larger --budget, fine-tune longer (--epochs), or lower --accuracy-floor",
        )
    return report
