"""Sparse attention over latents (MLA in its MQA form)."""
