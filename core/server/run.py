"""Starting and ending the server.

The port is taken before anything is loaded, so a second server fails at once. After SIGTERM no connection is
taken any more, running requests end within `drain_timeout_s`, then the engine is closed.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from core.contract.errors import ConfigError
from core.engine.async_llm import AsyncLLM
from core.engine.config import EngineConfig
from core.server.app import create_app
from core.server.config import ServerConfig
from core.server.service import Service

Tell = Callable[[str], None]


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address is not this machine's, or the port is in use or not allowed.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((config.host, config.port))
        found.listen(2048)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}); choose another --port or "
            "--host, or end the program that has it"
        ) from error
    found.setblocking(False)
    return found


def serve(
    engine_config: EngineConfig, config: ServerConfig, listener: socket.socket, *, tell: Tell = print
) -> None:
    """Serve on a socket from `bind` until SIGINT or SIGTERM.

    Raises:
        CoreError: the engine cannot start, or failed.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the server needs fastapi and uvicorn ({error}); pip install 'core[server]'"
        ) from error
    asyncio.run(_serve(engine_config, config, listener, tell))


def _server_class() -> type[Any]:
    """uvicorn's server without its signal handlers, which end the process before the engine is closed."""
    import uvicorn

    class Server(uvicorn.Server):
        _drained: asyncio.Task[bool] | None = None

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        def leave(self, engine: AsyncLLM, timeout_s: float) -> None:
            """First call: take no request and let running ones finish; second: cut them off."""
            if self._drained is None:
                self._drained = asyncio.ensure_future(engine.drain(timeout_s))
            else:
                self._drained.cancel()
                self.force_exit = True
            self.should_exit = True

        def ending(self) -> str:
            """What became of the requests that ran."""
            drained = self._drained
            if drained is not None and drained.done() and not drained.cancelled() and drained.result():
                return "every request had its answer"
            return "requests that still ran were cut off"

    return Server


async def _serve(
    engine_config: EngineConfig, config: ServerConfig, listener: socket.socket, tell: Tell
) -> None:
    import uvicorn

    async with await AsyncLLM.start(engine_config, progress=tell) as engine:
        name = config.served_model_name or engine_config.model.name
        app = create_app(Service(engine, config, name), config)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=max(1, round(config.drain_timeout_s)),
            timeout_keep_alive=30,
        )
        host, port = listener.getsockname()[:2]
        server = _server_class()(settings)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.leave, engine, config.drain_timeout_s)
        tell(f"serving {name} on http://{host}:{port}/v1")
        await server.serve(sockets=[listener])
        tell(f"ended: {server.ending()}")
