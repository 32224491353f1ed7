"""Ways to reach a target: one file each, registered here by name."""

from deploypipe.errors import TargetError
from deploypipe.plugins import resolve
from deploypipe.runners.base import Runner
from deploypipe.targets import Target

RUNNERS: dict[str, str] = {
    "local": "deploypipe.runners.local:Local",
    "ssh": "deploypipe.runners.ssh:Ssh",
}
ENTRY_POINTS = "deploypipe.runners"


def load_runner(target: Target) -> Runner:
    """Return the runner that `target` names.

    Raises:
        TargetError: There is none of this name.
    """
    runner: Runner = resolve(target.reach.via, RUNNERS, ENTRY_POINTS, what="runner", error=TargetError)(target.reach)
    return runner
