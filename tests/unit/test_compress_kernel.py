"""The kernel of csrc/compress, run on the CPU, writes the bytes that the reference writes; on a GPU: tests/gpu."""

import functools

import packing
import pytest
from compress_host import HostOps, library

BLOCK_BYTES = 228 * 1024 // 3 - 1024
"""Shared memory of a block when three are to fit on an SM of Hopper or Blackwell."""


@pytest.mark.parametrize("dtype", packing.HALVES, ids=str)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("d, tile", [(64, 256), (128, 256), (256, 256), (256, 64)])
def test_pages_have_the_bytes_of_the_reference(d, tile, axis, dtype):
    every = {64: 1, 128: 3, 256: 7}[d]
    packing.check_cases(functools.partial(HostOps, tile=tile), "cpu", d, axis, dtype, every)


@pytest.mark.parametrize("seed", range(4))
def test_pages_are_filled_from_the_window_and_from_new_rows(seed):
    packing.check_schedule(functools.partial(HostOps, blocks=1 + 7 * seed, units_store=seed % 2 == 0), "cpu", seed)


@pytest.mark.parametrize("tokens", [32, 64, 128])
def test_window_blocks_of_any_size(tokens):
    packing.check_window_blocks(HostOps, "cpu", tokens)


@pytest.mark.parametrize("units_store", [False, True])
@pytest.mark.parametrize(
    "check", [packing.check_many_requests, packing.check_null_blocks, packing.check_padding, packing.check_repeats]
)
def test_steps(check, units_store):
    check(functools.partial(HostOps, units_store=units_store), "cpu")


def test_three_blocks_share_an_sm():
    assert library().shared_bytes(64, 256) < library().shared_bytes(128, 256) <= BLOCK_BYTES
    assert library().shared_bytes(256, 256) <= 163 * 1024, "a page of 256 channels fits on an A100"
    assert library().shared_bytes(256, 64) <= 99 * 1024, "a sub-block of them everywhere"
