"""Which arm answers a request: the one that a tester names, the one that `model` names, or the one of its key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from aiohttp import web

from server.api.access.access_log import record_of
from server.api.access.request_id import REQUEST_ID
from server.api.arm import Arm
from server.api.errors import bad_header, model_not_found
from server.config import ASSIGNMENT_KEYS, CONTROL, ServerConfig
from server.routing.assignment import Assignment

ARM_HEADER = "X-Outpace-Arm"
"""On requests: answer from this arm. On answers, where there are several: the arm that answered."""
ARM: web.RequestKey[Arm] = web.RequestKey("arm", Arm)

KEY: web.RequestKey[str] = web.RequestKey("routing_key", str)
"""The key that gave the request to its arm; absent where the arm was named, or stood in for another."""

Assign = Callable[[str], str]
"""The arm's name of a key. Pure: every API process says the same."""


class Arms:
    """The models that are served, the control first. `assign` says whose keys they get (None: all are the control's),
    `key` what a request's key is (`RoutingConfig.key`)."""

    def __init__(
        self, every: Sequence[Arm], assign: Assign | None = None, key: Sequence[str] = ASSIGNMENT_KEYS
    ) -> None:
        self.every = list(every)
        self.assign = assign
        self._key = key
        self._by_name = {arm.name: arm for arm in every}

    @classmethod
    def of_config(cls, config: ServerConfig, every: Sequence[Arm]) -> Arms:
        """With the weights that the settings say."""
        weights = {arm.name: arm.weight for arm in config.all_arms}
        assign = Assignment(weights, config.routing.salt) if len(every) > 1 else None
        return cls(every, assign, config.routing.key)

    @property
    def control(self) -> Arm:
        """What answers where nothing else is said, and for arms that are not ready."""
        return self.every[0]

    @property
    def weights(self) -> Mapping[str, float]:
        """Percent of the traffic by arm, as they are now."""
        return self.assign.weights if isinstance(self.assign, Assignment) else {CONTROL: 100.0}

    def named(self, name: str) -> Arm | None:
        """The arm of that name, None if there is none."""
        return self._by_name.get(name)

    def remove(self, names: Iterable[str]) -> None:
        """Those arms are gone, and with them the split of keys."""
        for name in names:
            del self._by_name[name]
        self.every = [arm for arm in self.every if arm.name in self._by_name]
        self.assign = None

    def of(self, request: web.Request, model: str | None, user: str | None, caller: str) -> Arm:
        """The arm for `request`, and notes it there.

        `caller` is the API key's name. An arm that is named answers or is not ready; an assigned one that is not ready
        leaves its share to the control. Raises ApiError: 400 for an unknown arm in the header, 404 for an unknown
        model.
        """
        arm = self._named(request, model)
        if arm is None:
            arm = self.control if self.assign is None else self._assigned(request, self._key_of(request, user, caller))
        request[ARM] = arm
        record_of(request).arm = arm.name
        return arm

    def _key_of(self, request: web.Request, user: str | None, caller: str) -> str:
        """The first that the request has; which one it is is part of it: a user is not the API key of the same name."""
        for part in self._key:
            value: str | None
            if part == "user":
                value = user
            elif part == "api_key":
                value = caller
            elif part == "request":
                value = request[REQUEST_ID]
            else:
                value = request.headers.get(part.removeprefix("header:"))
            if value:
                return f"{part}={value}"
        return f"request={request[REQUEST_ID]}"

    def _named(self, request: web.Request, model: str | None) -> Arm | None:
        name = request.headers.get(ARM_HEADER)
        if name is not None:
            if name not in self._by_name:
                valid = f"one of {', '.join(self._by_name)}"
                raise bad_header(ARM_HEADER, name, valid)
            return self._by_name[name]
        if model is None or model in (self.control.model_name, self.control.config.model):
            return None
        if model not in self._by_name:
            raise model_not_found(model)
        return self._by_name[model]

    def _assigned(self, request: web.Request, key: str) -> Arm:
        assert self.assign is not None
        arm = self._by_name.get(self.assign(key), self.control)
        if arm.not_ready is not None:
            return self.control
        request[KEY] = key
        return arm


async def add_arm(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: which arm answered, where there are several."""
    arm = request.get(ARM)
    if arm is not None and len(request.app[ARMS].every) > 1:
        response.headers[ARM_HEADER.lower()] = arm.name


ARMS: web.AppKey[Arms] = web.AppKey("arms", Arms)
