// Shared staging memory: an anonymous file in memory that several processes map.
//
// Lifetime: the mapping and its creator's file descriptor live as long as the object; the memory
//   itself lives until the last process has unmapped and closed it, so it survives the death of
//   the process that created it. Pointers into it end with the object. Children that a process
//   forks do not get the mapping of an arena that it has attached, so none of them, a DataLoader's
//   worker say, keeps the memory when that process is gone.
// Threads: prefault() may run beside any use of the memory; it never changes a byte.
// Alignment: the address is page aligned (huge-page aligned where the kernel grants huge pages).
// Seals: the file can neither shrink nor grow once created, so a mapped page cannot vanish under
//   a reader (no SIGBUS), and attach() refuses files without these seals.
#pragma once

#include <cstddef>
#include <string>

#include <sys/types.h>

namespace spotspeed {

class Arena {
 public:
  // A new arena of `size` bytes, rounded up to whole pages. Throws std::system_error.
  static Arena create(std::size_t size, const std::string& name);
  // Maps the arena behind a descriptor received from its creator; `fd` stays the caller's, and is
  // not needed any more. Throws std::invalid_argument when it is not a sealed arena.
  static Arena attach(int fd);

  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&&) = delete;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  // The creator's descriptor; -1 where the arena was attached.
  int fd() const { return fd_; }
  // Bytes that this process has mapped by huge pages now: the kernel may accept the wish for them
  // and give none. Asks /proc/self/smaps; 0 where that cannot be read.
  std::size_t huge_page_bytes() const;

  // Makes the pages of [offset, offset + length) present, in slices, so that no first touch
  // stalls a copy. Throws std::invalid_argument for a range that
  // is not inside, std::system_error when memory runs out.
  void prefault(std::size_t offset, std::size_t length) const;

 private:
  Arena(int fd, std::size_t size);  // takes `fd` over, also when it throws

  int fd_ = -1;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  pid_t only_in_ = 0;  // the one process that has the mapping; 0: its children have it, too
};

}  // namespace spotspeed
