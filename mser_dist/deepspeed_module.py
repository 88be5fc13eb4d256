"""The one door through which DeepSpeed is imported."""

import sys
from typing import Any


def module() -> Any:
    """DeepSpeed, imported without MLflow, which its autotuner, of no use here, would bring: three modules of four."""
    if "deepspeed" not in sys.modules and "mlflow" not in sys.modules:
        hidden: Any = None  # an import of it fails, which the autotuner is prepared for
        sys.modules["mlflow"] = hidden
        try:
            import deepspeed
        finally:
            del sys.modules["mlflow"]
    import deepspeed

    return deepspeed
