// The Python module hierasparse_vllm._C.  Tensors come as addresses and strides in bytes, the stream as an address: no
// libtorch, so one build serves every PyTorch.  A wrong argument is a ValueError, a failed launch a RuntimeError.
#include "bindings.h"

#include <sstream>
#include <vector>

namespace hierasparse {

namespace {

py::dict layout_facts(int head_size, int value_bytes, int sparse_k, int sparse_v, int sink_tokens, bool key_mean) {
  const PageLayout layout{head_size, value_bytes, sparse_k, sparse_v, sink_tokens, key_mean};
  py::dict facts;
  facts["head_bytes"] = layout.head_bytes();
  facts["mean_offset"] = layout.mean_offset();
  facts["sink_k_offset"] = layout.sink_k_offset();
  facts["sink_v_offset"] = layout.sink_v_offset();
  facts["k_offset"] = layout.k_offset();
  facts["v_offset"] = layout.v_offset();
  return facts;
}

py::tuple cuda_archs() {
  std::istringstream words(HS_CUDA_ARCHS);
  std::vector<std::string> names;
  for (std::string name; words >> name;) names.push_back(name);
  return py::cast(names);
}

Batch make_batch(uintptr_t query_start, uintptr_t seq_lens, uintptr_t page_table, uintptr_t window_table,
                 int64_t page_table_stride, int64_t window_table_stride, int requests, int window_block,
                 int local_window, bool own_chunk_dense) {
  require(requests >= 0, "requests must not be negative");
  require(window_block > 0 && kPageTokens % window_block == 0, "window_block must divide a page of 256 tokens");
  require(local_window >= 0 && local_window % kPageTokens == 0, "local_window must be a multiple of 256");
  require(page_table_stride >= 0 && window_table_stride >= 0, "strides of tables must not be negative");
  return {ints(query_start, "query_start"),
          ints(seq_lens, "seq_lens"),
          ints(page_table, "page_table"),
          ints(window_table, "window_table"),
          page_table_stride,
          window_table_stride,
          requests,
          window_block,
          local_window,
          own_chunk_dense};
}

Cache make_cache(uintptr_t pages, uintptr_t window, int64_t page_stride, int64_t window_stride, int kv_heads,
                 int head_size, int sparse_k, int sparse_v, int sink_tokens, bool key_mean,
                 const std::string& value_axis, const std::string& dtype) {
  require_head_size(head_size);
  require(sparse_k >= 0 && sparse_k <= kSubs && sparse_v >= 0 && sparse_v <= kSubs,
          "sparse_k and sparse_v must be 0 to 4");
  require(sink_tokens >= 0 && sink_tokens <= kSubTokens, "sink_tokens must be 0 to 64");
  require(value_axis == "channel" || value_axis == "token", "value_axis must be 'channel' or 'token'");
  require(kv_heads > 0, "kv_heads must be positive");
  const PageLayout layout{head_size, 2, sparse_k, sparse_v, sink_tokens, key_mean};
  require(page_stride >= int64_t{kv_heads} * layout.head_bytes(), "page_stride is less than the bytes of a page");
  strides({page_stride, window_stride}, "page_stride and window_stride");
  return {pointer<uint8_t>(pages, "pages"),
          pointer<uint8_t>(window, "window"),
          page_stride,
          window_stride,
          kv_heads,
          value_axis == "token",
          layout,
          parse_dtype(dtype)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of HieraSparse for vLLM; hierasparse_vllm/extension.py loads it";
  m.attr("LAYOUT_VERSION") = kLayoutVersion;
  m.attr("cuda_archs") = cuda_archs();
  m.def("layout", &layout_facts, py::kw_only(), py::arg("head_size"), py::arg("value_bytes"), py::arg("sparse_k"),
        py::arg("sparse_v"), py::arg("sink_tokens"), py::arg("key_mean"),
        "Sizes and offsets of a page layout, to compare with page.py");
  py::class_<Batch>(m, "Batch", "A step: device addresses of int32 tables, their strides in entries, the read rule")
      .def(py::init(&make_batch), py::kw_only(), py::arg("query_start"), py::arg("seq_lens"), py::arg("page_table"),
           py::arg("window_table"), py::arg("page_table_stride"), py::arg("window_table_stride"), py::arg("requests"),
           py::arg("window_block"), py::arg("local_window"), py::arg("own_chunk_dense"));
  py::class_<Cache>(m, "Cache", "A layer's caches: device addresses, strides in bytes, the page layout")
      .def(py::init(&make_cache), py::kw_only(), py::arg("pages"), py::arg("window"), py::arg("page_stride"),
           py::arg("window_stride"), py::arg("kv_heads"), py::arg("head_size"), py::arg("sparse_k"),
           py::arg("sparse_v"), py::arg("sink_tokens"), py::arg("key_mean"), py::arg("value_axis"), py::arg("dtype"));
  bind_compress(m);
  bind_decode(m);
  bind_expand(m);
  bind_prefill(m);
}

}  // namespace hierasparse
