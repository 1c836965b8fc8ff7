"""Real HTTP servers on loopback, for a test each."""

import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer


@contextmanager
def on_loopback(handler, state):
    """Serves until the end of the test; gives the state, whose `url` is then the server's API.

    Args:
        handler: a class of request handlers, which finds the state as its `server_state`.
    """
    made = type(handler.__name__, (handler,), {"server_state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
