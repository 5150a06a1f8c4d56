#include "../kernel.cuh"

namespace hierasparse::decode {

template cudaError_t run<__nv_bfloat16, 128, false, true, 1>(const DecodeParams&, cudaStream_t);
template cudaError_t run<__nv_bfloat16, 128, false, true, 2>(const DecodeParams&, cudaStream_t);

}  // namespace hierasparse::decode
