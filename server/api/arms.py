"""Which arm answers a request: the one that a tester names, the one that `model` names, or the one of its key."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aiohttp import web

from server.api.access.request_id import REQUEST_ID
from server.api.arm import Arm
from server.api.errors import bad_header, model_not_found

ARM_HEADER = "X-Outpace-Arm"
"""On requests: answer from this arm. On answers, where there are several: the arm that answered."""
ARM: web.RequestKey[Arm] = web.RequestKey("arm", Arm)

Assign = Callable[[str], str]
"""The arm's name of a key. Pure: every API process says the same."""


class Arms:
    """The models that are served, the control first. `assign` None: all is the control's."""

    def __init__(self, every: Sequence[Arm], assign: Assign | None = None) -> None:
        self.every = every
        self.assign = assign
        self._by_name = {arm.name: arm for arm in every}

    @property
    def control(self) -> Arm:
        """What answers where nothing else is said, and for arms that are not ready."""
        return self.every[0]

    def named(self, name: str) -> Arm | None:
        """The arm of that name, None if there is none."""
        return self._by_name.get(name)

    def of(self, request: web.Request, model: str | None, user: str | None, caller: str) -> Arm:
        """The arm for `request`, and notes it there.

        The key that assigns is `user`, else the API key's name, else the request. An arm that is named answers or is
        not ready; an assigned one that is not ready leaves its share to the control. Raises ApiError: 400 for an
        unknown arm in the header, 404 for an unknown model.
        """
        arm = request[ARM] = self._named(request, model) or self._assigned(user or caller or request[REQUEST_ID])
        return arm

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

    def _assigned(self, key: str) -> Arm:
        if self.assign is None:
            return self.control
        arm = self._by_name.get(self.assign(key), self.control)
        return arm if arm.not_ready is None else self.control


async def add_arm(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: which arm answered, where there are several."""
    arm = request.get(ARM)
    if arm is not None and len(request.app[ARMS].every) > 1:
        response.headers[ARM_HEADER.lower()] = arm.name


ARMS: web.AppKey[Arms] = web.AppKey("arms", Arms)
