"""The MLflow model: this file is stored with each registered version and read again by `mlflow.pyfunc.load_model`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class DiffusionLanguageModel(PythonModel):
    """Answers prompts: a column `prompt`, one row a prompt, gives a list of texts.

    The parameters of a call replace the fields of `SampleConfig` that have their names; 0 stands for "not set" where a field may be
    None (threshold, steps_per_block, ...).
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

        config = self.config.with_parameters(params or {})
        prompts = [self.model.encode(str(text), chat=config.chat) for text in model_input["prompt"]]
        return [answer.text for answer in sampling.generate(self.model, prompts, config)]

    def predict_stream(self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None) -> Iterator[str]:
        """The answer to the one prompt of `{"prompt": TEXT}`: each block when it is filled, and the pieces make up the answer."""
        from a2d_core import watch

        config = self.config.with_parameters(params or {})
        yield from watch.blocks(self.model, self.model.encode(str(model_input["prompt"]), chat=config.chat), config)


set_model(DiffusionLanguageModel())
