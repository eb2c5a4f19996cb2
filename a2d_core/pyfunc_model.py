"""The MLflow model: this file is stored with each registered version and read again by `mlflow.pyfunc.load_model`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class DiffusionLanguageModel(PythonModel):
    """Answers prompts: a column `prompt`, one row a prompt, gives a list of texts.

    The parameters of a call replace the fields of `SampleConfig` that have their names; 0 stands for "not set" where a field may be
    None (threshold, steps_per_block, ...). A value out of range is an `MlflowException` (over HTTP: 400), as one of a wrong type is.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint."""
        from a2d_core import models
        from a2d_core.config import SampleConfig
        from a2d_core.settings import build

        self.config = build(SampleConfig, context.model_config["sample"], "sample")
        self.model = models.load(context.artifacts["checkpoint"])

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """One answer per row. (Any other hint on `model_input` would replace the signature, and drop its parameters.)"""
        cells = model_input["prompt"]
        texts = [text for cell in cells for text in (cell if isinstance(cell, (list, np.ndarray)) else [cell])]  # {"prompt": [...]} is one
        return self._answers(texts, params or {})

    def predict_stream(self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None) -> Iterator[str]:
        """The answer to the one prompt of `{"prompt": TEXT}`: each block when it is filled, and the pieces make up the answer."""
        from a2d_core import watch

        with _told():
            (prompt,), config = self._asked([model_input["prompt"]], params or {})
            yield from watch.blocks(self.model, prompt, config)

    def _answers(self, texts: list[Any], params: dict[str, Any]) -> list[str]:
        from a2d_core import sampling

        with _told():
            prompts, config = self._asked(texts, params)
            return [answer.text for answer in sampling.generate(self.model, prompts, config)]

    def _asked(self, texts: list[Any], params: dict[str, Any]) -> tuple[list[list[int]], Any]:
        from a2d_core import settings

        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise MlflowException.invalid_parameter_value(f"a prompt must be text, not {wrong[0]!r}")
        config = settings.with_parameters(self.config, params)
        return [self.model.encode(text, chat=config.chat) for text in texts], config


@contextmanager
def _told() -> Iterator[None]:
    """Tell a mistake in a call as MLflow does: over HTTP it is a 400."""
    from a2d_core.config import UserError

    try:
        yield
    except UserError as error:
        raise MlflowException.invalid_parameter_value(str(error)) from error


set_model(DiffusionLanguageModel())
