"""One persistent Triton kernel for a whole decode step: an experiment that is measured, not served."""
