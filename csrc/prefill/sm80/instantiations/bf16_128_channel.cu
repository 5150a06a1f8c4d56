#include "../kernel.cuh"

namespace hierasparse::prefill_sm80 {

template cudaError_t run<__nv_bfloat16, 128, false, false>(const PrefillParams&, int, cudaStream_t);
template cudaError_t run<__nv_bfloat16, 128, false, true>(const PrefillParams&, int, cudaStream_t);

}  // namespace hierasparse::prefill_sm80
