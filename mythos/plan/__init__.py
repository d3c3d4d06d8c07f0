"""Arithmetic on a configuration: no torch, so that it runs on a login node."""
