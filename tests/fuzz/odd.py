"""Paths, methods and headers that a server meets in the open."""

from __future__ import annotations

PATHS = [
    *(
        "/",
        "/health",
        "/ready",
        "/version",
        "/server_info",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/v1/models/tiny",
    ),
    *("/v1/models/", "/v1/models/a/b/c", "/v1/models/%00", "/v1/models/%ff", "/v1/models/..%2f..", "/v1/../metrics"),
    *("//", "/v1", "/V1/Models", "/v1/models?x=1&x=2", "/v1/models#f", "/%", "/%zz", "/é", "/" + "a" * 3000, "*"),
    *("/favicon.ico", "/v1/embeddings", "/admin/keys", "/\\", "http://fuzz/health", "http://[::1/health", "health"),
]
METHODS = ["GET", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "TRACE", "CONNECT", "POST", "FOO", "get"]
ODD_HEADERS = [
    *("Authorization: Bearer x", "Authorization: x", "Authorization: Basic \xff", "X-Request-Id: " + "a" * 3000),
    *(
        "X-Request-Id: a b",
        "X-Request-Id: é",
        "X-Request-Timeout: 5",
        "X-Request-Timeout: NaN",
        "X-Request-Timeout: -1",
    ),
    *("X-Speculation: off", "X-Speculation: 3", "X-Speculation: 1e9", "X-Speculation: maybe", "Accept: text/plain"),
    *("Origin: http://evil.example", "Accept-Encoding: gzip, br, zstd", "Cookie: a=b; c", "Range: bytes=0-1"),
    *("If-None-Match: *", "Expect: 100-continue", "Content-Type: text/plain", "Content-Language: \xfc"),
]
