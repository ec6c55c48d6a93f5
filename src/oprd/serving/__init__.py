"""A teacher in another process: the service that holds it, and the stand-in that a trainer has of it.

Nothing here imports torch or the packages of the extra ``serve`` before they are needed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oprd.serving.remote import RemoteTeacher, connect

__all__ = ["RemoteTeacher", "connect"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from oprd.serving import remote

    return getattr(remote, name)
