"""A headless Chromium for tests, and what it had to complain of."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from playwright.async_api import Page, async_playwright

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (Debian's package)")


@dataclass
class Opened:
    """A page, every error on its console, and every request that went to another server or failed."""

    page: Page
    errors: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)


@asynccontextmanager
async def opened(url: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> AsyncIterator[Opened]:
    """The page at `url`, in a window of that size, for people who like it `light` or `dark`."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            context = await browser.new_context(
                viewport={"width": width, "height": height}, color_scheme="dark" if scheme == "dark" else "light"
            )
            found = Opened(await context.new_page())
            found.page.on("console", lambda m: found.errors.append(m.text) if m.type == "error" else None)
            found.page.on("pageerror", lambda error: found.errors.append(str(error)))
            found.page.on("request", lambda r: None if r.url.startswith(url) else found.strange.append(r.url))
            found.page.on("requestfailed", lambda r: found.strange.append(f"failed: {r.url}"))
            await found.page.goto(url)
            yield found
        finally:
            await browser.close()
