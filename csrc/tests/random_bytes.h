// Memory to copy and to compare: the same for the same seed.
//
// Lifetime: the caller's own. Threads: any. Alignment: that of operator new.
#pragma once

#include <cstddef>
#include <random>
#include <vector>

namespace check {

using Bytes = std::vector<std::byte>;

inline Bytes random_bytes(std::size_t size, unsigned seed) {
  std::mt19937 random(seed);
  Bytes bytes(size);
  for (std::byte& value : bytes) value = static_cast<std::byte>(random());
  return bytes;
}

}  // namespace check
