"""Low-bit linear layers and a whole decoder step on a CPU, compiled by numba for the processor at hand."""
