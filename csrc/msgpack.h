// The part of MessagePack that control messages are made of, written in its shortest form.
//
// Lifetime: a Reader refers to the caller's bytes and must not outlive them; a Writer owns its own.
// Threads: one thread an object.
// Alignment: none required.
// Format: https://github.com/msgpack/msgpack/blob/master/spec.md
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace spotspeed::msgpack {

// The bytes are not what was expected there.
class Malformed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Writer {
 public:
  void nil() { byte(0xc0); }
  void boolean(bool value) { byte(value ? 0xc3 : 0xc2); }
  void integer(std::int64_t value);
  void real(double value);
  // UTF-8; the caller answers for its validity.
  void text(std::string_view value);
  void binary(std::string_view value);
  void array(std::size_t count);
  std::string take() { return std::move(out_); }

 private:
  void byte(unsigned value) { out_.push_back(static_cast<char>(value)); }
  void big_endian(std::uint64_t value, int bytes);
  std::string out_;
};

// Every method throws Malformed, naming what it found where.
class Reader {
 public:
  explicit Reader(std::string_view data) : data_(data) {}
  // Takes nil when it is next.
  bool nil();
  bool boolean();
  std::int64_t integer();
  // An integer counts, too.
  double real();
  // Valid UTF-8.
  std::string_view text();
  std::string_view binary();
  std::size_t array();
  void end() const;

 private:
  [[noreturn]] void fail(const char* expected) const;
  unsigned peek() const;
  unsigned byte();
  std::uint64_t big_endian(int bytes);
  std::string_view bytes(std::uint64_t count);
  std::string_view data_;
  std::size_t at_ = 0;
};

// How many code points `text` has, or SIZE_MAX where it is not valid UTF-8.
std::size_t count_code_points(std::string_view text);
// The first `count` code points of valid UTF-8.
std::string_view first_code_points(std::string_view text, std::size_t count);

}  // namespace spotspeed::msgpack
