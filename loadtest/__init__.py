"""The load test: measures any OpenAI-compatible server over HTTP. Imports nothing of the server."""
