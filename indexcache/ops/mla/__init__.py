"""Compute sparse attention over latents: MLA in its MQA form."""
