// Softmax counts in powers of two, which is what the device's instructions compute: scores are multiplied by log2(e)
// (`scale_log2`), and a log-sum-exp is multiplied by ln(2) at the end.
#pragma once

namespace hierasparse {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

}  // namespace hierasparse
