"""The MLflow model: this file is stored with each registered version and read again by `mlflow.pyfunc.load_model`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class DiffusionLanguageModel(PythonModel):
    """Answers prompts: a column `prompt`, one row a prompt, gives a list of texts.

    The parameters of a call (max_new_tokens, threshold, temperature, block_size, steps) replace those
    of the recipe that the model was sampled with; `steps` is the number of network evaluations per
    block. 0 stands for "not set" in threshold, block_size and steps.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint."""
        from a2d_core import models
        from a2d_core.config import SampleConfig, build

        self.config = build(SampleConfig, context.model_config["sample"], "sample")
        self.model = models.load(context.artifacts["checkpoint"])

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """One answer per row. (Any other hint on `model_input` would replace the signature, and drop its parameters.)"""
        from a2d_core import sampling

        tokenizer, given = self.model.tokenizer, params or {}
        changes: dict[str, Any] = {name: given[name] for name in ("max_new_tokens", "temperature") if name in given}
        unset = {"threshold": "threshold", "block_size": "block_size", "steps": "steps_per_block"}
        changes |= {field: given[name] or None for name, field in unset.items() if name in given}
        config = replace(self.config, **changes)
        prompts = [self.model.encode(str(text), chat=config.chat) for text in model_input["prompt"]]
        return [tokenizer.decode(g.tokens, skip_special_tokens=True) for g in sampling.generate(self.model, prompts, config)]


set_model(DiffusionLanguageModel())
