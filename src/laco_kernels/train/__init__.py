"""Training LLaVA-style models, and the small encoders and pictures that experiments are made with. Needs the ``train`` extra."""
