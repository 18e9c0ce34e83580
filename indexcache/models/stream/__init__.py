"""Run a model whose weights do not fit the device: layer by layer, for many patterns at once."""
