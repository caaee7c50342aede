"""The code that travels with the registered model: MLflow runs this file, from the model's folder, to load it.

Beside it lie the files of the exported model, and `code/` with this package; nothing is pickled.
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
    """See `distilldsm.inference.service.answer` for what goes in and what comes out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Compile the network; its files are checked against their hashes.

        Raises:
            DataError: a file is missing or has changed.
        """
        self.predictor = load_exported(Path(__file__).parent)

    # The hint is one of those that MLflow leaves alone; from most others it would make a signature.
    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> Any:
        """Logits or a mask.

        Raises:
            UserError: what was asked cannot be done; from a server as MLflow's own error, which it hands to the client.
        """
        remote = os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true" or "mlserver" in sys.modules
        try:
            return answer(self.predictor, model_input, params, remote=remote)
        except UserError as error:
            if remote:
                raise MlflowException.invalid_parameter_value(str(error)) from None
            raise


set_model(ScanModel())
