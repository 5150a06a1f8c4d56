// Bindings of csrc/expand.
#include "bindings.h"
#include "expand/launch.h"

namespace hierasparse {

static void expand(const Cache& cache, uintptr_t pages, int count, uintptr_t blocks, uintptr_t tokens, int block_count,
                   int window_block, uintptr_t k, uintptr_t v, int64_t page_stride, int64_t token_stride,
                   int64_t head_stride, uintptr_t k_order, uintptr_t stream) {
  require(count >= 0 && block_count >= 0, "count and block_count must not be negative");
  require(window_block > 0 && window_block % kSubTokens == 0, "window_block must be a multiple of 64");
  strides({page_stride, token_stride, head_stride}, "page_stride, token_stride and head_stride");
  const auto given = [](uintptr_t p, int n, const char* name) { return n == 0 ? nullptr : ints(p, name); };
  const ExpandParams params{cache,
                            given(pages, count, "pages"),
                            count,
                            given(blocks, block_count, "blocks"),
                            given(tokens, block_count, "tokens"),
                            block_count,
                            window_block,
                            pointer<void>(k, "k"),
                            pointer<void>(v, "v"),
                            page_stride,
                            token_stride,
                            head_stride,
                            ints(k_order, "k_order")};
  launch_expand(params, reinterpret_cast<cudaStream_t>(stream));
}

static void merge(uintptr_t out, uintptr_t out_lse, uintptr_t part, uintptr_t part_lse, int parts, int64_t out_stride,
                  int64_t part_stride, int64_t parts_stride, int64_t out_lse_stride, int64_t part_lse_stride,
                  int64_t parts_lse_stride, uintptr_t rows, int count, int heads, int head_size, bool out_float,
                  bool part_float, const std::string& dtype, uintptr_t stream) {
  require(count >= 0 && heads > 0, "count must not be negative and heads must be positive");
  require(parts > 0, "parts must be positive");
  require_head_size(head_size);
  strides({out_stride, part_stride, parts_stride}, "out_stride, part_stride and parts_stride");
  const MergeParams params{pointer<void>(out, "out"),
                           pointer<float>(out_lse, "out_lse", alignof(float)),
                           pointer<const void>(part, "part"),
                           pointer<const float>(part_lse, "part_lse", alignof(float)),
                           parts,
                           out_stride,
                           part_stride,
                           parts_stride,
                           out_lse_stride,
                           part_lse_stride,
                           parts_lse_stride,
                           pointer_or_null<const int32_t>(rows, "rows", alignof(int32_t)),
                           count,
                           heads,
                           head_size,
                           out_float,
                           part_float,
                           parse_dtype(dtype)};
  launch_merge(params, reinterpret_cast<cudaStream_t>(stream));
}

void bind_expand(py::module_& m) {
  m.def("expand", &expand, py::arg("cache"), py::kw_only(), py::arg("pages"), py::arg("count"), py::arg("blocks") = 0,
        py::arg("tokens") = 0, py::arg("block_count") = 0, py::arg("window_block"), py::arg("k"), py::arg("v"),
        py::arg("page_stride"), py::arg("token_stride"), py::arg("head_stride"), py::arg("k_order"), py::arg("stream"),
        "Compressed pages, and behind them window blocks, to dense rows");
  m.def("merge", &merge, py::kw_only(), py::arg("out"), py::arg("out_lse"), py::arg("part"), py::arg("part_lse"),
        py::arg("parts"), py::arg("out_stride"), py::arg("part_stride"), py::arg("parts_stride"),
        py::arg("out_lse_stride"), py::arg("part_lse_stride"), py::arg("parts_lse_stride"), py::arg("rows") = 0,
        py::arg("count"), py::arg("heads"), py::arg("head_size"), py::arg("out_float"), py::arg("part_float"),
        py::arg("dtype"), py::arg("stream"), "Merge attention over sets of keys into attention over another");
}

}  // namespace hierasparse
