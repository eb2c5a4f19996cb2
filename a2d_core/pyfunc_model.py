"""The MLflow model: this file is stored with each registered version and read again by `mlflow.pyfunc.load_model`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class DiffusionLanguageModel(PythonModel):
    """Answers prompts: a column `prompt`, one row a prompt, gives a list of texts.

    The parameters of a call (max_new_tokens, threshold, temperature, block_size, steps) replace those
    of the recipe that the model was sampled with; `steps` is the number of network evaluations per
    block. 0 stands for "not set" in threshold, block_size and steps. A value out of range is an
    `MlflowException` (over HTTP: 400), as one of a wrong type is.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint."""
        from a2d_core import models
        from a2d_core.config import SampleConfig, build

        self.config = build(SampleConfig, context.model_config["sample"], "sample")
        self.model = models.load(context.artifacts["checkpoint"])

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """One answer per row. (Any other hint on `model_input` would replace the signature, and drop its parameters.)"""
        cells = model_input["prompt"]
        texts = [text for cell in cells for text in (cell if isinstance(cell, (list, np.ndarray)) else [cell])]  # {"prompt": [...]} is one
        return self._answers(texts, params or {})

    def predict_stream(self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None) -> Iterator[str]:
        """The answer to the one prompt of `{"prompt": TEXT}`, in pieces that make it up."""
        yield from self._answers([model_input["prompt"]], params or {})

    def _answers(self, prompts: list[Any], params: dict[str, Any]) -> list[str]:
        from a2d_core import sampling
        from a2d_core.config import UserError

        wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if wrong:
            raise MlflowException.invalid_parameter_value(f"a prompt must be text, not {wrong[0]!r}")
        changes: dict[str, Any] = {name: params[name] for name in ("max_new_tokens", "temperature") if name in params}
        unset = {"threshold": "threshold", "block_size": "block_size", "steps": "steps_per_block"}
        changes |= {field: params[name] or None for name, field in unset.items() if name in params}
        try:
            config = replace(self.config, **changes)
            tokens = [self.model.encode(text, chat=config.chat) for text in prompts]
            generated = sampling.generate(self.model, tokens, config)
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return [self.model.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in generated]


set_model(DiffusionLanguageModel())
