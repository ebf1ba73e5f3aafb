#include "planes.h"

#include <initializer_list>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#define SPOTSPEED_AVX2 __attribute__((target("avx2")))
#define SPOTSPEED_AVX2_INLINE __attribute__((target("avx2"), always_inline)) inline
#endif

namespace spotspeed {
namespace {

// Items [first, count); `count` stays the distance between planes.
template <std::size_t Item>
void split_from(const std::byte* source, std::byte* target, std::size_t count, std::size_t first) {
  for (std::size_t i = first; i < count; ++i) {
    for (std::size_t p = 0; p < Item; ++p) target[p * count + i] = source[i * Item + p];
  }
}

template <std::size_t Item>
void join_from(const std::byte* source, std::byte* target, std::size_t count, std::size_t first) {
  for (std::size_t i = first; i < count; ++i) {
    for (std::size_t p = 0; p < Item; ++p) target[i * Item + p] = source[p * count + i];
  }
}

#if defined(SPOTSPEED_AVX2)

constexpr std::size_t kStep = 32;  // items per iteration: one full vector of every plane

SPOTSPEED_AVX2_INLINE __m256i load(const std::byte* address) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address));
}

SPOTSPEED_AVX2_INLINE void store(std::byte* address, __m256i value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(address), value);
}

SPOTSPEED_AVX2 std::size_t split2(const std::byte* source, std::byte* target, std::size_t count) {
  const __m256i low_byte = _mm256_set1_epi16(0x00ff);
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const __m256i a = load(source + 2 * i), b = load(source + 2 * i + 32);
    const __m256i low =
        _mm256_packus_epi16(_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte));
    const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    // packus works within 128-bit lanes: 0xd8 puts the four quarters back in order.
    store(target + i, _mm256_permute4x64_epi64(low, 0xd8));
    store(target + count + i, _mm256_permute4x64_epi64(high, 0xd8));
  }
  return i;
}

SPOTSPEED_AVX2 std::size_t split4(const std::byte* source, std::byte* target, std::size_t count) {
  // Within each lane: the four first bytes, then the four second bytes, and so on.
  const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                          0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  // After the transpose a plane's eight 4-byte units are ordered lane 0 then lane 1.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const std::byte* block = source + 4 * i;
    const __m256i a = _mm256_shuffle_epi8(load(block), gather);
    const __m256i b = _mm256_shuffle_epi8(load(block + 32), gather);
    const __m256i c = _mm256_shuffle_epi8(load(block + 64), gather);
    const __m256i d = _mm256_shuffle_epi8(load(block + 96), gather);
    const __m256i ab01 = _mm256_unpacklo_epi32(a, b), ab23 = _mm256_unpackhi_epi32(a, b);
    const __m256i cd01 = _mm256_unpacklo_epi32(c, d), cd23 = _mm256_unpackhi_epi32(c, d);
    const __m256i planes[4] = {
        _mm256_unpacklo_epi64(ab01, cd01), _mm256_unpackhi_epi64(ab01, cd01),
        _mm256_unpacklo_epi64(ab23, cd23), _mm256_unpackhi_epi64(ab23, cd23)};
    for (std::size_t p = 0; p < 4; ++p) {
      store(target + p * count + i, _mm256_permutevar8x32_epi32(planes[p], order));
    }
  }
  return i;
}

// Transposes eight vectors of eight 2-byte units per lane: row r, unit u becomes row u, unit r.
SPOTSPEED_AVX2_INLINE void transpose8x8_epi16(__m256i (&rows)[8]) {
  __m256i pairs[8], quads[8];
  for (int k = 0; k < 4; ++k) {
    pairs[2 * k] = _mm256_unpacklo_epi16(rows[2 * k], rows[2 * k + 1]);
    pairs[2 * k + 1] = _mm256_unpackhi_epi16(rows[2 * k], rows[2 * k + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    const __m256i* in = pairs + 4 * half;
    __m256i* out = quads + 4 * half;
    out[0] = _mm256_unpacklo_epi32(in[0], in[2]);
    out[1] = _mm256_unpackhi_epi32(in[0], in[2]);
    out[2] = _mm256_unpacklo_epi32(in[1], in[3]);
    out[3] = _mm256_unpackhi_epi32(in[1], in[3]);
  }
  for (int k = 0; k < 4; ++k) {
    rows[2 * k] = _mm256_unpacklo_epi64(quads[k], quads[k + 4]);
    rows[2 * k + 1] = _mm256_unpackhi_epi64(quads[k], quads[k + 4]);
  }
}

SPOTSPEED_AVX2 std::size_t split8(const std::byte* source, std::byte* target, std::size_t count) {
  // Within each lane two items: byte p of both stand together as 2-byte unit p.
  const __m256i gather = _mm256_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15,
                                          0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const std::byte* block = source + 8 * i;
    // Row r holds items 2r, 2r+1 in its low lane and 16 + 2r, 17 + 2r in its high lane, so
    // that after the transpose each plane is already in order.
    __m256i rows[8];
    for (std::size_t r = 0; r < 8; ++r) {
      const auto low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 16 * r));
      const auto high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 128 + 16 * r));
      rows[r] = _mm256_shuffle_epi8(
          _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), gather);
    }
    transpose8x8_epi16(rows);
    for (std::size_t p = 0; p < 8; ++p) store(target + p * count + i, rows[p]);
  }
  return i;
}

