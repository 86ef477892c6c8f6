"""Server processes are started, awaited, measured and ended by their pid."""

from __future__ import annotations

import sys
import time

import pytest

from bench import servers

# A server in one line: 200 for the ready path after a moment, JSON for a POST.
FAKE = """
import http.server, json, sys, time
ready_at = time.monotonic() + 0.2
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(200 if self.path == "/ready" and time.monotonic() >= ready_at else 503, b"{}")
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(200, json.dumps({"usage": {"prompt_tokens": len(body["prompt"].split())}}).encode())
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake(name: str = "fake") -> servers.Server:
    port = servers.free_port()
    return servers.Server(name, servers.MULLAMA, [sys.executable, "-S", "-c", FAKE, str(port)], port, timeout=20)


def test_a_server_is_ready_then_gone() -> None:
    with fake() as server:
        assert server.process is not None
        process = server.process
        assert server.ready_s >= 0.2
        free, count = servers.token_counter(server)
        assert not free
        assert count("three words here") == 3
    assert process.poll() is not None
    assert not servers.is_ready(server.port, "/ready")
    server.stop()  # idempotent


def test_a_server_that_dies_tells_why() -> None:
    words = "import sys; print('no such model', file=sys.stderr); sys.exit(3)"
    server = servers.Server("dead", servers.MULLAMA, [sys.executable, "-S", "-c", words], servers.free_port())
    with pytest.raises(servers.ServerFailed, match=r"(?s)exited with 3.*no such model"):
        server.start()
    assert server.process is None


def test_a_missing_program_is_reported() -> None:
    server = servers.Server("none", servers.MULLAMA, ["/nonexistent/llama-server"], servers.free_port())
    with pytest.raises(servers.ServerFailed, match="cannot start"):
        server.start()


def test_a_server_that_is_never_ready_is_stopped() -> None:
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    server = servers.Server("slow", servers.MULLAMA, command, servers.free_port(), timeout=0.2)
    with pytest.raises(servers.ServerFailed, match="not ready"):
        server.start()
    assert server.process is None


def test_a_pool_with_restart_keeps_one_alive() -> None:
    with servers.Pool([fake("a"), fake("b")], restart=True) as pool:
        a = pool.use("a")
        b = pool.use("b")
        assert a.process is None
        assert b.process is not None
    assert b.process is None


def test_a_pool_notices_whether_the_others_idle() -> None:
    with servers.Pool([fake("a"), fake("b")]) as pool:
        a = pool.use("a")
        pool.use("b")
        assert a.process is not None
        time.sleep(0.3)
        if a.cpu_seconds() is None:
            pytest.skip("this system does not tell a process's CPU time")
        assert pool.idle_cpu() < 0.2
