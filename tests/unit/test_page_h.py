"""csrc/page.h, compiled for the host, says the same as page.py: every offset, index word and value order."""

import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hierasparse_vllm import page
from hierasparse_vllm.page import SUBS, PageLayout

SOURCE = Path(__file__).with_name("page_h.cpp")


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Lines of the program, as numbers by what stands before the colon."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: csrc/page.h was NOT compared with page.py")
    program = tmp_path_factory.mktemp("page_h") / "page_h"
    subprocess.run([compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCE], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name.strip(): [int(n) for n in rest.split()] for name, rest in (line.split(":") for line in lines)}


def test_constants(facts):
    assert facts["constants"] == [
        page.LAYOUT_VERSION, page.PAGE_TOKENS, page.SUB_TOKENS, page.ALIGN, page.INDEX_BYTES, page.META_BYTES,
        page.SINK_BIT,
    ]  # fmt: skip


def test_every_layout(facts):
    cases = list(itertools.product((64, 128, 256), (1, 2, 4), range(SUBS + 1), range(SUBS + 1), (0, 1, 64), (0, 1)))
    for d, size, k, v, sinks, mean in cases:
        layout = PageLayout(d, size, k, v, sink_tokens=sinks, key_mean=bool(mean))
        want = [
            layout.head_bytes, layout.mean_offset, layout.sink_offset, layout.sink_offset + layout.sink_bytes,
            layout.k_offset, layout.v_offset,
        ]  # fmt: skip
        for mask in range(1 << SUBS):
            if mask.bit_count() == k:
                word = layout.encode_index(mask, (1 << v) - 1, first=True)
                want += [word, layout.decode_index(word)[0], layout.has_sinks(word)]
                want += [layout.sub_offset("k", mask, s) for s in range(SUBS)]
            if mask.bit_count() == v:
                word = layout.encode_index((1 << k) - 1, mask, first=False)
                want += [word, layout.decode_index(word)[1], layout.has_sinks(word)]
                want += [layout.sub_offset("v", mask, s) for s in range(SUBS)]
        assert facts[f"layout {d} {size} {k} {v} {sinks} {mean}"] == want
    assert sum(name.startswith("layout") for name in facts) == len(cases)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("kind", ["k", "v_token", "v_channel"])
def test_every_order(facts, d, kind):
    side = kind[0]
    layout = PageLayout(d, 2, value_axis="token" if kind == "v_token" else "channel")
    assert facts[f"kept {kind} {d}"] == layout.kept_order(side).tolist()
    assert facts[f"dense {side} {d}"] == layout.dense_order(side).tolist()
    assert facts[f"nibbles {kind} {d}"] == layout.nibble_order(side).tolist()


@pytest.mark.parametrize("d", [64, 128, 256])
def test_rows_and_their_inverses(facts, d):
    positions = facts[f"row positions {d}"]
    assert positions == PageLayout(d, 2).row_order.tolist()
    assert facts[f"row places {d}"] == np.argsort(positions).tolist()
    tokens = PageLayout(d, 2, value_axis="token").kept_order("v")
    channels = tokens[: 512 * (d // 16)].reshape(d // 16, 2, 32, 8)[:, 0, ::4, :4:2] // 2 % d  # of rows g and g + 8
    assert facts[f"value rows {d}"] == np.argsort(channels.transpose(0, 2, 1).reshape(-1)).tolist()
