// SHA-256 (FIPS 180-4) and HMAC-SHA256 (RFC 2104).
//
// Lifetime: a digest is a value; nothing of the inputs is kept.
// Threads: pure functions.
// Alignment: none required.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

namespace spotspeed {

constexpr std::size_t kSha256Bytes = 32;

class Sha256 {
 public:
  void add(std::string_view data);
  // The digest of all that was added; the object is spent.
  std::string digest();

 private:
  void block(const unsigned char* data);
  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> pending_{};
  std::uint64_t size_ = 0;
};

// HMAC over the parts, one after the other.
std::string hmac_sha256(std::string_view key, std::initializer_list<std::string_view> parts);

// Whether both are equal, in a time that does not tell where they differ.
bool equal_in_constant_time(std::string_view one, std::string_view other);

}  // namespace spotspeed
