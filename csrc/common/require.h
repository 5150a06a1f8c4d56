// Wrong arguments, told in a sentence.
#pragma once

#include <stdexcept>
#include <string>

namespace hierasparse {

// Python sees a ValueError.
inline void require(bool good, const std::string& sentence) {
  if (!good) throw std::invalid_argument("HieraSparse: " + sentence + ".");
}

}  // namespace hierasparse
