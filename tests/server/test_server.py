"""`vllm serve` in a process of its own: three processes, spawn, the OpenAI API, the log."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.server
VLLM = str(Path(sys.executable).parent / "vllm")
ENV = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2",
}  # fmt: skip
ARGS = ["--block-size", "256", "--enforce-eager", "--max-model-len", "4096", "--max-num-batched-tokens", "1024"]


def serve(model: str, log: Path, *args: str, **env: str) -> subprocess.Popen:
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [VLLM, "serve", model, "--served-model-name", "smollm2", "--host", "127.0.0.1", *ARGS, *args]
    with log.open("w") as f:
        return subprocess.Popen(
            command, stdout=f, stderr=subprocess.STDOUT, env=inherited | ENV | env, start_new_session=True
        )


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """URL and log of a server with compressed pages, selected by the alias."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = json.dumps({"hierasparse": {"preset": "max", "log_interval": 0}})
    process = serve(
        model, log, "--attention-backend", "HIERASPARSE", "--dtype", "float32", "--port", str(port),
        "--additional-config", options,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(360):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                get(f"{url}/health")
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield url, log
    finally:
        stop(process)


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server[0]}/v1", api_key="none")


def test_the_log_says_once_what_runs_and_what_fits(server):
    text = server[1].read_text()
    (backend,) = re.findall(r"HieraSparse: backend CUSTOM .*", text)
    assert "ops reference on cpu" in backend and "policy spread, page mean, K" in backend
    assert "window 256" in backend
    assert "K sparsity 1, V sparsity 1" in backend and "% of dense" in backend
    (pool,) = re.findall(r"HieraSparse: .* requests that can decode at once \(ours / dense\): .*", text)
    assert "8,192 tokens" in pool and "32,768 tokens" in pool and "4,096 tokens" in pool
    assert len(re.findall(r"start with --prefix-cache-retention-interval 256", text)) == 1


def test_streaming_chat_over_a_long_document(server, client, tokens, full_model):
    from transformers import AutoTokenizer

    document = AutoTokenizer.from_pretrained(full_model).decode(tokens[:2500])
    before = compressed(server[1])
    stream = client.chat.completions.create(
        model="smollm2", temperature=0, max_tokens=16, stream=True, stream_options={"include_usage": True},
        messages=[{"role": "user", "content": f"{document}\n\nWhat is this about?"}],
    )  # fmt: skip
    pieces, usage = [], None
    for event in stream:
        usage = event.usage or usage
        pieces += [choice.delta.content for choice in event.choices if choice.delta.content]
    assert len(pieces) > 1 and usage.prompt_tokens > 2500
    assert compressed(server[1]) - before == (usage.prompt_tokens + usage.completion_tokens - 1) // 256


def compressed(log: Path) -> int:
    found = re.findall(r"HieraSparse: ([\d,]+) pages compressed since start", log.read_text())
    return int(found[-1].replace(",", "")) if found else 0


def test_two_clients_at_once_get_what_each_gets_alone(client, tokens):
    prompts = [tokens[100:900], tokens[1500:2800]]

    def ask(prompt):
        done = client.completions.create(model="smollm2", prompt=prompt, max_tokens=12, temperature=0)
        return done.choices[0].text

    alone = [ask(p) for p in prompts]
    together = {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: ask(prompts[i])})) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert [together[0], together[1]] == alone


def test_metrics_are_alive(server):
    text = get(f"{server[0]}/metrics")
    assert re.search(r"^vllm:kv_cache_usage_perc\{.*\} ", text, re.M)
    assert re.search(r'^vllm:cache_config_info\{.*num_gpu_blocks="\d+".*\} 1', text, re.M)
    assert re.search(r"^vllm:prompt_tokens_total\{.*\} [1-9]", text, re.M)


def test_a_request_longer_than_the_model_is_refused_by_vllm_and_the_server_lives_on(client):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="4096"):
        client.completions.create(model="smollm2", prompt=[5] * 5000, max_tokens=4)
    assert client.completions.create(model="smollm2", prompt=[5] * 300, max_tokens=4).choices[0].text


def test_a_bad_option_stops_the_server_with_one_sentence(model, tmp_path):
    log = tmp_path / "log"
    process = serve(
        model, log, "--attention-backend", "CUSTOM", "--additional-config", '{"hierasparse": {"key_sparsity": 2}}'
    )
    try:
        assert process.wait(200) != 0
    finally:
        stop(process)
    assert "HieraSparse: option 'key_sparsity' is 2; allowed are 0, 0.25, 0.5, 0.75, 1" in log.read_text()