SPOTSPEED_AVX2 std::size_t join2(const std::byte* source, std::byte* target, std::size_t count) {
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const __m256i low = load(source + i), high = load(source + count + i);
    const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
    store(target + 2 * i, _mm256_permute2x128_si256(a, b, 0x20));
    store(target + 2 * i + 32, _mm256_permute2x128_si256(a, b, 0x31));
  }
  return i;
}

SPOTSPEED_AVX2 std::size_t join4(const std::byte* source, std::byte* target, std::size_t count) {
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const __m256i p0 = load(source + i), p1 = load(source + count + i);
    const __m256i p2 = load(source + 2 * count + i), p3 = load(source + 3 * count + i);
    const __m256i low01 = _mm256_unpacklo_epi8(p0, p1), high01 = _mm256_unpackhi_epi8(p0, p1);
    const __m256i low23 = _mm256_unpacklo_epi8(p2, p3), high23 = _mm256_unpackhi_epi8(p2, p3);
    // Each of these holds items 4k .. 4k+3 in its low lane and 16 more in its high lane.
    const __m256i a = _mm256_unpacklo_epi16(low01, low23);
    const __m256i b = _mm256_unpackhi_epi16(low01, low23);
    const __m256i c = _mm256_unpacklo_epi16(high01, high23);
    const __m256i d = _mm256_unpackhi_epi16(high01, high23);
    std::byte* block = target + 4 * i;
    store(block, _mm256_permute2x128_si256(a, b, 0x20));
    store(block + 32, _mm256_permute2x128_si256(c, d, 0x20));
    store(block + 64, _mm256_permute2x128_si256(a, b, 0x31));
    store(block + 96, _mm256_permute2x128_si256(c, d, 0x31));
  }
  return i;
}

SPOTSPEED_AVX2 std::size_t join8(const std::byte* source, std::byte* target, std::size_t count) {
  const __m256i spread = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,
                                          0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    __m256i rows[8];
    for (std::size_t p = 0; p < 8; ++p) rows[p] = load(source + p * count + i);
    transpose8x8_epi16(rows);
    std::byte* block = target + 8 * i;
    for (std::size_t r = 0; r < 8; ++r) {
      const __m256i items = _mm256_shuffle_epi8(rows[r], spread);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(block + 16 * r), _mm256_castsi256_si128(items));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(block + 128 + 16 * r),
                       _mm256_extracti128_si256(items, 1));
    }
  }
  return i;
}

#endif

}  // namespace

bool has_avx2() {
#if defined(SPOTSPEED_AVX2)
  static const bool available = __builtin_cpu_supports("avx2") != 0;
  return available;
#else
  return false;
#endif
}

void check_item_bytes(std::size_t item_bytes) {
  for (const std::size_t known : {1, 2, 4, 8, 16}) {
    if (item_bytes == known) return;
  }
  throw std::invalid_argument("item_bytes must be 1, 2, 4, 8 or 16, not " +
                              std::to_string(item_bytes));
}

void split_planes_scalar(const std::byte* source, std::byte* target, std::size_t item_bytes,
                         std::size_t count) {
  check_item_bytes(item_bytes);
  switch (item_bytes) {
    case 1: return split_from<1>(source, target, count, 0);
    case 2: return split_from<2>(source, target, count, 0);
    case 4: return split_from<4>(source, target, count, 0);
    case 8: return split_from<8>(source, target, count, 0);
    default: return split_from<16>(source, target, count, 0);
  }
}

void join_planes_scalar(const std::byte* source, std::byte* target, std::size_t item_bytes,
                        std::size_t count) {
  check_item_bytes(item_bytes);
  switch (item_bytes) {
    case 1: return join_from<1>(source, target, count, 0);
    case 2: return join_from<2>(source, target, count, 0);
    case 4: return join_from<4>(source, target, count, 0);
    case 8: return join_from<8>(source, target, count, 0);
    default: return join_from<16>(source, target, count, 0);
  }
}

// The vector loops stop at the last whole step; the plain loop does what is left.
void split_planes(const std::byte* source, std::byte* target, std::size_t item_bytes,
                  std::size_t count) {
#if defined(SPOTSPEED_AVX2)
  if (has_avx2()) {
    switch (item_bytes) {
      case 2: return split_from<2>(source, target, count, split2(source, target, count));
      case 4: return split_from<4>(source, target, count, split4(source, target, count));
      case 8: return split_from<8>(source, target, count, split8(source, target, count));
      default: break;
    }
  }
#endif
  split_planes_scalar(source, target, item_bytes, count);
}

void join_planes(const std::byte* source, std::byte* target, std::size_t item_bytes,
                 std::size_t count) {
#if defined(SPOTSPEED_AVX2)
  if (has_avx2()) {
    switch (item_bytes) {
      case 2: return join_from<2>(source, target, count, join2(source, target, count));
      case 4: return join_from<4>(source, target, count, join4(source, target, count));
      case 8: return join_from<8>(source, target, count, join8(source, target, count));
      default: break;
    }
  }
#endif
  join_planes_scalar(source, target, item_bytes, count);
}

}  // namespace spotspeed
