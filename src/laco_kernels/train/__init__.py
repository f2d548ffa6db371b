"""Training LLaVA-style models, and small encoders and pictures to make experiments with. Needs the ``train`` extra."""
