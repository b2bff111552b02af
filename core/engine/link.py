"""Link: the sockets between an AsyncLLM and its engine's process, on the AsyncLLM's side."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.contract.errors import ConfigError
from core.engine.process import COMMANDS, EVENTS
from core.executor.wire import decode, encode

_MAX_PATH = 90
"""Addresses of sockets in the file system have about a hundred bytes."""


class Link:
    """Two sockets in a new folder that only this user may enter.

    Args:
        take: called in the running event loop with each message that arrives.

    Raises:
        ConfigError: pyzmq is not installed.
    """

    def __init__(self, take: Callable[[Any], None]) -> None:
        try:
            import zmq
            import zmq.asyncio
        except ImportError as error:
            raise ConfigError(
                f"an engine in a process of its own needs pyzmq ({error}); install the extra: "
                "pip install 'core[server]'"
            ) from error
        self._again, self._no_wait = zmq.Again, zmq.NOBLOCK
        self.folder = _private_folder()
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        # Without a limit here, because what is sent is limited by the requests that may be live.
        self._commands.setsockopt(zmq.SNDHWM, 0)
        self._commands.setsockopt(zmq.LINGER, 0)
        self._commands.bind(f"ipc://{self.folder / COMMANDS}")
        self._events = zmq.asyncio.Context(self._context).socket(zmq.PULL)
        self._events.bind(f"ipc://{self.folder / EVENTS}")
        self._take = take
        self._reader = asyncio.get_running_loop().create_task(self._read())

    def send(self, message: object) -> None:
        """Send without waiting; dropped where nobody is connected.

        Raises:
            TypeError: the message has a value that cannot cross.
        """
        packed = encode(message)
        try:
            self._commands.send(packed, self._no_wait)
        except self._again:
            return

    async def _read(self) -> None:
        while True:
            packed = await self._events.recv()
            try:
                message = decode(packed)
            except Exception as error:
                sys.stderr.write(f"core: a message that the engine did not send was dropped ({error})\n")
                continue
            try:
                self._take(message)
            except Exception as error:
                # What one message causes must not make those after it unheard.
                context = {"message": "a message of the engine could not be taken", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)

    def close(self) -> None:
        """Close the sockets and remove the folder. Idempotent."""
        self._reader.cancel()
        self._events.close(linger=0)
        self._context.destroy(linger=0)
        shutil.rmtree(self.folder, ignore_errors=True)


def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="core-"))  # made with mode 0700
    if len(str(folder)) > _MAX_PATH:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="core-", dir="/tmp"))
    return folder
