"""Preference training of language models on long contexts: the public names, loaded with their modules at first use."""

from .lazy import public_names

__version__ = "0.1.0"

_names, __getattr__, __dir__ = public_names(
    __name__,
    {
        "ops.preference": (
            "fused_preference_loss",
            "packed_preference_loss",
            "packed_objective_loss",
            "PreferenceOutput",
        ),
        "ops.logprobs": ("linear_logprobs", "linear_cross_entropy"),
        "ops.tokens": ("fused_policy_loss", "fused_token_loss", "TokenOutput"),
        "ops.token_objective": ("TokenObjective", "ClippedPolicy"),
        "ops.divergence": ("linear_kl",),
        "ops.objective": ("Objective", "Answers"),
        "ops.objectives": (
            *(
                "LongPO",
                "DPO",
                "Robust",
                "Hinge",
                "IPO",
                "EXOPair",
                "NCAPair",
                "BCOPair",
                "SPPOHard",
                "APOZero",
                "APODown",
            ),
            *("DiscoPOP", "KTO", "KTOPair", "AOT", "CPO", "SimPO", "LOGO", "ORPO"),
        ),
        "ops.head": ("PreferenceHead", "attach", "detach"),
        "ops.dispatch": ("explain_backend",),
    },
)
__all__ = ["__version__", *_names]
