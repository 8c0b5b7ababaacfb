"""Run the application of a server: in a thread of this process, or in one of its own that is replaced if it dies."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import fastapi
import uvicorn
from uvicorn.supervisors import Multiprocess

POLL = 0.01  # seconds between checks whether the server has started


@contextlib.contextmanager
def serve_in_thread(app: fastapi.FastAPI) -> Iterator[str]:
    """Serve on a free local port in a thread, and yield the address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start; the log says why")
                time.sleep(POLL)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            app.state.engine.close()


class Supervisor(Multiprocess):
    """A supervisor that replaces the serving process if it dies.

    It closes its copy of the process's end of the pipe between them.  So a health check fails as soon as the process
    dies, and does not wait as long as loading may take.
    """

    def init_processes(self) -> None:
        super().init_processes()
        self._close_child_pipes()

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        self._close_child_pipes()

    def _close_child_pipes(self) -> None:
        for process in self.processes:
            process.child_conn.close()
