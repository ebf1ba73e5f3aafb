#include "msgpack.h"

#include <cstring>

namespace spotspeed::msgpack {
namespace {

constexpr std::size_t kInvalid = SIZE_MAX;

// Bytes of the code point that begins at `at`, or 0 where there is none (RFC 3629, section 4).
std::size_t code_point_bytes(std::string_view text, std::size_t at) {
  const auto part = [&](std::size_t i) {
    return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0u;
  };
  const auto is_tail = [&](std::size_t i) { return (part(i) & 0xc0u) == 0x80u; };
  const unsigned first = part(0), second = part(1);
  if (first < 0x80) return 1;
  if (first < 0xc2) return 0;
  if (first < 0xe0) return is_tail(1) ? 2 : 0;
  if (first < 0xf0) {
    if (!is_tail(1) || !is_tail(2)) return 0;
    if (first == 0xe0 && second < 0xa0) return 0;
    if (first == 0xed && second > 0x9f) return 0;
    return 3;
  }
  if (first > 0xf4 || !is_tail(1) || !is_tail(2) || !is_tail(3)) return 0;
  if (first == 0xf0 && second < 0x90) return 0;
  if (first == 0xf4 && second > 0x8f) return 0;
  return 4;
}

}  // namespace

std::size_t count_code_points(std::string_view text) {
  std::size_t count = 0;
  for (std::size_t at = 0; at < text.size(); ++count) {
    const std::size_t length = code_point_bytes(text, at);
    if (length == 0) return kInvalid;
    at += length;
  }
  return count;
}

std::string_view first_code_points(std::string_view text, std::size_t count) {
  if (text.size() <= count) return text;
  std::size_t at = 0;
  while (count-- > 0 && at < text.size()) {
    const std::size_t length = code_point_bytes(text, at);
    at += length == 0 ? 1 : length;
  }
  return text.substr(0, at);
}

void Writer::big_endian(std::uint64_t value, int bytes) {
  for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8) {
    byte(static_cast<unsigned>(value >> shift) & 0xffu);
  }
}

void Writer::integer(std::int64_t value) {
  const auto bits = static_cast<std::uint64_t>(value);
  if (value >= 0) {
    if (value < 0x80) return byte(static_cast<unsigned>(value));
    if (value <= 0xff) return byte(0xcc), big_endian(bits, 1);
    if (value <= 0xffff) return byte(0xcd), big_endian(bits, 2);
    if (value <= 0xffffffffLL) return byte(0xce), big_endian(bits, 4);
    return byte(0xcf), big_endian(bits, 8);
  }
  if (value >= -0x20) return big_endian(bits, 1);
  if (value >= INT8_MIN) return byte(0xd0), big_endian(bits, 1);
  if (value >= INT16_MIN) return byte(0xd1), big_endian(bits, 2);
  if (value >= INT32_MIN) return byte(0xd2), big_endian(bits, 4);
  byte(0xd3);
  big_endian(bits, 8);
}

void Writer::real(double value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  byte(0xcb);
  big_endian(bits, 8);
}

void Writer::text(std::string_view value) {
  const std::size_t size = value.size();
  if (size < 32) {
    byte(0xa0 | static_cast<unsigned>(size));
  } else if (size <= 0xff) {
    byte(0xd9), big_endian(size, 1);
  } else if (size <= 0xffff) {
    byte(0xda), big_endian(size, 2);
  } else {
    byte(0xdb), big_endian(size, 4);
  }
  out_.append(value);
}

void Writer::binary(std::string_view value) {
  const std::size_t size = value.size();
  if (size <= 0xff) {
    byte(0xc4), big_endian(size, 1);
  } else if (size <= 0xffff) {
    byte(0xc5), big_endian(size, 2);
  } else {
    byte(0xc6), big_endian(size, 4);
  }
  out_.append(value);
}

void Writer::array(std::size_t count) {
  if (count < 16) {
    byte(0x90 | static_cast<unsigned>(count));
  } else if (count <= 0xffff) {
    byte(0xdc), big_endian(count, 2);
  } else {
    byte(0xdd), big_endian(count, 4);
  }
}

void Reader::fail(const char* expected) const {
  throw Malformed(std::string("expected ") + expected + " at byte " + std::to_string(at_));
}

unsigned Reader::peek() const {
  if (at_ >= data_.size()) fail("more bytes");
  return static_cast<unsigned char>(data_[at_]);
}

unsigned Reader::byte() {
  const unsigned found = peek();
  ++at_;
  return found;
}

std::uint64_t Reader::big_endian(int bytes) {
  std::uint64_t value = 0;
  while (bytes-- > 0) value = value << 8 | byte();
  return value;
}

std::string_view Reader::bytes(std::uint64_t count) {
  if (count > data_.size() - at_) fail("more bytes");
  const std::string_view found = data_.substr(at_, count);
  at_ += count;
  return found;
}

bool Reader::nil() {
  if (peek() != 0xc0) return false;
  ++at_;
  return true;
}

bool Reader::boolean() {
  const unsigned head = peek();
  if (head != 0xc2 && head != 0xc3) fail("true or false");
  ++at_;
  return head == 0xc3;
}

std::int64_t Reader::integer() {
  const unsigned head = peek();
  if (head < 0x80) return ++at_, head;
  if (head >= 0xe0) return ++at_, static_cast<std::int64_t>(head) - 0x100;
  if (head < 0xcc || head > 0xd3) fail("an integer");
  ++at_;
  switch (head) {
    case 0xcc: return static_cast<std::int64_t>(big_endian(1));
    case 0xcd: return static_cast<std::int64_t>(big_endian(2));
    case 0xce: return static_cast<std::int64_t>(big_endian(4));
    case 0xd0: return static_cast<std::int8_t>(big_endian(1));
    case 0xd1: return static_cast<std::int16_t>(big_endian(2));
    case 0xd2: return static_cast<std::int32_t>(big_endian(4));
    case 0xd3: return static_cast<std::int64_t>(big_endian(8));
    default: break;
  }
  const std::uint64_t value = big_endian(8);
  if (value > static_cast<std::uint64_t>(INT64_MAX)) fail("an integer below 2**63");
  return static_cast<std::int64_t>(value);
}

double Reader::real() {
  const unsigned head = peek();
  if (head == 0xca) {
    ++at_;
    const auto bits = static_cast<std::uint32_t>(big_endian(4));
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  if (head == 0xcb) {
    ++at_;
    const std::uint64_t bits = big_endian(8);
    double value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  return static_cast<double>(integer());
}

std::string_view Reader::text() {
  const unsigned head = peek();
  if ((head & 0xe0u) != 0xa0u && (head < 0xd9 || head > 0xdb)) fail("text");
  ++at_;
  const std::uint64_t size = head < 0xd9 ? head & 0x1fu : big_endian(1 << (head - 0xd9));
  const std::string_view found = bytes(size);
  if (count_code_points(found) == kInvalid) fail("valid UTF-8");
  return found;
}

std::string_view Reader::binary() {
  const unsigned head = peek();
  if (head < 0xc4 || head > 0xc6) fail("bytes");
  ++at_;
  return bytes(big_endian(1 << (head - 0xc4)));
}

std::size_t Reader::array() {
  const unsigned head = peek();
  if ((head & 0xf0u) != 0x90u && head != 0xdc && head != 0xdd) fail("an array");
  ++at_;
  return head < 0xdc ? head & 0xfu : big_endian(head == 0xdc ? 2 : 4);
}

void Reader::end() const {
  if (at_ != data_.size()) fail("no further byte");
}

}  // namespace spotspeed::msgpack
