// The arena: shared, sealed, and present in memory when asked.
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../arena.h"
#include "check.h"

using namespace spotspeed;

TEST(what_one_mapping_writes_another_reads) {
  const Arena arena = Arena::create(100'000, "test");
  CHECK(arena.size() == 102'400 && arena.size() % static_cast<std::size_t>(getpagesize()) == 0);
  const Arena other = Arena::attach(arena.fd());
  CHECK(other.size() == arena.size() && other.fd() == -1);
  CHECK(other.data() != arena.data());
  std::memset(arena.data() + 777, 42, 1000);
  CHECK(other.data()[777] == std::byte{42} && other.data()[1776] == std::byte{42});
}

TEST(the_memory_outlives_its_creator) {
  int fd = -1;
  {
    const Arena arena = Arena::create(4096, "test");
    arena.data()[5] = std::byte{1};
    fd = dup(arena.fd());
  }
  const Arena other = Arena::attach(fd);
  close(fd);
  CHECK(other.data()[5] == std::byte{1});
}

TEST(a_killed_writer_leaves_what_it_wrote) {
  const Arena arena = Arena::create(4096, "test");
  const pid_t child = fork();
  if (child == 0) {
    arena.data()[9] = std::byte{3};
    kill(getpid(), SIGKILL);
  }
  CHECK(waitpid(child, nullptr, 0) == child);
  CHECK(arena.data()[9] == std::byte{3});
}

TEST(the_file_can_neither_shrink_nor_grow) {
  const Arena arena = Arena::create(8192, "test");
  CHECK(ftruncate(arena.fd(), 4096) == -1);
  CHECK(ftruncate(arena.fd(), 16384) == -1);
}

TEST(what_is_not_a_sealed_arena_is_refused) {
  const int unsealed = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(ftruncate(unsealed, 4096) == 0);
  CHECK(check::throws<std::invalid_argument>([&] { Arena::attach(unsealed); }));
  close(unsealed);
  const int ordinary = open("/dev/null", O_RDWR | O_CLOEXEC);
  CHECK(check::throws<std::invalid_argument>([&] { Arena::attach(ordinary); }));
  close(ordinary);
  CHECK(check::throws<std::system_error>([] { Arena::attach(-1); }));
  CHECK(check::throws<std::invalid_argument>([] { Arena::create(0, "test"); }));
  CHECK(check::throws<std::invalid_argument>([] { Arena::create(SIZE_MAX, "test"); }));
}

TEST(prefault_changes_no_byte_that_others_write) {
  const Arena arena = Arena::create(std::size_t{40} << 20, "test");
  std::thread writer([&arena] { std::memset(arena.data(), 1, arena.size() / 2); });
  arena.prefault(arena.size() / 2, arena.size() - arena.size() / 2);
  writer.join();
  arena.prefault(0, arena.size());
  CHECK(arena.data()[0] == std::byte{1} && arena.data()[arena.size() / 2 - 1] == std::byte{1});
  CHECK(arena.data()[arena.size() - 1] == std::byte{0});
  arena.prefault(arena.size(), 0);
  arena.prefault(5000, 3);
  CHECK(check::throws<std::invalid_argument>([&] { arena.prefault(arena.size(), 1); }));
  CHECK(check::throws<std::invalid_argument>([&] { arena.prefault(1, SIZE_MAX); }));
}

TEST(prefaulted_pages_are_present) {
  const Arena arena = Arena::create(std::size_t{2} << 20, "test");
  arena.prefault(0, arena.size());
  unsigned char present[512];
  CHECK(mincore(arena.data(), arena.size(), present) == 0);
  for (const unsigned char page : present) CHECK(page & 1);
}

TEST_MAIN
