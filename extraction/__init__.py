"""A TFLite graph of Stable Audio's conditioners → exact weights and the exact seconds formula, for the runtime to load.

`extract(path, output)` writes a model folder's conditioner part; `inspect(path)` tells what a file holds.
"""

from .errors import ExtractionError
from .extract import extract, inspect
from .report import Report

__all__ = ["ExtractionError", "Report", "extract", "inspect"]
