// Bindings of csrc/compress.
#include "bindings.h"
#include "compress/launch.h"

namespace hierasparse {

static void store_compress(const Batch& batch, const Cache& cache, uintptr_t key, uintptr_t value,
                           int64_t key_row_stride, int64_t key_head_stride, int64_t value_row_stride,
                           int64_t value_head_stride, uintptr_t slots, int rows, uintptr_t k_order, uintptr_t k_weight,
                           bool rescale_k, bool rescale_v, uintptr_t pages_compressed, int sms, uintptr_t stream) {
  require(rows >= 0, "rows must not be negative");
  require(sms > 0, "sms must be positive");
  strides({key_row_stride, key_head_stride, value_row_stride, value_head_stride}, "strides of key and value");
  const StoreCompressParams params{batch,
                                   cache,
                                   pointer<const void>(key, "key"),
                                   pointer<const void>(value, "value"),
                                   key_row_stride,
                                   key_head_stride,
                                   value_row_stride,
                                   value_head_stride,
                                   pointer<const int64_t>(slots, "slots", alignof(int64_t)),
                                   rows,
                                   ints(k_order, "k_order"),
                                   pointer_or_null<const float>(k_weight, "k_weight", alignof(float)),
                                   rescale_k,
                                   rescale_v,
                                   pointer_or_null<int64_t>(pages_compressed, "pages_compressed", alignof(int64_t)),
                                   sms};
  launch_store_compress(params, reinterpret_cast<cudaStream_t>(stream));
}

void bind_compress(py::module_& m) {
  m.def("store_compress", &store_compress, py::arg("batch"), py::arg("cache"), py::kw_only(), py::arg("key"),
        py::arg("value"), py::arg("key_row_stride"), py::arg("key_head_stride"), py::arg("value_row_stride"),
        py::arg("value_head_stride"), py::arg("slots"), py::arg("rows"), py::arg("k_order"), py::arg("k_weight") = 0,
        py::arg("rescale_k"), py::arg("rescale_v"), py::arg("pages_compressed") = 0, py::arg("sms"), py::arg("stream"),
        "Write a step's keys and values into the window, and every page that the step fills");
}

}  // namespace hierasparse
