"""Memory: what makes long sequences fit on one device. The public names, loaded with their modules at first use."""

import importlib

_HOME = {
    name: module
    for module, names in {
        "offload": ("OffloadHandle", "Placement", "offload_activations", "place"),
        "tiling": ("TilingHandle", "tile_layers"),
        "optimizer": ("AdamW", "float32_gradients"),
        "plan": ("Machine", "Work", "fit", "longest", "predict"),
        "settings": ("Memory",),
    }.items()
    for name in names
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
