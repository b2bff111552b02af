"""A backend whose library is not installed. It must disturb nobody who did not ask for it."""

from __future__ import annotations

import library_that_is_not_installed  # type: ignore[import-not-found]  # noqa: F401
