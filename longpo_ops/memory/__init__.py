"""Memory: what makes long sequences fit on one device. The public names, loaded with their modules at first use."""

from ..lazy import public_names

__all__, __getattr__, __dir__ = public_names(
    __name__,
    {
        "offload": ("OffloadHandle", "Placement", "offload_activations", "place"),
        "tiling": ("TilingHandle", "explain_tiling", "tile_layers"),
        "optimizer": ("AdamW", "RMSprop", "float32_gradients"),
        "plan": ("Machine", "Work", "predict"),
        "search": ("fit", "longest"),
        "settings": ("Memory",),
    },
)
