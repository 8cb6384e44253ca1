"""Message kinds between API and engine process; every message is (kind, payload)."""

HELLO, SUBMIT, ABORT, STOP = b"hello", b"submit", b"abort", b"stop"
"""Client to engine."""
INFO, FRAME = b"info", b"frame"
"""Engine to client."""
