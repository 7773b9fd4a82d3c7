"""tools/serve.py as a user runs it."""

import contextlib
import json
import re
import signal
import socket
import threading

import httpx
import pytest

from llada_jax.checkpoint.weights import save_params
from tests.helpers import command_lines
from tests.helpers.environment import process_environment
from tests.helpers.paths import ROOT
from tests.helpers.waiting import PATIENCE, wait_until
from tests.serving.running import alone, small_model

TOOL = ROOT / "tools" / "serve.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, folder = small_model(), tmp_path_factory.mktemp("serve") / "small"
    save_params(folder, model.params, model.config, model.tokenizer)
    return folder


@contextlib.contextmanager
def started(folder, *arguments):
    """(process, url) of a server that is ready."""
    out, err = folder / "out", folder / "err"
    process = command_lines.Process([TOOL, *arguments], process_environment(), out, err)
    try:
        wait_until(lambda: out.read_text().endswith("\n") or process.poll() is not None)
        found = re.fullmatch(r"(http://\S+) serves (\S+): (\d+) at once, (\d+) tokens each\n", out.read_text())
        assert found, err.read_text()
        yield process, found[1], found.groups()[1:]
    finally:
        process.kill()


def test_it_serves_until_a_signal_and_finishes_what_runs(checkpoint, tmp_path):
    flags = "--port=0", "--max_rows=2", "--canvas=256", "--block_length=4", "--steps=4", "--threshold=2.0"
    (tmp_path / "keys").write_text("sesame\n")
    for number, more in (
        (signal.SIGTERM, ("--prefix_mb=1", "--prefill_chunk=8")),
        (signal.SIGINT, (f"--api_key_file={tmp_path / 'keys'}", "--model_name=a,b")),
    ):
        with started(tmp_path, f"--checkpoint={checkpoint}", *flags, *more) as (process, url, served):
            name = "a" if "--model_name=a,b" in more else "small"
            assert served == (name, "2", "256")
            if "--prefix_mb=1" in more:
                assert chunks_known(url) == 1  # the last chunk is always computed
            lines, read = [], threading.Event()

            def ask(url=url, name=name, lines=lines, read=read):
                fields = {"model": name, "prompt": "abc", "max_tokens": 250, "stream": True}
                with httpx.stream("POST", f"{url}/v1/completions", json=fields, headers=KEY, timeout=60) as response:
                    for line in response.iter_lines():
                        lines.append(line)
                        read.set()

            client = threading.Thread(target=ask)
            client.start()
            assert read.wait(PATIENCE)
            process.send_signal(number)
            client.join()
            assert process.wait(60) == 0 and (tmp_path / "err").read_text() == ""
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            assert lines[-2] == "data: [DONE]" and text == alone(small_model(), list(b"abc"), gen_length=250).text
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
        (tmp_path / "out").unlink()


def chunks_known(url: str) -> int:
    """Of a prompt of 18 tokens that is asked with twice."""
    for _ in range(2):
        fields = {"model": "small", "prompt": "def f(x): return x", "max_tokens": 4}
        httpx.post(f"{url}/v1/completions", json=fields, timeout=60).raise_for_status()
    (hits,) = re.findall(r"prefix_hits\w* (\d+)", httpx.get(f"{url}/metrics").text.replace("# ", "#"))
    return int(hits)


KEY = {"Authorization": "Bearer sesame"}


def test_what_is_wrong_ends_in_one_line(checkpoint, tmp_path):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    cases = [
        ((), "--checkpoint=DIR is required"),
        ((f"--checkpoint={tmp_path}/none",), "none"),
        ((f"--checkpoint={checkpoint}", f"--port={port}"), f"--port={port}: Address already in use"),
        ((f"--checkpoint={checkpoint}", "--host=0.0.0.0"), "--host=0.0.0.0 is open to other machines: give"),
        ((f"--checkpoint={checkpoint}", "--host=example.org"), "--host=example.org is open to other machines"),
        ((f"--checkpoint={checkpoint}", f"--api_key_file={tmp_path}/none"), "none: No such file"),
        ((f"--checkpoint={checkpoint}", "--canvas=100000", "--port=0"), "--canvas=100000: the model was made for"),
        ((f"--checkpoint={checkpoint}", "--rule=none", "--port=0"), "rule='none', expected one of"),
        ((f"--checkpoint={checkpoint}", "--rule=llada2.2", "--port=0"), "give delete_id"),
        ((f"--checkpoint={checkpoint}", "--port=70000"), "port"),
    ]
    found = command_lines.run_all([[TOOL, *arguments] for arguments, _ in cases])
    for (_, why), done in zip(cases, found, strict=True):
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert why in done.stderr and not done.stdout
    taken.close()


def test_what_is_not_installed_is_told_in_one_line(checkpoint):
    code = "import runpy, sys; sys.modules['starlette'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = command_lines.run(["-c", code, TOOL, f"--checkpoint={checkpoint}", "--port=0"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: starlette is not installed; pip install 'llada_jax[serve]'\n"
