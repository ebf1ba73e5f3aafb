// Shared staging memory: an anonymous file in memory that several processes map.
//
// Lifetime: the mapping and this object's file descriptor live as long as the object; the memory
//   itself lives until the last process has unmapped and closed it, so it survives the death of
//   the process that created it. Pointers into it end with the object.
// Threads: prefault() may run beside any use of the memory; it never changes a byte.
// Alignment: the address is page aligned (huge-page aligned where the kernel grants huge pages).
// Seals: the file can neither shrink nor grow once created, so a mapped page cannot vanish under
//   a reader (no SIGBUS), and attach() refuses files without these seals.
#pragma once

#include <cstddef>
#include <string>

namespace spotspeed {

class Arena {
 public:
  // A new arena of `size` bytes, rounded up to whole pages. Throws std::system_error.
  static Arena create(std::size_t size, const std::string& name);
  // Maps the arena behind a descriptor received from its creator; keeps its own duplicate, so
  // `fd` stays the caller's. Throws std::invalid_argument when it is not a sealed arena.
  static Arena attach(int fd);

  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&&) = delete;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  int fd() const { return fd_; }
  // Whether the kernel accepted the wish for huge pages.
  bool huge_pages() const { return huge_pages_; }

  // Makes the pages of [offset, offset + length) present, in slices, so that no first touch
  // stalls a copy. Throws std::invalid_argument for a range that
  // is not inside, std::system_error when memory runs out.
  void prefault(std::size_t offset, std::size_t length) const;

 private:
  Arena(int fd, std::size_t size);  // takes `fd` over, also when it throws

  int fd_ = -1;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  bool huge_pages_ = false;
};

}  // namespace spotspeed
