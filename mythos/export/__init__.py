"""The weights of a checkpoint as a plain model, for PyTorch alone and for transformers."""

from mythos.export.hugging_face import SpecialTokens
from mythos.export.weights import INDEX_FILE, export, load_exported

__all__ = ["INDEX_FILE", "SpecialTokens", "export", "load_exported"]
