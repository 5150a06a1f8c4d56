// Bindings of csrc/decode.
#include "bindings.h"
#include "decode/launch.h"

namespace hierasparse {

static void decode(const Batch& batch, const Cache& cache, uintptr_t query, uintptr_t out, int64_t query_row_stride,
                   int64_t query_head_stride, int64_t out_row_stride, int64_t out_head_stride, int heads, float scale,
                   uintptr_t k_order, uintptr_t workspace, uintptr_t counters, int max_query_len, int ctas,
                   bool expand_keys, uintptr_t stream) {
  require(heads > 0 && heads % cache.kv_heads == 0, "heads must be a multiple of kv_heads");
  require(max_query_len > 0 && max_query_len <= kMaxQueryLen, "max_query_len must be 1 to 16");
  require(ctas > 0, "ctas must be positive");
  strides({query_row_stride, query_head_stride, out_row_stride, out_head_stride}, "strides of query and out");
  DecodeParams params{batch,
                      cache,
                      pointer<const void>(query, "query"),
                      pointer<void>(out, "out"),
                      query_row_stride,
                      query_head_stride,
                      out_row_stride,
                      out_head_stride,
                      heads,
                      scale,
                      pointer<const int32_t>(k_order, "k_order"),
                      pointer<float>(workspace, "workspace"),
                      pointer<int32_t>(counters, "counters", alignof(int32_t)),
                      max_query_len,
                      ctas};
  params.expand_keys = expand_keys;
  launch_decode(params, reinterpret_cast<cudaStream_t>(stream));
}

void bind_decode(py::module_& m) {
  m.def("decode_ctas", &decode_ctas, "CTAs that fill the current device");
  m.def("decode_workspace_floats", &decode_workspace_floats, py::kw_only(), py::arg("head_size"), py::arg("ctas"),
        "Entries that `workspace` of `decode` needs");
  m.def("decode", &decode, py::arg("batch"), py::arg("cache"), py::kw_only(), py::arg("query"), py::arg("out"),
        py::arg("query_row_stride"), py::arg("query_head_stride"), py::arg("out_row_stride"),
        py::arg("out_head_stride"), py::arg("heads"), py::arg("scale"), py::arg("k_order"), py::arg("workspace"),
        py::arg("counters"), py::arg("max_query_len"), py::arg("ctas"), py::arg("expand_keys"), py::arg("stream"),
        "Attention of every request with at most max_query_len queries over its pages and window");
}

}  // namespace hierasparse
