"""The decode kernel's shares: every item of every lane once, and merges that know just who has the parts."""

import subprocess
from collections import defaultdict

import numpy as np
import pytest

from tests.unit import on_cpu

PIECE, PAGE = 16, 256


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return on_cpu.build(tmp_path_factory.mktemp("schedule"), "decode_schedule")


def shares(program, batch, columns=8, ctas=264, heads=(32, 8), window=256, chunk=False, sparse=(4, 4), most=16):
    """Segments by lane: dict of (request, KV head, block) to lists of rows as the program prints them."""
    head = [columns, ctas, *heads, window, int(chunk), *sparse, most, len(batch)]
    text = " ".join(map(str, [*head, *(n for request in batch for n in request)]))
    out = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
    lanes = defaultdict(list)
    for line in out.splitlines():
        cta, request, kv_head, block, *rest = map(int, line.split())
        lanes[request, kv_head, block].append((cta, *rest))
    return lanes


def border(position, window):
    return max(0, position // PAGE - window // PAGE) * PAGE


def check(lanes, batch, columns=8, ctas=264, heads=(32, 8), window=256, chunk=False, most=16, **_):
    expected, items = set(), {}
    for r, (length, queries) in enumerate(batch):
        if not 0 < queries <= min(length, most):
            continue
        low = border(length - queries, window)
        high = low if chunk else border(length - 1, window)
        blocks = -(-queries * (heads[0] // heads[1]) // columns)
        for lane in ((r, h, b) for h in range(heads[1]) for b in range(blocks)):
            expected.add(lane)
            items[lane] = 4 * (high // PAGE) + -(-(length - low) // PIECE)
    assert set(lanes) == expected
    parts = defaultdict(list)
    for lane, segments in lanes.items():
        at = 0
        for cta, first, end, part, whole, owner, count, part_of_owner in segments:
            assert first == at < end, "items follow each other, CTA by CTA"
            at = end
            assert 0 <= cta < ctas and whole == (len(segments) == 1)
            assert (owner, count) == (segments[0][0], len(segments)) and cta - owner < count
            assert part_of_owner == segments[0][3]
            if not whole:
                assert cta == owner or part == 0, "merges look for the parts of others in their first place"
                parts[cta].append(part)
        assert at == items[lane]
    assert all(len(set(used)) == len(used) for used in parts.values()), "a place holds one part"


@pytest.mark.parametrize(
    "batch",
    [
        [(1, 1)],
        [(32_768, 1)] * 8,
        [(131_072, 1)],
        [(512, 1)] * 32,
        [(0, 1), (5, 0), (0, 0)],
        [(1, 1)] * 700,
        [(1_000_000, 1), (1, 1), (0, 0), (300, 16), (5000, 17), (17, 16)],
    ],
    ids=str,
)
@pytest.mark.parametrize("ctas", [1, 7, 264])
def test_known_batches(program, batch, ctas):
    check(shares(program, batch, ctas=ctas), batch, ctas=ctas)


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(program, seed):
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 3, 20, 128, 129, 400]))
    lengths = rng.choice([1, 300, 3000, 40_000]) * rng.random(n) + rng.integers(0, 2, n)
    batch = [(int(length), int(rng.integers(0, 18))) for length in lengths]
    kw = {
        "columns": int(rng.choice([8, 16])), "ctas": int(rng.choice([1, 17, 132, 264])),
        "heads": [(32, 8), (9, 3), (16, 1), (8, 8)][seed % 4], "window": int(rng.choice([0, 256, 1024])),
        "chunk": bool(rng.integers(2)), "sparse": tuple(map(int, rng.integers(0, 5, 2))),
        "most": int(rng.choice([1, 4, 16])),
    }  # fmt: skip
    check(shares(program, batch, **kw), batch, **kw)


def test_a_large_batch_is_shared_evenly(program):
    batch = [(32_768, 1)] * 8
    work = defaultdict(int)
    for segments in shares(program, batch).values():
        for cta, first, end, *_ in segments:
            work[cta] += sum(
                18 if item < 4 * 126 else 12 for item in range(first, end)
            )  # costs of schedule.cuh at S = 1
    assert len(work) == 264 and max(work.values()) - min(work.values()) <= 2 * 18


@pytest.mark.parametrize(("requests", "tokens", "parts"), [(32, 512, 1), (8, 2048, 4), (16, 700, 2)])
def test_short_lanes_get_whole_shares(program, requests, tokens, parts):
    """Nobody begins a second lane, and each lane has as many CTAs."""
    lengths = [tokens - 3 * i % 8 for i in range(requests)]
    batch = [(length, 1) for length in lengths]
    lanes = shares(program, batch)
    check(lanes, batch)
    assert {len(segments) for segments in lanes.values()} == {parts}
    ctas = [segment[0] for segments in lanes.values() for segment in segments]
    assert len(set(ctas)) == len(ctas)


def test_long_or_uneven_lanes_share_the_line(program):
    for batch in ([(32_768, 1)] * 8, [(512, 1)] * 31 + [(2048, 1)], [(512, 1)] * 21):
        lanes = shares(program, batch)
        check(lanes, batch)
        assert len({segment[0] for segments in lanes.values() for segment in segments}) == 264
