#include "../kernel.cuh"

namespace hierasparse::prefill_sm80 {

template cudaError_t run<__half, 256, true, false>(const PrefillParams&, int, cudaStream_t);
template cudaError_t run<__half, 256, true, true>(const PrefillParams&, int, cudaStream_t);

}  // namespace hierasparse::prefill_sm80
