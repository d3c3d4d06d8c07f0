"""How fast this machine is, and how fast it trains a model."""
