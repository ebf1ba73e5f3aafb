#include "arena.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older C libraries do not name it
#endif

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U  // Linux 6.3
#endif

namespace spotspeed {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr std::size_t kPrefaultSlice = std::size_t{16} << 20;

[[noreturn]] void fail(const char* call) {
  throw std::system_error(errno, std::generic_category(), call);
}

std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

// An open descriptor until it is handed over.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

int create_memory_file(const std::string& name) {
  const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  // Hardened kernels refuse files that could be made executable; old ones do not know the flag.
  const int fd = memfd_create(name.c_str(), flags | MFD_NOEXEC_SEAL);
  return fd < 0 && errno == EINVAL ? memfd_create(name.c_str(), flags) : fd;
}

// Kernels before 5.14: an atomic that changes nothing still makes the page present and writable,
// and cannot undo what another thread or process writes at the same time.
void touch_pages(std::byte* start, std::size_t size) {
  const std::size_t page = page_bytes();
  for (std::size_t offset = 0; offset < size; offset += page) {
    __atomic_fetch_or(reinterpret_cast<unsigned char*>(start + offset), 0, __ATOMIC_RELAXED);
  }
}

}  // namespace

Arena::Arena(int fd, std::size_t size) : fd_(fd), size_(size) {
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) {
    const int error = errno;
    close(std::exchange(fd_, -1));
    throw std::system_error(error, std::generic_category(), "mmap of a staging arena");
  }
  data_ = static_cast<std::byte*>(address);
  (void)madvise(address, size, MADV_HUGEPAGE);
  // A dump of a crashed rank needs no copy of the staged state.
  (void)madvise(address, size, MADV_DONTDUMP);
}

Arena Arena::create(std::size_t size, const std::string& name) {
  const std::size_t page = page_bytes();
  if (size == 0) throw std::invalid_argument("an arena needs at least one byte");
  if (size > static_cast<std::size_t>(std::numeric_limits<off_t>::max()) - page) {
    throw std::invalid_argument("an arena of " + std::to_string(size) + " bytes is too large");
  }
  const std::size_t rounded = (size + page - 1) / page * page;
  Descriptor fd(create_memory_file(name));
  if (fd.get() < 0) fail("memfd_create");
  if (ftruncate(fd.get(), static_cast<off_t>(rounded)) != 0) fail("ftruncate of a staging arena");
  if (fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) fail("F_ADD_SEALS on a staging arena");
  return Arena(fd.release(), rounded);
}

Arena Arena::attach(int fd) {
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 && errno == EBADF) fail("attaching to a staging arena");
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || (seals & F_SEAL_GROW) == 0) {
    throw std::invalid_argument("descriptor " + std::to_string(fd) +
                                " is not an arena sealed against shrinking and growing");
  }
  struct stat status {};
  if (fstat(fd, &status) != 0) fail("fstat of a staging arena");
  if (status.st_size <= 0) throw std::invalid_argument("the arena is empty");
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (own < 0) fail("duplicating an arena's descriptor");
  Arena arena(own, static_cast<std::size_t>(status.st_size));
  close(std::exchange(arena.fd_, -1));
  if (madvise(arena.data_, arena.size_, MADV_DONTFORK) == 0) arena.only_in_ = getpid();
  return arena;
}

Arena::~Arena() {
  // Where a child does not have the mapping, something else of its may lie at these addresses.
  const bool is_mapped = only_in_ == 0 || only_in_ == getpid();
  if (data_ != nullptr && is_mapped) munmap(data_, size_);
  if (fd_ >= 0) close(fd_);
}

Arena::Arena(Arena&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      only_in_(other.only_in_) {}

std::size_t Arena::huge_page_bytes() const {
  const auto first = reinterpret_cast<std::uintptr_t>(data_);
  std::ifstream smaps("/proc/self/smaps");
  std::size_t kib = 0;
  bool is_inside = false;
  for (std::string line; std::getline(smaps, line);) {
    std::uintptr_t start = 0, stop = 0;
    std::size_t value = 0;
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " ", &start, &stop) == 2) {
      is_inside = first <= start && stop <= first + size_;
    } else if (is_inside && (std::sscanf(line.c_str(), "ShmemPmdMapped: %zu", &value) == 1 ||
                             std::sscanf(line.c_str(), "FilePmdMapped: %zu", &value) == 1 ||
                             std::sscanf(line.c_str(), "AnonHugePages: %zu", &value) == 1)) {
      kib += value;
    }
  }
  return kib * 1024;
}

void Arena::prefault(std::size_t offset, std::size_t length) const {
  if (offset > size_ || length > size_ - offset) {
    throw std::invalid_argument("[" + std::to_string(offset) + ", +" + std::to_string(length) +
                            ") is not inside an arena of " + std::to_string(size_) + " bytes");
  }
  const std::size_t page = page_bytes();
  const std::size_t stop = offset + length;
  std::size_t start = offset / page * page;
  while (start < stop) {
    const std::size_t size =
        std::min(kPrefaultSlice, (stop - start + page - 1) / page * page);
    if (madvise(data_ + start, size, MADV_POPULATE_WRITE) == 0) {
      start += size;
    } else if (errno == EINVAL) {
      touch_pages(data_ + start, size);
      start += size;
    } else if (errno != EINTR && errno != EAGAIN) {
      fail("prefaulting a staging arena (is there enough memory?)");
    }
  }
}

}  // namespace spotspeed
