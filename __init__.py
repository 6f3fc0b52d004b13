"""expertmesh: a serving cluster for Qwen3 mixture-of-experts models with separate attention and expert tiers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> object:
    """`expertmesh.Client` loads gRPC when it is asked for, so the front door stays light."""
    if name in ("AsyncClient", "Client"):
        from . import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
