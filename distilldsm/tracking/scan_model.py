"""The code of a registered model: to load the model, MLflow runs the copy of this file in the model's folder.

The folder also holds the files of the exported model and this package (in `code/`). Nothing is pickled.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from distilldsm.core.errors import UserError
from distilldsm.inference.loading import load_exported
from distilldsm.inference.service import answer


class ScanModel(PythonModel):
    """The MLflow model; `distilldsm.inference.service.answer` describes its inputs and outputs."""

    def load_context(self, context: PythonModelContext) -> None:
        """Check the model's files against their hashes and compile the network.

        Raises:
            DataError: a file is missing or has changed.
        """
        self.predictor = load_exported(Path(__file__).parent)

    # MLflow ignores the type hint `np.ndarray`. From most other hints it would derive a signature.
    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> Any:
        """Logits or a mask.

        Raises:
            UserError: the request is invalid.
            MlflowException: the same on a server; MLflow passes its text to the client.
        """
        remote = os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true" or "mlserver" in sys.modules
        try:
            return answer(self.predictor, model_input, params, remote=remote)
        except (UserError, OSError) as error:  # e.g. a path that is too long
            if remote:
                raise MlflowException.invalid_parameter_value(str(error)) from None
            raise


set_model(ScanModel())
