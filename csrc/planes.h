// Byte planes: byte p of every item, together, for p = 0 .. item_bytes - 1.
//
// Floating-point numbers compress far better when the bytes that hold exponents stand together.
// Plane p occupies [p * count, (p + 1) * count) of the plane-ordered buffer.
//
// Lifetime: the caller owns both buffers for the duration of a call; nothing is kept.
// Threads: pure functions, safe from any number of threads on disjoint targets.
// Alignment: none required of either buffer.
#pragma once

#include <cstddef>

namespace spotspeed {

// Throws std::invalid_argument unless items of this size are known: 1, 2, 4, 8 or 16 bytes.
// Every function here starts with it.
void check_item_bytes(std::size_t item_bytes);

// The byte-by-byte definition; the vector paths and the kernels must agree with it exactly.
void split_planes_scalar(const std::byte* source, std::byte* target, std::size_t item_bytes,
                         std::size_t count);
void join_planes_scalar(const std::byte* source, std::byte* target, std::size_t item_bytes,
                        std::size_t count);

// The fastest path of this processor: AVX2 for items of 2, 4 and 8 bytes where it has that.
// Source and target hold item_bytes * count bytes each and must not overlap.
void split_planes(const std::byte* source, std::byte* target, std::size_t item_bytes,
                  std::size_t count);
void join_planes(const std::byte* source, std::byte* target, std::size_t item_bytes,
                 std::size_t count);

// Whether this processor takes the AVX2 paths.
bool has_avx2();

}  // namespace spotspeed
