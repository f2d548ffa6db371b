"""Training LLaVA-style models: data, checkpoints that survive, and losses that are looked at."""
