"""csrc/compress compiled for the host: its arithmetic function by function, and the kernel as an op on the CPU."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

SOURCE = Path(__file__).with_name("compress_host.cpp")
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def structure(name, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


PageLayout = structure(
    "PageLayout", head_size=INT, value_bytes=INT, sparse_k=INT, sparse_v=INT, sink_tokens=INT, key_mean=ctypes.c_bool
)
Batch = structure(
    "Batch", query_start=POINTER, seq_lens=POINTER, page_table=POINTER, window_table=POINTER,
    page_table_stride=LONG, window_table_stride=LONG,
    requests=INT, window_block=INT, local_window=INT, own_chunk_dense=INT,
)  # fmt: skip
Cache = structure(
    "Cache", pages=POINTER, window=POINTER, page_stride=LONG, window_stride=LONG,
    kv_heads=INT, value_axis_token=INT, layout=PageLayout, dtype=INT,
)  # fmt: skip
Params = structure(
    "Params", batch=Batch, cache=Cache, key=POINTER, value=POINTER,
    key_row_stride=LONG, key_head_stride=LONG, value_row_stride=LONG, value_head_stride=LONG,
    slots=POINTER, rows=INT, k_order=POINTER, k_weight=POINTER, rescale_k=INT, rescale_v=INT,
    pages_compressed=POINTER, sms=INT,
)  # fmt: skip


@cache
def library():
    """The compiled library; skips the test where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: csrc/compress was NOT compared with the reference")
    target = Path(tempfile.mkdtemp(prefix="hierasparse-")) / "compress_host.so"
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
    subprocess.run([compiler, *options, "-shared", "-fPIC", "-o", target, SOURCE], check=True)
    loaded = ctypes.CDLL(str(target))
    assert loaded.params_bytes() == ctypes.sizeof(Params), "the structures above are those of the sources"
    return loaded


def call(name, *arguments):
    """Call a function with NumPy arrays, integers and floats."""
    # Arrays stay referenced by `arguments` until the call returns.
    converted = [
        x.ctypes.data_as(POINTER) if isinstance(x, np.ndarray) else ctypes.c_float(x) if isinstance(x, float) else x
        for x in arguments
    ]
    return getattr(library(), name)(*converted)


class HostOps:
    """`update` by the kernel, run on the CPU.

    Parameters
    ----------
    blocks : int
        Blocks of the grid.
    tile : int
        Tokens that a block with 256 channels keeps in shared memory: 256, or 64 as on devices with less of it.
    units_store : bool
        New rows of pages that fill are stored by those who compress them, as in large steps.
    """

    def __init__(self, blocks=3, tile=256, units_store=True):
        self.blocks, self.tile, self.units_store = blocks, tile, units_store
        self.count = torch.zeros(1, dtype=torch.int64)

    def update(self, key, value, batch, cache):
        window, pages, layout, policy = cache.window, cache.pages, cache.layout, cache.policy
        order = policy.key.grouping.order.int().contiguous()
        weight = policy.key.grouping.weight
        params = Params(
            Batch(
                batch.query_start.data_ptr(), batch.seq_lens.data_ptr(),
                batch.page_table.data_ptr(), batch.window_table.data_ptr(),
                batch.page_table.stride(0), batch.window_table.stride(0),
                len(batch.seq_lens), batch.window_block, batch.rule.local_window, batch.rule.own_chunk_dense,
            ),
            Cache(
                pages.data_ptr(), window.data_ptr(), pages.stride(0), window.stride(0) * window.itemsize,
                pages.shape[1], layout.value_axis == "token",
                PageLayout(
                    layout.head_size, layout.value_bytes, layout.sparse_k, layout.sparse_v,
                    layout.sink_tokens, layout.key_mean,
                ),
                int(window.dtype == torch.float16),
            ),
            key.data_ptr(), value.data_ptr(),
            *(x.stride(i) * x.itemsize for x in (key, value) for i in (0, 1)),
            batch.slots.data_ptr(), len(batch.slots),
            order.data_ptr(), None if weight is None else weight.data_ptr(),
            policy.key.rescale, policy.value.rescale, self.count.data_ptr(), 1,
        )  # fmt: skip
        library().store_compress(ctypes.byref(params), self.blocks, self.tile, self.units_store)
