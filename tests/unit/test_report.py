"""The start-up report's numbers, against a model of a sliding-window group that frees and allocates step by step."""

import types

import pytest
import torch

from hierasparse_vllm.backend import report
from hierasparse_vllm.backend.report import Report, blocks_in_decode
from hierasparse_vllm.ops import Selection
from hierasparse_vllm.ops.batch import ReadRule
from hierasparse_vllm.options import Options
from hierasparse_vllm.page import PageLayout


def window_blocks(computed, sliding_window, block):
    """Blocks that vLLM holds for a request of a sliding-window group while it decodes the token at ``computed``.

    Before the step it frees the blocks of which no token is among the last ``sliding_window`` ones, counting the new
    one; then it adds a block for the new token if there is none.
    """
    held = {position // block for position in range(computed)}
    skipped = max(0, computed - sliding_window + 1)  # SlidingWindowManager.get_num_skipped_tokens, 0.26 to 0.32
    held -= set(range(skipped // block))
    held.add(computed // block)
    return len(held)


@pytest.mark.parametrize("block", [128, 64, 32])
@pytest.mark.parametrize("sliding_window", [256, 512, 768, 1280])
def test_window_share_is_the_most_that_vllm_holds_up_to_this_length(sliding_window, block):
    most = 0
    for computed in range(2 * sliding_window + 300):
        most = max(most, window_blocks(computed, sliding_window, block))
        tokens = computed + 1
        assert blocks_in_decode(tokens, sliding_window, block) - -(-tokens // 256) == most, tokens


@pytest.mark.parametrize(
    "tokens, pages, window",
    [(1, 1, 1), (128, 1, 1), (129, 1, 2), (256, 1, 2), (257, 2, 3), (512, 2, 4), (513, 3, 5), (8193, 33, 5)],
)
def test_a_request_holds_a_page_per_256_tokens_and_its_window(tokens, pages, window):
    assert blocks_in_decode(tokens, 512, 128) == pages + window


def test_documented_examples():
    assert blocks_in_decode(32_768, 512, 128) == 133
    assert blocks_in_decode(8_192, 512, 128) == 37


# ---- log lines -----------------------------------------------------------------------------------------------------
@pytest.fixture
def lines(monkeypatch):
    """Lines that the report logs, as (level, text)."""
    out = []
    for level in ("info", "warning"):
        monkeypatch.setattr(report.logger, level, lambda text, *args, level=level: out.append((level, text % args)))
    return out


def config(max_model_len=8192, caching=True, interval=256):
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(max_model_len=max_model_len),
        cache_config=types.SimpleNamespace(enable_prefix_caching=caching, prefix_cache_retention_interval=interval),
    )


def log_engine(cfg, blocks=1000, split=False, mean=False, **options):
    """Log the engine lines of 32 layers of 8 KV heads."""
    layout = PageLayout(128, 2, 4, 4, key_mean=mean)
    window = torch.empty(blocks, 0, 128)  # blocks of 128 tokens; contents do not matter
    options = Options(value_sparsity=1.0, **options)
    Report(cfg, options).engine(Selection("reference", "why"), window, layout, 8, 32, ReadRule(256), split)


def test_engine_lines_tell_backend_options_sizes_and_what_fits(lines):
    log_engine(config(max_model_len=4096))
    assert [level for level, _ in lines] == ["info", "info"]
    text = " ".join(line for _, line in lines)
    for part in ("CUSTOM", "reference", "cpu", "spread", "local window 256", "storage compressed", "56.3 % of dense"):
        assert part in text, part
    assert f"{8 * 73_856:,} bytes per page" in text and f"{8 * 131_072:,}" in text
    assert "1,000 blocks" in text and "32 layers" in text
    # 999 blocks without the null block; 16 + 5, 32 + 5 and 128 + 5 blocks a request
    dense = [1000 * 73_856 * 8 // (n * 8 * 512) for n in (4096, 8192, 32768)]
    for n, ours, stock in zip(("4,096", "8,192", "32,768"), (999 // 21, 999 // 37, 999 // 133), dense, strict=True):
        assert f"{n} tokens {ours} / {stock}" in text


@pytest.mark.parametrize(
    "options, told, untold",
    [
        ({}, ("policy spread, K",), ("page mean", "layer by layer")),
        ({"mean": True}, ("policy spread, page mean, K",), ()),
        ({"policy": "strided", "rescale": False}, ("policy strided, K",), ("rescaled",)),
        ({"tables": "/some/file"}, ("policy calibrated, K", "along channel, rescaled"), ("layer by layer",)),
        ({"tables": "/some/file", "split": True}, ("split layer by layer",), ()),
    ],
    ids=str,
)
def test_the_first_line_tells_what_is_done_to_values(lines, options, told, untold):
    log_engine(config(), **options)
    text = lines[0][1]
    assert all(part in text for part in told), text
    assert not any(part in text for part in untold), text


def test_a_model_length_that_is_in_the_report_anyway_is_told_once(lines):
    log_engine(config(max_model_len=8192))
    assert lines[1][1].count("8,192 tokens") == 1


@pytest.mark.parametrize(
    "caching, interval, warned", [(True, 0, True), (True, 256, False), (True, None, False), (False, 0, False)]
)
def test_prefix_caching_that_keeps_only_prompt_ends_is_warned_of(lines, caching, interval, warned):
    log_engine(config(caching=caching, interval=interval))
    warnings = [text for level, text in lines if level == "warning"]
    assert len(warnings) == warned
    assert all("--prefix-cache-retention-interval 256" in text for text in warnings)


def test_compressed_pages_are_summed_and_logged_at_the_interval(lines, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    r = Report(config(), Options(log_interval=10))
    for seconds, pages in ((0, 0), (1, 3), (5, 2), (4.5, 0), (1, 1), (1, 0), (20, 0), (1, 1500)):
        now[0] += seconds
        r.compressed(pages)
    told = [text.split(": ")[1] for _, text in lines]
    assert told == [f"{n} pages compressed since start" for n in ("3", "6", "1,506")]


def test_interval_zero_logs_every_step_that_compresses(lines):
    r = Report(config(), Options(log_interval=0))
    for pages in (1, 0, 0, 2, 0):
        r.compressed(pages)
    assert len(lines) == 2


class Event:
    """A CUDA event that has happened when the test says so."""

    done = False

    def record(self):
        """Nothing."""

    def query(self):
        return Event.done


def test_a_count_on_the_device_is_read_now_and_then_and_never_waited_for(lines, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    count = torch.zeros(1, dtype=torch.int64)
    r = Report(config(), Options(log_interval=10), count)
    count += 3
    r.poll()  # copies
    count += 5
    Event.done = False
    for _ in range(3):
        r.poll()
    assert not lines
    Event.done = True
    r.poll()
    now[0] += 9
    r.poll()
    assert r._copied is None
    now[0] += 2
    r.poll()  # copies again
    r.poll()
    assert r._copied is None, "and has looked"
    now[0] += 1
    r.poll()
    assert [text.split(": ")[1] for _, text in lines] == [f"{n} pages compressed since start" for n in (3, 8)]


def test_without_a_count_there_is_nothing_to_poll(lines):
    Report(config(), Options(log_interval=0)).poll()
    assert not lines


def test_slow_ops_on_a_gpu_are_warned_of_with_their_reason(lines):
    layout = PageLayout(128, 2, 4, 4)
    window = torch.empty(10, 0, 128, device="meta")
    Report(config(), Options()).engine(Selection("reference", "the reason"), window, layout, 8, 32, ReadRule(256))
    assert [text for level, text in lines if level == "warning"] == [
        "HieraSparse: the reference ops run, which are slow on a GPU: the reason"
    ]


@pytest.mark.parametrize("options, warned", [({}, 0), ({"prefill_kernel": "expand"}, 1), ({"decode_kernel": "mma"}, 1)])
def test_on_a_cpu_only_options_without_effect_are_warned_of(lines, options, warned):
    log_engine(config(), **options)
    warnings = [text for level, text in lines if level == "warning"]
    assert warnings == ["HieraSparse: the reference ops run: why"] * warned
