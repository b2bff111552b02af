"""A client of the application, in the same process and event loop."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from core.server.app import create_app
from core.server.config import ServerConfig
from core.server.service import Service
from tests.models.conftest import tiny_folder
from tests.server.fake import FakeEngine

__all__ = ["tiny_folder"]

Connect = Callable[..., httpx.AsyncClient]


@pytest.fixture
def connect() -> Connect:
    def make(engine: FakeEngine | None = None, **options: object) -> httpx.AsyncClient:
        config = ServerConfig(**options)  # type: ignore[arg-type]
        app = create_app(Service(engine or FakeEngine(), config, "fake"), config)  # type: ignore[arg-type]
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://core")

    return make
