"""Every kernel once, on shapes small enough for compute-sanitizer; test_sanitizer.py runs this file under its tools.

An argument is the file of another build of the extension.
"""

import importlib.util
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "unit")]

from serving import Engine  # noqa: E402

from hierasparse_vllm.extension import MODULE  # noqa: E402
from hierasparse_vllm.ops.batch import ReadRule  # noqa: E402
from hierasparse_vllm.ops.cuda import CudaOps, levels  # noqa: E402
from hierasparse_vllm.page import PageLayout  # noqa: E402
from tests.gpu import decode_cases  # noqa: E402


def take_extension(file: str) -> None:
    """Let the package find its extension in ``file``."""
    spec = importlib.util.spec_from_file_location(MODULE, file)
    sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[MODULE])


def attend(case: decode_cases.Case, **options: str) -> None:
    """Attention of the case's queries, with a workspace of few pages."""
    out = torch.empty_like(case.query)
    CudaOps(prefill_mib=1, **options).attend(case.query, case.batch, case.cache, case.scale, out)


def main() -> None:
    if len(sys.argv) > 1:
        take_extension(sys.argv[1])
    capability = torch.cuda.get_device_capability()
    for axis, sparse in (("channel", (4, 2)), ("token", (3, 4))):
        case = decode_cases.make_case([1100, 40, 513], [1, 3, 16], d=64, axis=axis, sparse=sparse)
        for kernel in levels.able(levels.DECODE, capability, torch.bfloat16, case.layout):
            attend(case, decode_kernel=kernel)
        # With 64 channels a chunk's own pages and window fit into a workspace of 1 MiB, with 128 the kernel reads all.
        d = 64 if axis == "channel" else 128
        case = decode_cases.make_case([1100, 40, 700], [300, 17, 90], d=d, group=3, axis=axis, sparse=sparse)
        for kernel in levels.able(levels.LEVELS, capability, torch.bfloat16, case.layout):
            attend(case, prefill_kernel=kernel)
        # Three slabs of older pages, and a piece of the chunk beside each.
        case = decode_cases.make_case([1, 5900], [1, 700], d=64, axis=axis, sparse=sparse)
        attend(case, prefill_kernel=levels.EXPAND)
        layout = PageLayout(64, 2, *sparse, axis, 1, True)
        engine = Engine(layout, torch.bfloat16, ReadRule(256), 2, 2, "cuda", blocks=30, rescale=True, ops=CudaOps())
        seq = engine.sequence(600)
        for n in (520, 1, 79):  # a prefill with pages of its own, a decode step, a chunk
            engine.step([(seq, n)])
    # Pages that are sparse throughout have kernels of their own, and so have other sizes and dtypes.
    for axis, d, dtype in (
        ("token", 128, torch.bfloat16),
        ("token", 64, torch.bfloat16),
        ("channel", 256, torch.float16),
    ):
        case = decode_cases.make_case([1100, 700], [1, 90], d=d, axis=axis, sparse=(4, 4), dtype=dtype)
        for kernel in levels.able(levels.DECODE, capability, dtype, case.layout):
            attend(case, decode_kernel=kernel)
        for kernel in levels.able(levels.LEVELS, capability, dtype, case.layout):
            attend(case, prefill_kernel=kernel)
    layout = PageLayout(64, 2, 4, 4, "token", 1, True)
    engine = Engine(layout, torch.float16, ReadRule(256), 2, 2, "cuda", blocks=40, rescale=True, ops=CudaOps())
    engine.step([(engine.sequence(1100), 1100)])  # so many rows are stored by units of pages
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
