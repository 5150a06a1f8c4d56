// One kernel per file: beside another one the compiler orders instructions differently, and this order was measured.
#include "../kernel.cuh"

namespace hierasparse::prefill90 {

template cudaError_t run_shape<128, true>(const PrefillParams&, cudaStream_t);

}  // namespace hierasparse::prefill90
