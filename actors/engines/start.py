"""Which engine a config means, and its start. Each is imported only where it is used: vLLM alone takes 14 seconds."""

import importlib
import importlib.util
from typing import Literal

from actors.engines.seam import Engine, EngineKind, EngineSpec


def resolve_engine(choice: Literal["auto"] | EngineKind) -> EngineKind:
    """`auto` is vLLM where it is installed."""
    if choice != "auto":
        return choice
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


def warm_engine(choice: EngineKind, spec: EngineSpec) -> None:
    """What of `start_engine` needs no model: the model's directory may not be there yet. Blocks."""
    if choice == "vllm":
        from actors.engines.vllm import import_vllm

        import_vllm(spec)
    else:
        importlib.import_module("actors.engines.transformers")


def start_engine(choice: EngineKind, spec: EngineSpec) -> Engine:
    """Load the model; takes seconds to minutes. Must be called inside a running event loop."""
    if choice == "vllm":
        from actors.engines.vllm import VllmEngine

        return VllmEngine(spec)
    from actors.engines.transformers import TransformersEngine

    return TransformersEngine(spec)
