"""Mythos trains recurrent-depth (looped) transformers with sparse mixture-of-experts on many machines."""

__version__ = "0.1.0"
