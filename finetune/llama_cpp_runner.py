"""llama.cpp's own server out of the package xllamacpp: `python llama_cpp_runner.py MODEL.gguf --port P --alias NAME`.

Run by its path, by whichever Python has that package; it needs nothing else. On the loopback address only, without a
web page, without a look at what others ask (slots), and closed to pages of other origins.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys


def main(words: list[str]) -> int:
    """Serves until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--lora", default="")
    parser.add_argument("--ctx-size", type=int, default=0)
    given = parser.parse_args(words)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.model_alias = {given.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = given.port
    params.n_ctx = given.ctx_size
    params.offline = True
    params.ui = False
    params.endpoint_slots = False
    params.cors_origins = f"http://127.0.0.1:{given.port}"
    params.cors_credentials = False
    if threads := os.environ.get("OMP_NUM_THREADS", ""):  # waiting threads spin, which is slow where cores are shared
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    if key := os.environ.pop("FINETUNE_API_KEY", ""):
        params.api_keys = [key]
    if given.lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(given.lora, 1.0)]
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
