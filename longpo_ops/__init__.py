"""Preference training of language models on long contexts: the public names, loaded with their modules at first use."""

import importlib

__version__ = "0.1.0"

_HOME = {
    name: module
    for module, names in {
        "ops.preference": ("fused_preference_loss", "packed_preference_loss", "PreferenceOutput"),
        "ops.logprobs": ("linear_logprobs", "linear_cross_entropy"),
        "ops.divergence": ("linear_kl",),
        "ops.objectives": ("LongPO", "DPO", "IPO", "Hinge", "KTOPair", "SimPO", "LOGO", "ORPO"),
        "ops.head": ("PreferenceHead", "attach", "detach"),
        "ops.dispatch": ("explain_backend",),
    }.items()
    for name in names
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access is a plain attribute, which torch.compile can trace
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
