"""The weights of a checkpoint as a plain model, for PyTorch alone and for transformers."""

from mythos.checkpoint.exported import INDEX_FILE, load_exported
from mythos.export.weights import SpecialTokens, export

__all__ = ["INDEX_FILE", "SpecialTokens", "export", "load_exported"]
