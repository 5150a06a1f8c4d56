#include "../kernel.cuh"

namespace hierasparse::prefill90 {

template cudaError_t run_shape<64, false>(const PrefillParams&, cudaStream_t);
template cudaError_t run_shape<64, true>(const PrefillParams&, cudaStream_t);

}  // namespace hierasparse::prefill90
