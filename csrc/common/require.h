// Wrong arguments, told in a sentence.
#pragma once

#include <stdexcept>
#include <string>

namespace hierasparse {

// Python sees a ValueError.
[[noreturn]] inline void refuse(const std::string& sentence) {
  throw std::invalid_argument("HieraSparse: " + sentence + ".");
}
inline void require(bool good, const std::string& sentence) {
  if (!good) refuse(sentence);
}

}  // namespace hierasparse
