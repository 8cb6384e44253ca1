"""The page on `/`: plain files, no build step. What they are is in `static/`; `server.api.page` serves them."""
