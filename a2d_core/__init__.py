"""A2D: turn an autoregressive language model into a diffusion language model.

    import a2d_core as a2d
    model = a2d.load("runs/sft/checkpoint-final")
    answers = a2d.generate(model, [model.encode("Tell me about the sea.")], a2d.SampleConfig())

Every stage is in `a2d_core.stages`, and on the command line: `python -m a2d_core --help`. The names below are imported when
they are first asked for, so that this package costs nothing where only its light parts are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from a2d_core.config import ConvertConfig, EvaluateConfig, Recipe, SampleConfig, TrainConfig, UserError
    from a2d_core.conversion import convert
    from a2d_core.likelihood import nelbo
    from a2d_core.models import DiffusionModel, load
    from a2d_core.sampling import generate, stream

__all__ = [
    "ConvertConfig", "DiffusionModel", "EvaluateConfig", "Recipe", "SampleConfig", "TrainConfig", "UserError",
    "convert", "generate", "load", "nelbo", "stream",
]  # fmt: skip
_ROOMS = {"DiffusionModel": "models", "convert": "conversion", "load": "models", "nelbo": "likelihood"}
_ROOMS |= dict.fromkeys(("generate", "stream"), "sampling")

if not TYPE_CHECKING:  # a type checker reads the imports above, and goes on refusing names that are not there

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'config')}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
