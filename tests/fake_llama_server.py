"""What stands in for llama.cpp's program in the default tier: answers /v1/models, and notes how it was started.

FAKE_SERVER says how it behaves: dies, sleeps (it is never ready), leaves (a child process that does not want to end).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


def main(words: list[str]) -> None:
    if "--version" in words:
        print("version: 4711 (abcdef)")
        return
    given = {name: words[words.index(name) + 1] for name in ("--model", "--alias", "--host", "--port")}
    how = os.environ.get("FAKE_SERVER", "")
    if how == "dies":
        print("loading\nerror: cannot read the tensors\nbye")
        sys.exit(7)
    if how == "sleeps":
        print("still loading", flush=True)
        time.sleep(600)
    child = ""
    if how == "leaves":
        stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
        process = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()  # it ignores the signal from now on
        child = str(process.pid)
    seen = {"words": words, "environment": dict(os.environ), "pid": os.getpid(), "child": child}
    Path(given["--model"]).with_suffix(".seen").write_text(json.dumps(seen))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = {"data": [{"id": given["--alias"], "owned_by": "llamacpp"}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(listed).encode())

        def log_message(self, *_: object) -> None:
            """Nothing."""

    HTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
