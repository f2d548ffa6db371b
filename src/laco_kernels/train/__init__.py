"""Training, and the small encoders and pictures that experiments on any machine are made with. Needs the ``train`` extra."""
