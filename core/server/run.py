"""Starting and ending the server.

The port is taken before anything is loaded, so a second server fails at once. After SIGTERM no connection and
no request is taken any more, running requests end within `drain_timeout_s` or are cut off with an error, then
the engine is closed.
"""

from __future__ import annotations

import asyncio
import math
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

_LAST_WRITES_S = 5
"""Time to send what the engine had generated when the last request ended."""


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

    Where the engine stops of itself, that is told at once, and requests are answered with it until then.

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
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        def leave(self) -> None:
            """First call: take no connection and wait for those there are; second: wait no longer."""
            self.force_exit = self.should_exit
            self.should_exit = True

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
            timeout_graceful_shutdown=math.ceil(config.drain_timeout_s) + _LAST_WRITES_S,
            timeout_keep_alive=30,
        )
        host, port = listener.getsockname()[:2]
        server = _server_class()(settings)
        loop = asyncio.get_running_loop()
        drains: list[asyncio.Task[bool]] = []

        def leave() -> None:
            server.leave()
            if not drains:
                drains.append(loop.create_task(_drained(engine, server, config.drain_timeout_s)))

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, leave)
        watch = loop.create_task(_tell_failure(engine, tell))
        tell(f"serving {name} on http://{host}:{port}/v1")
        await server.serve(sockets=[listener])
        watch.cancel()
        if engine.failure is not None:
            raise engine.failure
        tell(f"ended: {_how(drains)}")


async def _tell_failure(engine: AsyncLLM, tell: Tell) -> None:
    tell(f"error: {await engine.failed()}")


async def _drained(engine: AsyncLLM, server: Any, timeout_s: float) -> bool:
    """Whether all requests ended in this time; the server waits for no other."""
    is_done = await engine.drain(timeout_s)
    if not is_done:
        server.force_exit = True
    return is_done


def _how(drains: list[asyncio.Task[bool]]) -> str:
    """What became of the requests that ran when the server was told to end."""
    if all(drain.done() and drain.result() for drain in drains):
        return "what ran was finished"
    for drain in drains:
        drain.cancel()
    return "what still ran was cut off"
