"""Measuring: one honest way of timing, counting and reporting. Needs the ``bench`` extra."""
