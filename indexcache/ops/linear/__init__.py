"""Multiply by weights in block-scaled FP8, and run experts, without dequantised copies."""
