"""Soak and chaos: mixed traffic with all that goes wrong, and checks that nothing leaks, is lost or stays slow."""
