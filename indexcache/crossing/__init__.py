"""The domain matrix: patterns calibrated on one kind of text and tested on another."""
