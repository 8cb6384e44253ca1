"""Who is asking: API keys from the Authorization header, and what each may do."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from server.api.access.access_log import record_of
from server.api.access.control import ACCESS
from server.api.access.keys import ApiKey
from server.api.access.route import route_of
from server.api.errors import ApiError, Handler

OPEN_ROUTES = frozenset({"/", "/page/{file}", "/health", "/ready", "/version", "/openapi.json", "/metrics"})
ADMIN_PREFIX = "/admin/"
ADMIN_ROUTES = frozenset({"/v1/shadow"})
"""Others that need the admin key where there are keys, since they tell of everybody's requests."""
_ADMIN_ONLY = f"{ADMIN_PREFIX}* and {', '.join(sorted(ADMIN_ROUTES))}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `name` is empty where nobody needs a key, and on open routes; `key` is None there and for the admin.

    Limits go by `key`; `tenant` is what the engine shares its time between.
    """

    name: str = ""
    key: ApiKey | None = None
    admin: bool = False

    @property
    def tenant(self) -> str:
        return self.name

    @property
    def default_priority(self) -> int:
        return 0 if self.key is None else self.key.default_priority

    @property
    def speculation(self) -> bool:
        """Whether this caller's requests speculate unless they say."""
        return True if self.key is None else self.key.speculation


CALLER: web.RequestKey[Caller] = web.RequestKey("caller", Caller)
ANONYMOUS = Caller()


def caller_of(request: web.Request) -> Caller:
    """Who asks; nobody in particular where no middleware looked."""
    caller: Caller = request.get(CALLER, ANONYMOUS)
    return caller


def authenticate(request: web.Request) -> Caller:
    """The caller of this request. Raises ApiError 401 for no key or a wrong one, 403 for one of the wrong kind."""
    route = route_of(request)
    acts = route.startswith(ADMIN_PREFIX)
    is_admin_route = acts or route in ADMIN_ROUTES
    table = request.app[ACCESS].table
    if table is None:
        if acts:
            raise _forbidden(
                "Admin routes need an admin key: start the server with --api-keys FILE and put [admin] in it."
            )
        return ANONYMOUS
    if route in OPEN_ROUTES:
        return ANONYMOUS
    presented = presented_key(request)
    if presented is None:
        raise _unauthorized(
            "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
            "auth (i.e. Authorization: Bearer YOUR_KEY)."
        )
    key = table.find(presented)
    if key is None:
        raise _unauthorized(f"Incorrect API key provided: {_masked(presented)}. Ask this server's operator for one.")
    if key.admin and not is_admin_route:
        raise _forbidden(f"The admin key is for {_ADMIN_ONLY} only; use a user key here.")
    if is_admin_route and not key.admin:
        raise _forbidden(f"The key {key.name!r} is a user key; {_ADMIN_ONLY} need the admin key.")
    return Caller(key.name, None if key.admin else key, key.admin)


def check_priority(caller: Caller, priority: int | None) -> int:
    """The priority that the request runs at. Raises ApiError 403 where it asks for a better one than its key may."""
    if priority is None:
        return caller.default_priority
    if caller.key is not None and priority < caller.key.best_priority:
        best = caller.key.best_priority
        raise _forbidden(
            f"The key {caller.name!r} may not use priority {priority}; use {best} or a higher number.",
            param="priority",
        )
    return priority


@web.middleware
async def auth_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Sets `request[CALLER]` and counts a POST against the key's requests, before a byte of the body is read."""
    caller = authenticate(request)
    request[CALLER] = caller
    record = record_of(request)
    record.key = caller.name or None
    if request.method == "POST":
        request.app[ACCESS].limiter.admit(caller.key)
    return await handler(request)


async def add_rate_limit_headers(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: x-ratelimit headers on answers to keys with limits, errors and streams too."""
    key = caller_of(request).key
    if key is not None:
        response.headers.update(request.app[ACCESS].limiter.headers(key))


def presented_key(request: web.Request) -> str | None:
    """The key that the request carries: `Authorization: Bearer KEY`, or `api-key: KEY` as Azure's SDK sends it."""
    authorization = request.headers.get("Authorization")
    if authorization is None:
        return request.headers.get("api-key", "").strip() or None
    scheme, _, key = authorization.partition(" ")
    return (key.strip() or None) if scheme.lower() == "bearer" else None


def _masked(presented: str) -> str:
    """The last four characters, where that is but a small part of a key."""
    shown = presented[-4:] if len(presented) >= 20 else ""
    return "****" + shown.encode("ascii", "replace").decode()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _forbidden(message: str, param: str | None = None) -> ApiError:
    return ApiError(403, message, param=param, code="insufficient_permissions")
