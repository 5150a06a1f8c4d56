// Bindings of csrc/prefill.
#include "bindings.h"
#include "prefill/sm80/launch.h"
#include "prefill/sm90/launch.h"

namespace hierasparse {

namespace {

struct Level {
  const char* name;
  int (*columns)(int head_size);
  void (*launch)(const PrefillParams&, cudaStream_t);
};
constexpr Level kLevels[] = {{"mma_sp", prefill_sm80_columns, launch_prefill_sm80},
                             {"wgmma_sp", prefill_sm90_columns, launch_prefill_sm90}};

const Level& level_of(const std::string& name) {
  for (const Level& level : kLevels) {
    if (name == level.name) return level;
  }
  throw py::value_error("level must be 'mma_sp' or 'wgmma_sp'.");
}

int columns(const std::string& level, int head_size) {
  require_head_size(head_size);
  return level_of(level).columns(head_size);
}

void prefill(const std::string& level, const Batch& batch, const Cache& cache, uintptr_t tiles, int tile_count,
             uintptr_t query, int64_t query_row_stride, int64_t query_head_stride, int splits, uintptr_t out,
             uintptr_t lse, int64_t out_split_stride, int64_t out_row_stride, int64_t out_head_stride,
             int64_t lse_split_stride, int64_t lse_head_stride, int heads, float scale, uintptr_t k_order,
             uintptr_t stream) {
  require(heads > 0 && heads % cache.kv_heads == 0, "heads must be a multiple of kv_heads");
  require(tile_count >= 0 && splits > 0, "tile_count must not be negative and splits must be positive");
  strides({query_row_stride, query_head_stride, out_split_stride, out_row_stride, out_head_stride},
          "strides of query and out");
  const PrefillParams params{
      batch,
      cache,
      reinterpret_cast<const PrefillTile*>(ints(tiles, "tiles")),
      tile_count,
      pointer<const void>(query, "query"),
      query_row_stride,
      query_head_stride,
      splits,
      pointer<void>(out, "out"),
      pointer<float>(lse, "lse", alignof(float)),
      out_split_stride,
      out_row_stride,
      out_head_stride,
      lse_split_stride,
      lse_head_stride,
      heads,
      scale,
      pointer<const int32_t>(k_order, "k_order", 2 * alignof(int32_t)),  // read two at a time
  };
  level_of(level).launch(params, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_prefill(py::module_& m) {
  m.def("prefill_columns", &columns, py::arg("level"), py::arg("head_size"),
        "Most columns (query, head of the group) of a tile");
  m.def("prefill", &prefill, py::arg("level"), py::arg("batch"), py::arg("cache"), py::kw_only(), py::arg("tiles"),
        py::arg("tile_count"), py::arg("query"), py::arg("query_row_stride"), py::arg("query_head_stride"),
        py::arg("splits"), py::arg("out"), py::arg("lse"), py::arg("out_split_stride"), py::arg("out_row_stride"),
        py::arg("out_head_stride"), py::arg("lse_split_stride"), py::arg("lse_head_stride"), py::arg("heads"),
        py::arg("scale"), py::arg("k_order"), py::arg("stream"),
        "Attention of tiles of queries over their compressed pages");
}

}  // namespace hierasparse
