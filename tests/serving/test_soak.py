"""tools/serve.py among clients that come, leave and die: no row is lost, no memory, and it ends clean."""

import collections
import json
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from llada_jax.checkpoint.weights import save_params
from tests.helpers.environment import process_environment
from tests.helpers.paths import ROOT
from tests.helpers.waiting import wait_until
from tests.serving.running import small_model

CLIENTS, MINUTES, WARM_UP, GROWTH = 24, 20, 0.25, 1.03  # warm-up: its share of the time


def resident(pid: int) -> float:
    """MB of the resident set, the median of a few seconds."""
    found = []
    for _ in range(10):
        (kilobytes,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        found.append(int(kilobytes) / 1000)
        time.sleep(0.5)
    return statistics.median(found)


class Client:
    """Asks until it is told to stop. What became of its requests is in `seen`."""

    def __init__(self, number: int, port: int, stop: threading.Event, seen: collections.Counter):
        self._rng, self._port, self._stop, self._seen = random.Random(number), port, stop, seen
        self._system = [f"A system prompt, number {i}: " + "say what is so, " * i for i in range(5)]

    def run(self) -> None:
        while not self._stop.is_set():
            how = self._rng.choice([self._whole, self._stream, self._stream, self._leaves, self._dies, self._wrong])
            try:
                self._seen[f"{how.__name__[1:]}: {how(self._fields())}"] += 1
            except httpx.HTTPError as error:
                self._seen[f"{how.__name__[1:]}: {type(error).__name__}"] += 1

    def _fields(self) -> dict:
        rng = self._rng
        return {
            "model": "small", "prompt": rng.choice(self._system) + "x" * rng.randint(1, 20), "n": rng.choice([1, 1, 3]),
            "max_tokens": rng.randint(1, 100), "temperature": rng.choice([0, 0.7]), "seed": rng.randrange(2**32),
            "stop": rng.choice([[], ["s"], ["ab", "}}"]]), "block_length": rng.choice([4, 4, 4, 8]),
        }  # fmt: skip

    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1/completions"

    def _whole(self, fields: dict) -> int:
        return httpx.post(self._url(), json=fields, timeout=120).status_code

    def _stream(self, fields: dict) -> str:
        fields |= {"stream": True, "provisional": self._rng.random() < 0.3}
        with httpx.stream("POST", self._url(), json=fields, timeout=120) as response:
            lines = [line for line in response.iter_lines() if line]
        return "200" if lines[-1] == "data: [DONE]" else str(response.status_code)

    def _leaves(self, fields: dict) -> str:
        with httpx.stream("POST", self._url(), json=fields | {"stream": True}, timeout=120) as response:
            for _ in zip(range(self._rng.randint(1, 5)), response.iter_lines(), strict=False):
                pass
        return "left"

    def _dies(self, fields: dict) -> str:
        """As the kernel ends the connections of a process that was killed with data unread: by a reset."""
        body = json.dumps(fields | {"stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection(("127.0.0.1", self._port), 120) as connection:
            connection.sendall(
                f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: self._rng.choice([None, len(body) // 2])]
            )
            time.sleep(self._rng.random() * 0.3)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return "died"

    def _wrong(self, fields: dict) -> int:
        return httpx.post(self._url(), json=fields | {"max_tokens": -1}, timeout=120).status_code


@pytest.mark.soak
@pytest.mark.timeout(60 * MINUTES + 600)
def test_it_outlives_its_clients(tmp_path):
    model = small_model()
    save_params(tmp_path / "small", model.params, model.config, model.tokenizer)
    flags = "--port=0", "--max_rows=4", "--queue=12", "--canvas=256", "--block_length=4", "--steps=4", "--threshold=2.0"
    command = [sys.executable, ROOT / "tools" / "serve.py", f"--checkpoint={tmp_path / 'small'}", *flags]
    command += ["--prefix_mb=1", "--prefill_chunk=16"]
    out, seen, stop = tmp_path / "out", collections.Counter(), threading.Event()
    with out.open("w") as stdout, (tmp_path / "err").open("w") as stderr:
        process = subprocess.Popen(command, env=process_environment(), stdout=stdout, stderr=stderr)
    try:
        wait_until(lambda: "serves" in out.read_text() or process.poll() is not None, 180)
        port = int(re.match(r"http://127.0.0.1:(\d+) ", out.read_text())[1])
        threads = [threading.Thread(target=Client(i, port, stop, seen).run) for i in range(CLIENTS)]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        megabytes = []
        while time.monotonic() < begin + 60 * MINUTES:
            if time.monotonic() >= begin + 60 * MINUTES * WARM_UP:
                megabytes.append(resident(process.pid))
                seconds, asked = time.monotonic() - begin, sum(seen.values())
                print(f"{seconds:.0f} s: {megabytes[-1]:.0f} MB, {asked} requests", flush=True)
            time.sleep(min(20, 3 * MINUTES))
        stop.set()
        for thread in threads:
            thread.join()
        wait_until(lambda: (at := counts(port))["busy"] == at["queued"] == 0)
        at = counts(port)
        print(dict(seen), at)
        assert at["submitted"] == at["finished"] + at["cancelled"] and at["cancelled"] and at["rejected"]
        assert not at["failed"] and not at["resets"] and not at["expired"] and at["prefix_hits"]
        for number in range(4):  # all rows serve still
            assert Client(number, port, stop, seen)._whole({"model": "small", "prompt": "abc", "n": 4}) == 200
        assert max(megabytes[len(megabytes) // 2 :]) < GROWTH * megabytes[0], megabytes
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and (tmp_path / "err").read_text() == ""
    finally:
        stop.set()
        process.kill()


def counts(port: int) -> dict[str, float]:
    """The engine's, from /metrics."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    return {name: float(value) for name, value in re.findall(r"^llada_jax_(\w+?)(?:_total)? (\S+)$", text, re.M)}
