"""Tables of plug-ins: a name stands for "module:attribute", imported when it is first used."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from deploypipe.errors import DeployPipeError, UsageError, nearest


def known(table: Mapping[str, str], entry_point_group: str) -> dict[str, str]:
    """Return our own rows and those that installed packages add under `entry_point_group`."""
    return {entry.name: entry.value for entry in entry_points(group=entry_point_group)} | dict(table)


def resolve(
    name: str,
    table: Mapping[str, str],
    entry_point_group: str,
    *,
    what: str,
    error: type[DeployPipeError] = UsageError,
    also: Sequence[str] = (),
) -> Any:
    """Import the plug-in called `name`; `also` are names that the user may have meant and that are none.

    Raises:
        error: No row has this name; the message suggests the nearest one. Or another package's plug-in cannot be loaded.
    """
    rows = known(table, entry_point_group)
    if name not in rows:
        raise error(f"unknown {what} '{name}'", at=f"--{what} {name}", fix=nearest(name, {*rows, *also}))
    module, _, attribute = rows[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as failure:
        if name in table:
            raise
        reason = f"{type(failure).__name__}: {failure}"
        message, fix = f"{what} '{name}' of another package cannot be loaded: {reason}", "update or uninstall that package"
        raise error(message, at=rows[name], fix=fix) from failure
