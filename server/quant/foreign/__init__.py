"""Quantised checkpoints of other projects, read into `server.quant.formats.QuantizedWeight`; one module a dialect."""
