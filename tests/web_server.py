"""A web server for inputs."""

import http.server
import threading
from contextlib import contextmanager


@contextmanager
def served(files, told=lambda content: {}):
    """A web server that sends parts, but fails behind the last byte of `broken`, if there is one.

    `files` are contents by path, and `told` the headers beside the contents.
    """
    broken = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET(head=True)

        def do_GET(self, head=False):
            content = files[self.path]
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            end = min(int(last or len(content)), len(content) - 1)
            if broken and not head and int(first) >= broken[-1] and end < len(content) - 30:
                self.send_error(503)
                return
            self.send_response(206)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(end + 1 - int(first)))
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(content)}")
            for header in told(content).items():
                self.send_header(*header)
            self.end_headers()
            if not head:
                self.wfile.write(content[int(first) : end + 1])

    with serving(Handler) as url:
        yield url, broken


@contextmanager
def serving(handler):
    """A web server of requests that `handler` answers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
